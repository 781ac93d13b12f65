"""linear(sum_d (w * E a), W)  =  sum_d (w * E linear(a, W))"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

INSIDE = "linear: inside of a weighted sum of the request's"


@few
@given(st.integers(1, 3), st.booleans())
def test_a_linear_map_goes_inside_of_a_weighted_sum(law: Any, n: int, biased: bool) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x: Tensor) -> Tensor:
        h = torch.stack([u0, x, u1], 1)
        pooled = (torch.linalg.vecdot(h, x.unsqueeze(1)).softmax(1).unsqueeze(2) * h).sum(1)
        return F.linear(pooled, m.w[:n], m.b[:n] if biased else None)

    found = law(Model(run, w=parameter(3, 8), b=parameter(3)), u0=(8,), u1=(8,), x=(8,))
    assert INSIDE in found.took()


@pytest.mark.parametrize("case", ["over the last dim", "weights of each entry", "no linear map"])
def test_no_linear_map_inside(law: Any, case: str) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x: Tensor) -> Tensor:
        h = torch.stack([u0, x, u1], 1)
        weights = (h * x.unsqueeze(1)).softmax(1)
        if case == "over the last dim":
            return F.linear((weights.sum(1, keepdim=True) * h).sum(2), m.w[:, :3])
        if case == "weights of each entry":
            return F.linear((weights * h).sum(1), m.w)
        return (weights.sum(2, keepdim=True) * h).sum(1).tanh()

    assert INSIDE not in law(Model(run, w=parameter(3, 8)), u0=(8,), u1=(8,), x=(8,)).took()
