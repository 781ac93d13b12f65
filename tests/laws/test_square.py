"""(Σv)² − Σv²: FM(a) per request, FM(c) + ⟨Σa, Σc⟩ per impression."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, side_by_side
from torch import Tensor

aten = torch.ops.aten
SPELLINGS = {
    "pow": lambda t: t.sum(1).pow(2) - t.pow(2).sum(1),
    "mul": lambda t: t.sum(1) * t.sum(1) - (t * t).sum(1),
    "square": lambda t: torch.square(t.sum(1, keepdim=True)).squeeze(1) - torch.square(t).sum(1),
    "mean": lambda t: t.mean(1) ** 2 - (t**2).mean(1),
}


@few
@given(fields(1, 3), st.sampled_from(sorted(SPELLINGS)), st.booleans())
def test_the_sums_over_request_fields_move(law: Any, drawn: dict[str, int], spelling: str, summed: bool) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        out = SPELLINGS[spelling](side_by_side(inputs, names, 1))
        return 0.5 * out.sum(1, keepdim=True) if summed else out

    found = law(Model(run), **{f: (w, 5) for f, w in drawn.items()})
    assert {aten.sum.dim_IntList, aten.mean.dim} & set(found.moved())


def test_a_square_of_integers_stays(law: Any) -> None:
    ids = lambda n: torch.randint(2**30, 2**31, (n, 2, 3))  # noqa: E731

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return SPELLINGS["mul"](torch.cat([u, x], 1))

    law(Model(run), u=ids, x=ids)
