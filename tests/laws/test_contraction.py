"""linear(cat[E a, c], W)  =  E linear(a, Wa) + linear(c, Wc)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor

SPELLINGS = {
    "linear": lambda m, x: F.linear(x, m.w, m.b),
    "mm": lambda m, x: torch.mm(x, m.w.t()) + m.b,
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    "matmul": lambda m, x: x @ m.w.t() + m.b,
    "einsum": lambda m, x: torch.einsum("bk,nk->bn", x, m.w) + m.b,
    "addmm scaled": lambda m, x: torch.addmm(m.b, x, m.w.t(), beta=0.5, alpha=-2.0),
    "addmm alone": lambda m, x: torch.addmm(m.b * torch.inf, x, m.w.t(), beta=0, alpha=2),
    "addmm other": lambda m, x: torch.addmm(x[:, :1].tanh(), x, m.w.t()),
    "addmm turned": lambda m, x: torch.addmm(m.b.unsqueeze(1), m.w, x.t()).t(),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, ([1], [1])) + m.b,
    "tensordot turned": lambda m, x: torch.tensordot(m.w, x, ([1], [-1])).t() + m.b,
    "conv1d": lambda m, x: F.conv1d(x.unsqueeze(-1), m.w.unsqueeze(-1), m.b).squeeze(-1),
}


@few
@given(fields(), st.integers(1, 5), st.sampled_from(sorted(SPELLINGS)))
def test_request_columns_run_once_per_request(law: Any, drawn: dict[str, int], n: int, spelling: str) -> None:
    request, impression = widths(drawn)
    names, k = list(drawn), request + impression

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return SPELLINGS[spelling](m, side_by_side(inputs, names))

    found = law(Model(run, w=parameter(n, k), b=parameter(n)), **{f: (w,) for f, w in drawn.items()})
    before, after = found.flops()
    if min(request, impression, n) > 1:  # an einsum over one entry is no matrix product
        assert (before, after) == (2 * 12 * k * n, 2 * 3 * request * n + 2 * 12 * impression * n)


@few
@given(fields(), st.integers(2, 3))
def test_over_the_last_of_many_dims(law: Any, drawn: dict[str, int], length: int) -> None:
    request, impression = widths(drawn)
    names, k = list(drawn), request + impression

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return F.linear(side_by_side(inputs, names, 2), m.w).relu()

    found = law(Model(run, w=parameter(2, k)), **{f: (length, w) for f, w in drawn.items()})
    assert found.flops()[1] == 2 * length * 2 * (3 * request + 12 * impression)


@pytest.mark.parametrize("dims", [([1, 2], [0, 1]), ([2, 1], [1, 0]), ([1], [0])])
def test_dims_of_a_tensordot_are_flattened(law: Any, dims: tuple[list[int], list[int]]) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.tensordot(torch.cat([u, x], 1), m.w, dims).flatten(1)

    before, after = law(Model(run, w=parameter(5, 3, 2)), u=(3, 3), x=(2, 3)).flops()
    assert after * 60 == before * (3 * 3 + 12 * 2)


def test_linears_that_share_an_input_share_its_blocks(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([x[:, :2], u, x[:, 2:]], 1)
        return F.linear(h, m.v) * F.linear(h, m.w)

    found = law(Model(run, v=parameter(2, 7), w=parameter(2, 7)), u=(3,), x=(4,))
    assert found.flops() == (2 * 2 * 12 * 7 * 2, 2 * 2 * 2 * (3 * 3 + 12 * 4))


@pytest.mark.parametrize("between", ["softmax", "cumprod", "sort", "normalize"])
def test_declines_what_mixes_the_columns_first(law: Any, between: str) -> None:
    mixes = {
        "softmax": lambda h: h.softmax(1),
        "cumprod": lambda h: h.cumprod(1),
        "sort": lambda h: h.sort(1).values,
        "normalize": lambda h: F.normalize(h, dim=1).cumprod(1),
    }[between]

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(mixes(torch.cat([u, x], 1)), m.w)

    found = law(Model(run, w=parameter(2, 7)), u=(3,), x=(4,))
    assert found.flops() == (2 * 12 * 7 * 2,) * 2


def test_declines_a_weight_made_of_the_batch(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.cat([u, x], 1), F.linear(x, m.w)).softmax(1)

    law(Model(run, w=parameter(7, 4)), u=(3,), x=(4,))


def test_equal_sizes_are_not_confused(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)  # [B, 4, 4], cut along dim 1
        return (h @ m.w).flatten(1) @ m.v + (h.transpose(1, 2) @ m.w).sum((1, 2)).unsqueeze(1)

    law(Model(run, w=parameter(4, 4), v=parameter(16, 2)), u=(2, 4), x=(2, 4))


def test_dropout_in_training_stays_at_impressions(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.dropout(torch.cat([u, x], 1), 0.5, m.training), m.w)

    found = law(Model(run, w=parameter(2, 7)), training=True, u=(3,), x=(4,))
    assert found.flops() == (2 * 12 * 7 * 2,) * 2
