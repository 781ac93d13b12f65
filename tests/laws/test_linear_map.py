"""linear(E a ± c, W)  =  E linear(a, W) ± linear(c, W)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

aten = torch.ops.aten
SUMS = {
    "add": lambda a, c: a + c,
    "sub": lambda a, c: c - a,
    "alpha": lambda a, c: torch.sub(torch.add(a, c, alpha=-3), c, alpha=0.5),
    "scaled": lambda a, c: -(2 * (a - c) / 3) + a * 0.25,
    "one minus": lambda a, c: 1 - (a + c),
    "broadcast": lambda a, c: (a.unsqueeze(1) + torch.stack([c, -c], 1)).flatten(1)[:, : a.shape[1]],
}


@few
@given(st.sampled_from(sorted(SUMS)), st.integers(1, 4), st.integers(1, 3))
def test_the_request_term_is_multiplied_per_request(law: Any, spelling: str, k: int, n: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(SUMS[spelling](u, x), m.w, m.b).relu()

    found = law(Model(run, w=parameter(n, k), b=parameter(n)), u=(k,), x=(k,))
    if spelling in ("add", "sub", "scaled"):
        assert aten.linear.default in found.moved()


def test_a_sum_over_rows_of_a_sequence(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(u + x.unsqueeze(1), m.w)

    found = law(Model(run, w=parameter(5, 4)), u=(3, 4), x=(4,))
    assert found.flops() == (2 * 12 * 3 * 4 * 5, 2 * 4 * 5 * (3 * 3 + 12))


@few
@given(st.permutations(["q", "k", "q-k", "q*k"]), st.integers(2, 3))
def test_the_activation_unit_regroups_by_itself(law: Any, order: list[str], length: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        q = x.unsqueeze(1).expand(-1, length, -1)  # wide, so that the product of keys pays to cross
        parts = {"q": q, "k": u, "q-k": q - u, "q*k": q * u}
        return F.linear(torch.cat([parts[p] for p in order], -1), m.w).relu()

    found = law(Model(run, w=parameter(2, 256)), u=(length, 64), x=(64,))
    once, each = 3 * length, 12 + 12 * length  # q (W1 + W3) per impression, (q k) W4 per impression and step
    assert found.flops() == (2 * 12 * length * 256 * 2, 2 * 64 * 2 * (once + each))


@pytest.mark.parametrize("between", ["relu", "floor", "square", "clamp"])
def test_declines_where_the_sum_is_not_linear_any_more(law: Any, between: str) -> None:
    bends = {
        "relu": lambda h: h.relu(),
        "floor": lambda h: torch.div(h, 2, rounding_mode="floor"),
        "square": lambda h: h * h,
        "clamp": lambda h: h.clamp(-1, 1),
    }[between]

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(bends(u + x), m.w)

    found = law(Model(run, w=parameter(2, 4)), u=(4,), x=(4,))
    assert aten.linear.default not in found.moved()


def test_infinite_factors_stay_outside(law: Any) -> None:
    law(Model(lambda m, u, x: (u + x) * float("inf")), u=(4,), x=(4,))


def test_integer_sums_stay_as_they_are(law: Any) -> None:
    ids = lambda n: torch.randint(2**60, 2**62, (n, 3))  # noqa: E731

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.add(u, x, alpha=3) // 7 - u

    law(Model(run), u=ids, x=ids)


def test_terms_of_one_side_are_added_before_the_product(law: Any) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        return F.linear(u0 - x0 + 2 * x1 + u1.tanh(), m.w)

    found = law(Model(run, w=parameter(2, 4)), u0=(4,), u1=(4,), x0=(4,), x1=(4,))
    assert found.flops() == (2 * 12 * 4 * 2, 2 * 4 * 2 * (3 + 12))


@pytest.mark.parametrize("weight", [-2, -1, 0, 1, 2, 0.5])
def test_terms_keep_their_weights(law: Any, weight: float) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        h = torch.add(torch.add(u0 + x0, u1, alpha=weight), x1, alpha=-weight)
        return F.linear(h, m.w)

    found = law(Model(run, w=parameter(2, 4)), u0=(4,), u1=(4,), x0=(4,), x1=(4,))
    assert found.flops()[1] <= 2 * 4 * 2 * (3 + 12)


@pytest.mark.parametrize("flags", ["of the request", "of the impression"])
def test_numbers_times_flags_are_summed(law: Any, flags: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        numbers, flagged = (x, u) if flags == "of the request" else (u, x)
        return F.linear((numbers * (flagged[..., :1] > 0).long()).sum(1), m.w)

    law(Model(run, w=parameter(2, 4)), u=(3, 4), x=(3, 4))
