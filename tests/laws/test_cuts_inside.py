"""A reshape whose groups the cut falls inside of: what lies before it is the request's, that group is cut again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from law_parts import Model, parameter
from torch import Tensor

aten = torch.ops.aten


@pytest.mark.parametrize(("length", "targets"), [(5, 3), (3, 5), (6, 2), (1, 3)])
def test_heads_made_of_fields(law: Any, length: int, targets: int) -> None:
    """Rows regrouped with the batch without a transpose: a head is half of the fields."""
    n = length + targets

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1).view(-1, n, 2)
        weights = (h @ h.transpose(1, 2)).softmax(-1)
        return F.linear((weights @ h).view(-1, n, 4), m.w)

    found = law(Model(run, w=parameter(6, 4)), u=(length, 4), x=(targets, 4))
    scores, a_row = 2 * 2 * n * n * 2, 2 * 4 * 6
    before, after = found.flops()
    early = length // (n // 2)  # heads, and so fields after, of the request alone
    assert before == 12 * (2 * scores + n * a_row)
    assert after <= before - 9 * early * (scores + n // 2 * a_row)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (3, 2, 4), (4, 6)])
def test_groups_by_a_view(law: Any, shape: tuple[int, ...]) -> None:
    """Six fields of four, cut at some field, in groups that are not whole fields, or not divided there."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.cat([u, x], 1).reshape(-1, *shape).tanh(), m.w).relu()

    for length in (4, 5):
        found = law(Model(run, w=parameter(3, shape[-1])), u=(length, 4), x=(6 - length, 4))
        assert aten.linear.default in found.moved()
        early = length * 4 // shape[-1] * shape[-1]  # entries in rows of the request alone
        before, after = found.flops()
        assert after <= before - 9 * 2 * 3 * early


def test_between_two_sides_of_the_impression(law: Any) -> None:
    def run(m: Model, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return F.linear(torch.cat([x, u, y], 1).reshape(-1, 4, 6), m.w)

    found = law(Model(run, w=parameter(3, 6)), x=(1, 4), u=(4, 4), y=(1, 4))
    assert found.flops()[1] <= 2 * 3 * (12 * 12 + 3 * 12) + 2 * 3 * 12 * (2 + 2)


def test_declines_many_runs_and_a_group_across_rows(law: Any) -> None:
    def many(m: Model, u: Tensor, x: Tensor) -> Tensor:
        fields = [f for pair in zip(u.split(1, 1), x.split(1, 1)) for f in pair]
        return F.linear(torch.cat(fields, 1).reshape(-1, 2, 12), m.w)

    def across(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.cat([u, x], 0).reshape(2, -1, 4), m.w).reshape(u.shape[0], -1)

    for run, width in ((many, 12), (across, 4)):
        found = law(Model(run, w=parameter(3, width)), u=(3, 4), x=(3, 4))
        assert aten.linear.default not in found.moved()
