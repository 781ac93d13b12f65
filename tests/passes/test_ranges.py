"""What masks can be, held against what they are on every batch of four flags."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.ranges import bounds
from roo_rewrite.capture import Captured

U = torch.tensor([*itertools.product((-1.0, 1.0), repeat=4)])  # all there is for u > 0
X = torch.tensor([*itertools.product((0.0, 2.0), repeat=4)])
Function = Callable[..., Any]


def pad(u: Tensor) -> Tensor:
    return (u > 0).unsqueeze(1).expand(-1, 4, -1)


def causal(u: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(4, 4, dtype=dtype).tril().expand(len(u), 4, 4)


def known(u: Tensor, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A constant of as many rows as the batch: no value known when traced."""
    return torch.full((len(u), 4, 4), value, dtype=dtype)


# Each reads every flag once, so that what entries can be by themselves they can be together.
EXACT: dict[str, Function] = {
    "flags": lambda m, u, x: pad(u),
    "and": lambda m, u, x: pad(u) & causal(u),
    "logical and": lambda m, u, x: torch.logical_and(causal(u), pad(u)),
    "or": lambda m, u, x: pad(u) | causal(u),
    "logical or": lambda m, u, x: torch.logical_or(causal(u), pad(u)),
    "not": lambda m, u, x: ~(pad(u) & causal(u)),
    "not of numbers": lambda m, u, x: torch.logical_not(causal(u).float() * 3),
    "beside nothing": lambda m, u, x: torch.cat([causal(u).float(), torch.zeros(0), known(u)], -1),
    "flags kept": lambda m, u, x: (pad(u) & causal(u)).clone(),
    "flags of numbers": lambda m, u, x: (causal(u).float() * 2).to(torch.bool),
    "numbers kept": lambda m, u, x: (causal(u).float() * -3).contiguous(),
    "numbers of another dtype": lambda m, u, x: (causal(u).float() - 3).to(torch.bfloat16),
    "a number out of reach": lambda m, u, x: known(u, -1e9).to(torch.float16),
    "ones": lambda m, u, x: torch.ones(len(u), 4),
    "zeros": lambda m, u, x: torch.zeros(len(u), 4),
    "ones like": lambda m, u, x: torch.ones_like(x),
    "zeros like": lambda m, u, x: torch.zeros_like(x),
    "new ones": lambda m, u, x: x.new_ones(len(u), 3),
    "new zeros": lambda m, u, x: x.new_zeros(len(u), 3),
    "full": lambda m, u, x: known(u, 2.5),
    "full like": lambda m, u, x: torch.full_like(x, -4.0),
    "new full": lambda m, u, x: x.new_full((len(u), 2), 7.0),
    "where": lambda m, u, x: torch.where(pad(u) & causal(u), known(u, 0.0), -5.0),
    "where it is known": lambda m, u, x: torch.where(causal(u), known(u, 2), known(u, 3)),
    "filled": lambda m, u, x: known(u, 1.0).masked_fill(pad(u) | causal(u), -9.0),
    "sum": lambda m, u, x: causal(u).float() + (causal(u) & pad(u)).float(),
    "difference": lambda m, u, x: causal(u).float() - pad(u).float(),
    "from a number": lambda m, u, x: 1.0 - (pad(u) & causal(u)).float(),
    "product": lambda m, u, x: (1.0 - (pad(u) & causal(u)).float()) * -10000.0,
    "product of both signs": lambda m, u, x: (causal(u).float() - 0.5) * (pad(u).float() * 2 - 1),
    "negative": lambda m, u, x: -(pad(u) & causal(u)).float(),
    "equal": lambda m, u, x: (pad(u) & causal(u)).float() == 0,
    "unequal": lambda m, u, x: (pad(u) & causal(u)).float() != 0,
    "greater": lambda m, u, x: (pad(u) & causal(u)).float() + causal(u).float() > 1,
    "at least": lambda m, u, x: (pad(u) & causal(u)).float() + causal(u).float() >= 1,
    "less": lambda m, u, x: (pad(u) & causal(u)).float() + causal(u).float() < 1,
    "at most": lambda m, u, x: (pad(u) & causal(u)).float() + causal(u).float() <= 1,
    "another dim": lambda m, u, x: (pad(u) & causal(u)).unsqueeze(1),
    "transposed": lambda m, u, x: (pad(u) & causal(u)).transpose(1, 2),
    "permuted": lambda m, u, x: (pad(u) & causal(u)).permute(0, 2, 1),
    "repeated": lambda m, u, x: (pad(u) & causal(u)).repeat(1, 1, 1),
    "reshaped": lambda m, u, x: (pad(u) & causal(u)).reshape(len(u), 1, 4, 4),
    "slice": lambda m, u, x: (pad(u) & causal(u))[:, 1:3, ::2],
    "joined": lambda m, u, x: torch.cat([pad(u), causal(u)], 1),
    "joined along the last": lambda m, u, x: torch.cat([pad(u) & causal(u), known(u, 1, torch.bool)], -1),
    "lower triangle": lambda m, u, x: (pad(u) | causal(u)).tril(-1),
    "upper triangle": lambda m, u, x: known(u, -math.inf).triu(1),
}

