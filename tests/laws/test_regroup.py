"""(E a + c) + E b  =  E(a + b) + c"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

aten = torch.ops.aten


@few
@given(st.permutations(["u0", "u1", "x0", "x1", "u2"]), st.lists(st.booleans(), min_size=5, max_size=5))
def test_request_terms_are_added_first_and_cross_once(law: Any, order: list[str], minus: list[bool]) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        total = inputs[order[0]]
        for name, sign in zip(order[1:], minus):
            total = total - inputs[name] if sign else total + inputs[name]
        return total.tanh()

    found = law(Model(run), **dict.fromkeys(sorted(order), (3,)))
    sums = [t for t in found.moved() if t in (aten.add.Tensor, aten.sub.Tensor)]
    assert len(sums) == 2
    assert len(found.model._whole_program().plan.residuals) == 1


def test_logits_of_parts_are_summed_by_side(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        wide = u.sum(1, keepdim=True) + x.sum(1, keepdim=True)
        deep = torch.cat([u, x], 1).mean(1, keepdim=True)
        return torch.sigmoid(wide + deep + 0.5 * u[:, :1])

    found = law(Model(run), u=(3,), x=(4,))
    assert len(found.model._whole_program().plan.residuals) == 1


def test_broadcast_terms_keep_their_shape(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return ((u.unsqueeze(2) + x.unsqueeze(1)) - u.unsqueeze(2) * 0.5).mean(-1)

    law(Model(run), u=(3, 4), x=(2, 4))


def _cubes(m: Model, t: list[Tensor]) -> Tensor:
    return t[0] * t[1] * t[2] * t[3] * t[4]


CHAINS = {
    "products": _cubes,
    "products in pairs": lambda m, t: (t[0] * t[1]) * (t[2] * (t[3] * t[4])),
    "and": lambda m, t: torch.logical_and(torch.logical_and(t[0] > 0, t[1] > 0), t[2] > 0) & (t[3] > 0) & (t[4] > 0),
    "or": lambda m, t: (t[0] > 1) | (t[1] > 1) | (t[2] > 1) | (t[3] > 1) | (t[4] > 1),
    "maximum": lambda m, t: torch.maximum(
        torch.maximum(t[0].long(), t[1].long()), torch.maximum(t[2].long(), t[3].long())
    ).minimum(t[4].long()),
}


@few
@given(st.permutations(["u0", "u1", "x0", "x1", "u2"]), st.sampled_from(sorted(CHAINS)))
def test_chains_are_regrouped(law: Any, order: list[str], name: str) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        return CHAINS[name](m, [inputs[n] for n in order])

    law(Model(run), **dict.fromkeys(sorted(order), (3,)))


def test_request_factors_are_multiplied_first_and_cross_once(law: Any) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, u2: Tensor, x: Tensor) -> Tensor:
        return (((u0 * x) * u1) * m.w) * (u2 * x)

    found = law(Model(run, w=parameter(3)), x=(3,), u0=(3,), u1=(3,), u2=(3,))
    assert found.moved().count(aten.mul.Tensor) == 3
    assert len(found.model._whole_program().plan.residuals) == 1


@pytest.mark.parametrize("case", ["read twice", "an outer product", "maximum of floats"])
def test_chains_stay_where_that_would_cost_or_change_more(law: Any, case: str) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x: Tensor) -> Tensor:
        if case == "read twice":
            gated = u0 * x
            return gated * u1 + gated.tanh()
        if case == "an outer product":
            return (u0.unsqueeze(1) * x.unsqueeze(1)) * u1.unsqueeze(2)
        return torch.maximum(torch.maximum(u0.relu(), x.relu()), u1.relu())

    found = law(Model(run), x=(3,), u0=(3,), u1=(3,))
    assert not {aten.mul.Tensor, aten.maximum.default} & set(found.moved())


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x: Tensor) -> Tensor:
        return ((u0 * x) * u1) * (u0 + x + u1)

    law(Model(run), x=(8,), u0=(8,), u1=(8,)).precise()


def test_declines_integers_and_mixed_dtypes(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        return (u.long() + xi) + u.long(), (u + xi) + u.float()

    law(Model(run), u=(3,), x=(3,), xi=lambda n: torch.randint(9, (n, 3)))
