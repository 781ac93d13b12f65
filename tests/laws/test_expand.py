"""linear(q.expand(T))  =  linear(q).expand(T)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

SPELLINGS = {
    "expand": lambda q, t: q.unsqueeze(1).expand(-1, t, -1),
    "expand all": lambda q, t: q.unsqueeze(1).expand(q.shape[0], t, q.shape[1]),
    "repeat": lambda q, t: q.unsqueeze(1).repeat(1, t, 1),
    "expand_as": lambda q, t: q.unsqueeze(1).expand_as(torch.zeros(q.shape[0], t, q.shape[1])),
}


@few
@given(st.sampled_from(sorted(SPELLINGS)), st.integers(2, 5), st.booleans())
def test_a_repeated_row_is_multiplied_once(law: Any, spelling: str, length: int, twice: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = F.linear(SPELLINGS[spelling](x, length), m.w).relu()
        h = F.linear(h, m.v) if twice else h
        return (h * u.unsqueeze(1)).sum(1)

    found = law(Model(run, w=parameter(3, 4), v=parameter(3, 3)), u=(3,), x=(4,))
    once = 2 * 12 * 3 * 4 + twice * 2 * 12 * 3 * 3
    before, after = found.flops()
    assert before == once * length
    assert after <= once + 2 * 12 * length * 3  # and the weighted sum, as a product


@pytest.mark.parametrize("name", ["cumsum", "softmax", "flip", "mean", "sort"])
def test_an_op_along_the_repeated_dim(law: Any, name: str) -> None:
    along = {
        "cumsum": lambda h: h.cumsum(1),
        "softmax": lambda h: h.softmax(1),
        "flip": lambda h: h.flip(1),
        "mean": lambda h: h.mean(1, keepdim=True),
        "sort": lambda h: h.sort(1).values,
    }[name]

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(along(x.unsqueeze(1).expand(-1, 5, -1)), m.w) + u.sum(1)[:, None, None]

    law(Model(run, w=parameter(2, 4)), u=(3,), x=(4,))


def test_dropout_draws_for_every_copy(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x.unsqueeze(1).expand(-1, 5, -1), 0.5, m.training), m.w) + u.sum(1)[:, None, None]

    found = law(Model(run, w=parameter(2, 4)), training=True, u=(3,), x=(4,))
    assert found.flops()[1] == 2 * 12 * 5 * 4 * 2


def test_a_sum_with_a_repeated_term_keeps_its_count(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return (x.unsqueeze(1).expand(-1, 3, -1) + u).sum(1) + x.unsqueeze(1).expand(-1, 3, -1).sum(1)

    law(Model(run), u=(3, 4), x=(4,))
