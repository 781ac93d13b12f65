"""cumsum(cat[E a, c])      =  cat[E cumsum(a), cumsum(c) + sum(E a)]
group_norm(cat[E a, c])  =  cat[E group_norm(a), group_norm(c)]        cut between groups
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor, nn

aten = torch.ops.aten


@few
@given(fields(), st.booleans())
def test_running_sums_of_fields(law: Any, drawn: dict[str, int], along_columns: bool) -> None:
    names, k = list(drawn), sum(drawn.values())

    def run(m: Model, **inputs: Tensor) -> Tensor:
        x = side_by_side(inputs, names, 1)
        return F.linear(x.cumsum(1).transpose(1, 2) if along_columns else x.cumsum(-2).relu(), m.w)

    law(Model(run, w=parameter(2, k if along_columns else 3)), **{f: (n, 3) for f, n in drawn.items()})


def test_places_in_a_sequence_are_counted_once(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        seen = (torch.cat([u, x.unsqueeze(1)], 1)[..., 0] > 0).cumsum(1)
        return F.embedding(seen, m.w).tanh() @ m.v

    found = law(Model(run, w=parameter(8, 3), v=parameter(3, 2)), u=(4, 3), x=(3,))
    assert aten.cumsum.default in found.moved()
    assert found.flops() == (2 * 12 * 5 * 3 * 2, 2 * (3 * 4 + 12) * 3 * 2)


@pytest.mark.parametrize("case", ["a running product", "halves", "another dtype"])
def test_running_sums_that_stay(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        joined = torch.cat([u, x], 1)
        if case == "halves":
            return joined.bfloat16().cumsum(1).double()
        return joined.cumprod(1) if case == "a running product" else joined.cumsum(1, dtype=torch.float64)

    # The gradient of a broadcast of halves is a sum of halves.
    moved = law(Model(run), equal=case != "halves", u=(4,), x=(3,)).moved()
    assert not {aten.cumsum.default, aten.cumprod.default} & set(moved)


def _norm(kind: str, groups: int, channels: int) -> nn.Module:
    if kind == "instance":
        return nn.InstanceNorm1d(channels, affine=True)
    made = nn.GroupNorm(groups, channels)
    for p in made.parameters():
        nn.init.normal_(p)
    return made


@few
@given(fields(), st.sampled_from([1, 2, 3]), st.sampled_from(["group", "instance"]))
def test_groups_of_each_side_are_normed_by_themselves(law: Any, drawn: dict[str, int], each: int, kind: str) -> None:
    names, k = list(drawn), sum(widths(drawn))
    groups = k // each if k % each == 0 else k

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return F.linear(m.norm(side_by_side(inputs, names, 1)).flatten(1), m.w)

    law(Model(run, norm=_norm(kind, groups, k), w=parameter(2, 4 * k)), **{f: (n, 4) for f, n in drawn.items()})


@pytest.mark.parametrize(("groups", "request_columns"), [(9, 5), (3, 3), (1, 0)])
def test_the_linear_map_moves_too(law: Any, groups: int, request_columns: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(m.norm(torch.cat([u, x], 1)).flatten(1), m.w)

    found = law(Model(run, norm=_norm("group", groups, 9), w=parameter(2, 18)), u=(5, 2), x=(4, 2))
    assert found.flops()[1] == 2 * 4 * (3 * request_columns + 12 * (9 - request_columns))


def test_statistics_that_are_kept_stay(law: Any) -> None:
    norm = nn.InstanceNorm1d(5, track_running_stats=True)

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.norm(torch.cat([u, x], 1)).flatten(1)

    assert aten.instance_norm.default not in law(Model(run, norm=norm), u=(3, 4), x=(2, 4)).moved()
