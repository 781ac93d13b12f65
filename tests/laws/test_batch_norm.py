"""batch_norm(cat[E a, c])  =  cat[batch_norm(E a), batch_norm(c)], each channel by its own statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor, nn

batch_norm = torch.ops.aten.batch_norm.default


def norm(channels: int, **options: Any) -> nn.Module:
    made = nn.BatchNorm1d(channels, **options)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    if made.running_mean is not None:
        made.running_mean.copy_(torch.linspace(-1, 1, channels))
        made.running_var.copy_(torch.linspace(0.5, 2, channels))
    return made


@few
@given(fields(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_each_side_is_normed_by_itself(
    law: Any, drawn: dict[str, int], training: bool, affine: bool, tracked: bool, deep: bool
) -> None:
    names, k = list(drawn), sum(widths(drawn))

    def run(m: Model, **inputs: Tensor) -> Tensor:
        normed = m.norm(side_by_side(inputs, names, 1)).relu()
        return F.linear(normed.transpose(1, 2) if deep else normed, m.w)

    model = Model(run, norm=norm(k, affine=affine, track_running_stats=tracked), w=parameter(1, k))
    shape = (3,) if deep else ()
    found = law(model, training=training or not tracked, **{f: (w, *shape) for f, w in drawn.items()})
    assert any(t.startswith("batch norm") for t in found.took())


@pytest.mark.parametrize("training", [False, True])
def test_the_linear_map_moves_too(law: Any, training: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(m.norm(torch.cat([u, x], 1)), m.w)

    found = law(Model(run, norm=norm(9), w=parameter(2, 9)), training=training, u=(5,), x=(4,))
    assert found.flops() == (2 * 12 * 9 * 2, 2 * 2 * (3 * 5 + 12 * 4))
    assert training or batch_norm in found.moved()


@few
@given(st.permutations(["u0", "x0", "u1", "x1"]), st.booleans())
def test_running_statistics_are_those_over_the_impressions(law: Any, order: list[str], twice: bool) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        h = side_by_side(inputs, order)
        h = m.norm(h) + m.norm(h) if twice else m.norm(h)
        return F.linear(h, m.w)

    found = law(Model(run, norm=norm(12), w=parameter(2, 12)), training=True, **dict.fromkeys(sorted(order), (3,)))
    counts = [2, 0, 5, 1]
    batch, twin = found.batch(counts), copy.deepcopy(found.original)
    twin(**found.expand(batch, counts))
    found.model(**batch, num_impressions=torch.tensor(counts))
    for name, want in twin.named_buffers():
        torch.testing.assert_close(found.original.get_buffer(name), want)


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(m.norm(torch.cat([u, x], 1)), m.w)

    for training in (False, True):
        law(Model(run, norm=norm(24), w=parameter(2, 24)), training=training, u=(16,), x=(8,)).precise()


@pytest.mark.parametrize("case", ["groups", "instance", "the batch is cut"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        if case == "groups":
            return F.group_norm(h, 1)
        if case == "instance":
            return F.instance_norm(torch.cat([u, x], 2), use_input_stats=True)
        return F.batch_norm(h.transpose(0, 1), None, None, training=True)[:, :2].sum() + h

    assert not any(t.startswith("batch norm") for t in law(Model(run), u=(3, 4), x=(3, 4)).took())
