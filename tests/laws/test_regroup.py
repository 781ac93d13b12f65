"""(E a + c) + E b  =  E(a + b) + c"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few
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


def test_declines_integers_and_mixed_dtypes(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        return (u.long() + xi) + u.long(), (u + xi) + u.float()

    law(Model(run), u=(3,), x=(3,), xi=lambda n: torch.randint(9, (n, 3)))
