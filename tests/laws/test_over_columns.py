"""A linear map over a dim that is not the last, in every spelling: W z, einsum, a map of the transpose, a convolution.

The parts of z meet their columns of W; of an outer product of fields the request's factor goes into the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side
from torch import Tensor

SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a convolution": lambda w, b, z: F.conv1d(z, w.unsqueeze(2), b),
    "the matrix first": lambda w, b, z: w @ z + b.unsqueeze(1),
    "einsum": lambda w, b, z: torch.einsum("nk,bkd->bnd", w, z) + b.unsqueeze(1),
    "einsum, turned": lambda w, b, z: torch.einsum("bkd,kn->dbn", z, w.t()).permute(1, 2, 0) + b.unsqueeze(1),
    "einsum, letters of the matrix alone": lambda w, b, z: (
        torch.einsum("nkxy,bkd->bnd", torch.stack([w * 0.25, w * 0.75], 2).unsqueeze(3), z) + b.unsqueeze(1)
    ),
    "a map of the transpose": lambda w, b, z: F.linear(z.transpose(1, 2), w, b).transpose(-1, -2),
    "a map of the permuted": lambda w, b, z: F.linear(z.permute(0, 2, 1), w, b).permute(0, 2, 1),
}
GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "fields": lambda t: t,
    "pairs": lambda t: (t.unsqueeze(2) * t.unsqueeze(1)).reshape(t.shape[0], -1, t.shape[2]),
    "pairs by einsum": lambda t: torch.einsum("bhd,bmd->bhmd", t, t).flatten(1, 2),
}


def crossed(spelling: str, grid: str, names: list[str]) -> Callable[..., Tensor]:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        return SPELLINGS[spelling](m.w, m.b, GRIDS[grid](side_by_side(inputs, names, 1))).tanh()

    return run


def width(grid: str, fields: int) -> int:
    return fields if grid == "fields" else fields * fields


@few
@given(fields(), st.sampled_from(sorted(SPELLINGS)), st.sampled_from(sorted(GRIDS)))
def test_equal_in_every_spelling(law: Any, drawn: dict[str, int], spelling: str, grid: str) -> None:
    weight = parameter(3, width(grid, sum(drawn.values())))
    model = Model(crossed(spelling, grid, list(drawn)), w=weight, b=parameter(3))
    law(model, **{f: (n, 2) for f, n in drawn.items()})


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_all_spellings_cost_what_the_convolution_does(law: Any, spelling: str) -> None:
    def flops(how: str) -> int:
        model = Model(crossed(how, "pairs", ["u", "x"]), w=parameter(6, 36), b=parameter(6))
        return int(law(model, u=(4, 5), x=(2, 5)).flops()[1])

    assert flops(spelling) <= flops("a convolution")


@pytest.mark.parametrize(
    "equation", ["nk,bkd->bd", "nk,kbd->bnd", "nd,bkd->bkn", "nk,bkd->nkd", "nk,bkd->bnkd", "kk,bkd->bkd"]
)
def test_other_einsums_stay_equal(law: Any, equation: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        z = torch.cat([u, x], 1)
        z = z.transpose(0, 1) if ",kbd" in equation else z
        return torch.einsum(equation, m.w, z).tanh().sum(0 if "->nkd" in equation else ()) + z.sum() * 0

    law(Model(run, w=parameter(5, 5)), u=(3, 5), x=(2, 5))


def test_declines_a_matrix_of_the_impression(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        weight = (x[:, :1] @ m.w).transpose(1, 2)
        return (weight @ torch.cat([u, u], 1)[:, :1] @ u.transpose(1, 2)).tanh()

    law(Model(run, w=parameter(4, 4)), u=(3, 4), x=(2, 4))
