"""y[n] = x1' W[n] x2: the request's factor into the weight, once per request.

bilinear(E a, c, W)  =  linear(flatten(E a outer c), W)
einsum of three      =  the pair of the request and the weight first
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
    "bilinear": lambda x, y, w: F.bilinear(x, y, w),
    "left to right": lambda x, y, w: torch.einsum("bi,nij,bj->bn", x, w, y),
    "from the right": lambda x, y, w: torch.einsum("bj,nij,bi->nb", y, w, x).t(),
    "weight last": lambda x, y, w: torch.einsum("...i,...j,nij->...n", x, y, w),
}


@few
@given(fields(), st.sampled_from(sorted(SPELLINGS)), st.booleans(), st.booleans())
def test_equal_in_every_spelling(law: Any, drawn: dict[str, int], spelling: str, deep: bool, biased: bool) -> None:
    names, k = list(drawn), sum(drawn.values())
    deep = deep and spelling in ("bilinear", "weight last")

    def run(m: Model, **inputs: Tensor) -> Tensor:
        x = side_by_side(inputs, names)
        if spelling == "bilinear":
            return F.bilinear(x, x.flip(-1), m.w, m.b if biased else None)
        return SPELLINGS[spelling](x, x.flip(-1), m.w)

    shapes = {f: (3, n) if deep else (n,) for f, n in drawn.items()}
    law(Model(run, w=parameter(2, k, k), b=parameter(2)), **shapes)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_the_requests_factor_goes_into_the_weight(law: Any, spelling: str, turned: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return SPELLINGS[spelling](*((x, u) if turned else (u, x)), m.w)

    found = law(Model(run, w=parameter(4, *((3, 5) if turned else (5, 3)))), u=(5,), x=(3,))
    assert found.flops()[1] == 2 * 3 * 4 * 5 * 3 + 2 * 12 * 4 * 3


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.bilinear(u, x, m.w) + torch.einsum("bi,nij,bj->bn", u, m.w, x)

    law(Model(run, w=parameter(4, 5, 3)), u=(5,), x=(3,)).precise()


def test_a_wide_history_waits_for_the_target(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("btd,de,be->bt", u, m.w, x)

    found = law(Model(run, w=parameter(6, 6)), u=(30, 6), x=(6,))
    assert found.flops()[1] == 2 * 12 * 6 * 6 + 2 * 12 * 30 * 6


DECLINED = ["both of the impression", "three of it", "a weight of the impression", "five operands", "a diagonal"]


@pytest.mark.parametrize("case", DECLINED)
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        if case == "both of the impression":
            return F.bilinear(x, x * u, m.w)
        if case == "three of it":
            return torch.einsum("bi,nij,bj->bn", x, m.w, x.tanh())
        if case == "a weight of the impression":
            return torch.einsum("bi,bij,bj->b", x, u[:, :, None] * x[:, None], x * u)
        if case == "a diagonal":
            return torch.einsum("bi,nii,bi->bn", u, m.w, x)
        return torch.einsum("bi,nij,bj,bj,n->bn", u, m.w, x, x, m.w[:, 0, 0])

    found = law(Model(run, w=parameter(4, 3, 3)), u=(3,), x=(3,))
    assert not any("two at a time" in t or t.startswith("linear") for t in found.took())
