"""linear(layer_norm(cat[E a, c])): sums and squared sums per part, affine after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor


@few
@given(fields(), st.booleans(), st.booleans(), st.booleans())
def test_statistics_are_combined(law: Any, drawn: dict[str, int], affine: bool, bias: bool, training: bool) -> None:
    request, impression = widths(drawn)
    names, k = list(drawn), request + impression
    parts = {"g": parameter(k), "h": parameter(k)} if affine else {}
    if bias:
        parts["b"] = parameter(3)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        normed = F.layer_norm(
            side_by_side(inputs, names), (k,), m.g if affine else None, m.h if affine else None, eps=1e-3
        )
        return F.linear(normed, m.w, m.b if bias else None).relu()

    model = Model(run, w=parameter(3, k), **parts)
    found = law(model, training=training, **{f: (w,) for f, w in drawn.items()})
    if request > 3:  # a narrower input is cheaper to broadcast than its product
        assert found.flops()[1] <= 2 * 3 * (3 * request + 12 * impression) + 2 * 3 * k  # and W' h, once


def test_a_norm_that_others_read_too(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = F.layer_norm(torch.cat([u, x], 1), (7,))
        return F.linear(h, m.w) + h.relu().sum(1, keepdim=True)

    law(Model(run, w=parameter(2, 7)), u=(3,), x=(4,))


def test_constant_rows_keep_their_precision(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(torch.cat([u * 1e-3 + 1e3, x * 1e-3 + 1e3], 1), (7,)), m.w)

    found = law(Model(run, w=parameter(2, 7)), equal=False, u=(3,), x=(4,))
    counts = [2, 0, 3]
    batch = found.batch(counts)
    want = found.original(**found.expand(batch, counts))
    got = found.model(**batch, num_impressions=torch.tensor(counts))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["two dims", "dropout"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        if case == "two dims":
            return F.linear(F.layer_norm(h, (5, 4)), m.w)
        return F.linear(F.dropout(F.layer_norm(h.flatten(1), (20,)), 0.5, m.training), m.v)

    model = Model(run, w=parameter(2, 4), v=parameter(2, 20))
    found = law(model, training=True, u=(3, 4), x=(2, 4))
    before, after = found.flops()
    assert before == after


def test_a_norm_over_another_dim_is_taken_block_by_block(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(torch.cat([x, u], 1), (4,)), m.w)

    found = law(Model(run, w=parameter(2, 4)), u=(3, 4), x=(2, 4))
    assert found.flops() == (2 * 12 * 5 * 4 * 2, 2 * 4 * 2 * (3 * 3 + 12 * 2))
    assert torch.ops.aten.layer_norm.default in found.moved()
