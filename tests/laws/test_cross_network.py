"""x1 = x0 s0 + b + x0, x2 = x0 s1 + b + x1, ...        s: a dot of x, one value a row

A cross network is never carried out: each dot is one of x0's, split by side, and sums of what came before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor

SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x0, x, w, b: x0 * torch.nn.functional.linear(x, w.unsqueeze(0)) + b + x,
    "matmul": lambda x0, x, w, b: x0 * torch.matmul(x, w.unsqueeze(1)) + x + b,
    "vector": lambda x0, x, w, b: x0 * torch.tensordot(x, w, dims=([1], [0])).unsqueeze(1) + b + x,
    "turned": lambda x0, x, w, b: (x0.t() * torch.tensordot(x, w, dims=([-1], [0]))).t() + b + x,
}


def _columns(x0: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Of column vectors."""
    return torch.matmul(x0, torch.tensordot(x, w.unsqueeze(1), dims=([1], [0]))) + b.unsqueeze(1) + x


def _network(m: Model, x0: Tensor, cross: Callable[..., Tensor], depth: int) -> Tensor:
    x = x0 = x0.unsqueeze(2) if cross is _columns else x0
    for w, b in zip(m.w[:depth], m.b[:depth]):
        x = cross(x0, x, w, b)
    return x.squeeze(2) if cross is _columns else x


SPELLINGS["tensordot"] = _columns


@few
@given(fields(), st.integers(1, 3), st.sampled_from(sorted(SPELLINGS)))
def test_any_depth(law: Any, drawn: dict[str, int], depth: int, spelling: str) -> None:
    names, width = list(drawn), sum(widths(drawn))

    def run(m: Model, **inputs: Tensor) -> Tensor:
        x = _network(m, side_by_side(inputs, names), SPELLINGS[spelling], depth)
        return torch.nn.functional.linear(torch.cat([x, x.tanh()], 1), m.out)

    parts = {"w": parameter(3, width), "b": parameter(3, width), "out": parameter(2, 2 * width)}
    law(Model(run, **parts), **{f: (w,) for f, w in drawn.items()})


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_every_dot_is_split_by_side(law: Any, spelling: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        crossed = _network(m, torch.cat([u, x], 1), SPELLINGS[spelling], 2)
        return torch.nn.functional.linear(crossed, m.out)

    found = law(Model(run, w=parameter(2, 9), b=parameter(2, 9), out=parameter(1, 9)), u=(5,), x=(4,))
    biases = 2 * (9 + 9)  # those before a dot meet its weights once
    assert found.flops()[1] == 3 * 2 * (3 * 5 + 12 * 4) + biases


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        crossed = _network(m, torch.cat([u, x], 1), SPELLINGS["linear"], 2)
        return torch.nn.functional.linear(crossed, m.out)

    law(Model(run, w=parameter(2, 24), b=parameter(2, 24), out=parameter(3, 24)), u=(16,), x=(8,)).precise()


DECLINED = {
    "a value a column": lambda x0, x, w, b: x0 * (x * w) + b + x,
    "not a sum": lambda x0, x, w, b: (x0 * (x @ w).unsqueeze(1) + b + x).sigmoid(),
    "the request's": lambda x0, x, w, b: x0 * (x[:, :5] @ w[:5]).unsqueeze(1) + b + x,
}


@pytest.mark.parametrize("case", sorted(DECLINED))
def test_no_scale_of_whole_rows_is_carried_out(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        crossed = _network(m, torch.cat([u, x], 1), DECLINED[case], 2)
        return torch.nn.functional.linear(crossed, m.out)

    found = law(Model(run, w=parameter(2, 9), b=parameter(2, 9), out=parameter(1, 9)), u=(5,), x=(4,))
    assert not any(c.count("columns") > 2 for c in found.took())
