"""sum/mean/max(stack[E a, c])  =  the same over each part, then combined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, side_by_side
from torch import Tensor

aten = torch.ops.aten
REDUCTIONS = {
    "sum": (lambda t, d, k: t.sum(d, keepdim=k), aten.sum.dim_IntList),
    "mean": (lambda t, d, k: t.mean(d, keepdim=k), aten.mean.dim),
    "amax": (lambda t, d, k: t.amax(d, keepdim=k), aten.amax.default),
    "amin": (lambda t, d, k: t.amin(d, keepdim=k), aten.amin.default),
}


@few
@given(
    fields(2, 3), st.sampled_from(sorted(REDUCTIONS)), st.booleans(), st.sampled_from([(1,), (-2,), (1, 2), (-1, 1)])
)
def test_each_side_is_reduced_by_itself(
    law: Any, drawn: dict[str, int], name: str, keepdim: bool, dims: tuple[int, ...]
) -> None:
    reduce, target = REDUCTIONS[name]
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return reduce(side_by_side(inputs, names, 1), dims, keepdim)

    found = law(Model(run), **{f: (w, 2) for f, w in drawn.items()})
    assert target in found.moved()


@few
@given(st.permutations(["u0", "u1", "x0", "x1"]), st.sampled_from(["prod", "any", "all"]))
def test_over_stacked_fields(law: Any, order: list[str], name: str) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        stacked = torch.stack([inputs[n] for n in order], 1)
        return stacked.prod(1) if name == "prod" else getattr(stacked > 0.3, name)(1)

    law(Model(run), **dict.fromkeys(order, (3,)))


def test_a_mean_over_another_dim_is_taken_block_by_block(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.cat([u, x], 1).mean(2)

    assert aten.mean.dim in law(Model(run), u=(2, 3), x=(4, 3)).moved()


@few
@given(fields(2, 3), st.booleans(), st.sampled_from([(1,), (1, 2), (-1, 1)]))
def test_logsumexp_is_taken_of_each_side(law: Any, drawn: dict[str, int], keepdim: bool, dims: tuple[int, ...]) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        both = side_by_side(inputs, names, 1)
        banned = both.masked_fill(both > 0.5, float("-inf"))
        return both.logsumexp(dims, keepdim) + banned.exp().sum(dims, keepdim)

    assert aten.logsumexp.default in law(Model(run), **{f: (w, 2) for f, w in drawn.items()}).moved()


@pytest.mark.parametrize("keepdim", [True, False])
def test_a_side_of_logsumexp_may_be_all_minus_infinity(law: Any, keepdim: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        masked = u + (u > 0.3).to(u).log()
        return torch.cat([masked, x], 1).logsumexp(1, keepdim)

    assert aten.logsumexp.default in law(Model(run), u=(2, 3), x=(3, 3)).moved()


@few
@given(fields(2, 3), st.sampled_from(["amax", "amin"]), st.sampled_from([(1,), (1, 2)]), st.booleans())
def test_ties_share_their_gradient_as_before(
    law: Any, drawn: dict[str, int], name: str, dims: tuple[int, ...], infinite: bool
) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        both = side_by_side(inputs, names, 1).relu()  # zeros on both sides
        both = torch.where(both > 0, both.round(), float("-inf")) if infinite else both.round()
        return getattr(both, name)(dims).clamp(-9)

    found = law(Model(run), **{f: (w, 2) for f, w in drawn.items()})
    assert any(t.startswith(name) for t in found.took())


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([u, x], 1)
        return both.logsumexp(1) + both.amax(1) + both.mean(1) - both.prod(1)

    law(Model(run), u=(16, 3), x=(8, 3)).precise()


@pytest.mark.parametrize("name", ["max", "softmax", "median", "argmax"])
def test_declines_what_is_no_sum(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Any:
        both = torch.cat([u, x], 1)
        out = both.softmax(1) if name == "softmax" else getattr(both, name)(1)
        return out if isinstance(out, Tensor) else tuple(out)

    found = law(Model(run), u=(3, 2), x=(4, 2))
    assert not found.moved()


def test_integers_and_flags_are_summed_exactly(law: Any) -> None:
    big = lambda n: torch.randint(2**52, 2**53, (n, 3))  # noqa: E731

    def run(m: Model, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([u, x], 1)
        flags = both % 2 == 0
        return both.sum(1), flags.sum(1), both.int().prod(1), flags.sum(1, dtype=torch.int32)

    law(Model(run), u=big, x=big)