# True in numbers, and not of what a dtype makes of them; or more than an entry alone can tell.
UNSURE: dict[str, Function] = {
    "a term that rounding takes away": lambda m, u, x: known(u, 1.0) + 1e-9 > 1,
    "a factor that rounding takes away": lambda m, u, x: known(u, 1.0) * (1 + 1e-9) != 1,
    "an inexact constant": lambda m, u, x: known(u, 0.1) * 3 == 0.3,
    "integers that wrap round": lambda m, u, x: known(u, 100, torch.int8) * 2 > 0,
    "an infinity times nothing": lambda m, u, x: torch.isnan(causal(u).float() * known(u, -math.inf)),
    "rows mixed": lambda m, u, x: torch.cat([pad(u) & causal(u), causal(u)]).reshape(-1, 4),
    "a scaled sum": lambda m, u, x: torch.add(known(u, 1.0), known(u, 1.0), alpha=3),
    "selected": lambda m, u, x: (pad(u) & causal(u)).index_select(1, torch.tensor([3, 0])),
    "where, of two numbers": lambda m, u, x: torch.where(pad(u) & causal(u), 0.0, -5.0),
    "free numbers": lambda m, u, x: x * 2 > 1,
    "repeated in what is known": lambda m, u, x: (pad(u) & causal(u)).repeat(1, 2, 1),
    "dims that are taken together": lambda m, u, x: (pad(u) & causal(u)).reshape(len(u), 2, 8),
}


def ranges(captured: Callable[..., Any], function: Function) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each output its range, and the values over all batches."""
    trace: Captured = captured(function)[0]
    (output,) = (n for n in trace.graph.nodes if n.op == "output")
    values = function(trace.model, U, X)
    return [(*bounds(trace, node), value.double()) for node, value in zip(output.args[0], values, strict=True)]


def exact(low: Tensor, high: Tensor, value: Tensor) -> bool:
    pairs = ((low, value.amin(0)), (high, value.amax(0)))
    return all(a.ndim == value.ndim and a[0].expand(b.shape).equal(b) for a, b in pairs)


def within(low: Tensor, high: Tensor, value: Tensor) -> bool:
    return bool(((low <= value) & (value <= high) | value.isnan()).all())


def test_the_range_is_what_the_entries_can_be(captured: Callable[..., Any]) -> None:
    found = ranges(captured, lambda m, u, x: tuple(f(m, u, x) for f in EXACT.values()))
    assert [name for name, row in zip(EXACT, found, strict=True) if not exact(*row)] == []


def test_what_is_not_sure_is_within_the_range(captured: Callable[..., Any]) -> None:
    found = ranges(captured, lambda m, u, x: tuple(f(m, u, x) for f in UNSURE.values()))
    assert [name for name, row in zip(UNSURE, found, strict=True) if not within(*row)] == []


FLAGS: list[Function] = [
    lambda a, b, s, t: a & b,
    lambda a, b, s, t: a | b,
    lambda a, b, s, t: ~a,
    lambda a, b, s, t: torch.logical_not(s),
    lambda a, b, s, t: s > 0.5,
    lambda a, b, s, t: s <= -1,
    lambda a, b, s, t: t == 1,
    lambda a, b, s, t: t != 0,
    lambda a, b, s, t: t >= 1,
    lambda a, b, s, t: t < 2,
    lambda a, b, s, t: s.to(torch.bool),
    lambda a, b, s, t: a.transpose(1, 2),
    lambda a, b, s, t: torch.cat([a[:, :2], b[:, 1:3]], 1),
    lambda a, b, s, t: a.tril(),
]
NUMBERS: list[Function] = [
    lambda a, b, s, t: a.float(),
    lambda a, b, s, t: torch.where(a, s, t),
    lambda a, b, s, t: torch.where(b, 0.0, -2.0),
    lambda a, b, s, t: s.masked_fill(a, 3.0),
    lambda a, b, s, t: s + t,
    lambda a, b, s, t: s - t,
    lambda a, b, s, t: 1 - s,
    lambda a, b, s, t: s * t,
    lambda a, b, s, t: s * -0.5,
    lambda a, b, s, t: -t,
    lambda a, b, s, t: s.triu(1),
    lambda a, b, s, t: torch.cat([s[:, :, 3:], t[:, :, :3]], 2),
    lambda a, b, s, t: s.reshape(len(s), 2, 2, 4).transpose(1, 2).reshape(len(s), 4, 4),
]
STEP = st.tuples(st.booleans(), *[st.integers(0, 99)] * 5)


@settings(derandomize=True, max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=20, max_size=20))
def test_drawn_programs_stay_within_their_ranges(captured: Callable[..., Any], steps: list[tuple[int, ...]]) -> None:
    def program(m: Any, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        flags, numbers = [pad(u), causal(u)], [x.unsqueeze(1).expand(-1, 4, -1), known(u, -1.0)]
        for is_flag, op, a, b, s, t in steps:
            ops, made = (FLAGS, flags) if is_flag else (NUMBERS, numbers)
            made.append(
                ops[op % len(ops)](*(v[i % len(v)] for v, i in ((flags, a), (flags, b), (numbers, s), (numbers, t))))
            )
        return (*flags[2:], *numbers[2:])

    for low, high, value in ranges(captured, program):
        assert within(low, high, value)
