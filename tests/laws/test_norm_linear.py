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


pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")  # of no rows
SPELLINGS = {
    "rms_norm": lambda m, x: F.rms_norm(x, (x.shape[-1],), m.g, 1e-3),
    "rms_norm plain": lambda m, x: F.rms_norm(x, (x.shape[-1],)),
    "rms by hand": lambda m, x: (
        (x.float() if x.dtype != torch.float64 else x.double())
        * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        * m.g
    ),
    "rms divided": lambda m, x: m.g * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3)),
    "var": lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt() * m.g,
    "std": lambda m, x: m.g * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) + m.h,
    "squares": lambda m, x: by_squares(x) * m.g + m.h,
    "var_mean": lambda m, x: by_var_mean(x) * m.g + m.h,
    "centred": lambda m, x: 0.5 * (x - x.mean(-1, keepdim=True)) - m.h,
    "length": lambda m, x: F.normalize(x, dim=-1) * m.g,
    "twice": lambda m, x: F.normalize(x, dim=-1) * x.pow(2).sum(-1, keepdim=True) / 3.0,
}


def by_squares(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-3)


def by_var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-3)


@few
@given(fields(), st.sampled_from(sorted(SPELLINGS)), st.booleans())
def test_however_it_is_spelled(law: Any, drawn: dict[str, int], spelling: str, deep: bool) -> None:
    request, impression = widths(drawn)
    names, k = list(drawn), request + impression

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return F.linear(SPELLINGS[spelling](m, side_by_side(inputs, names)), m.w, m.b).tanh()

    model = Model(run, w=parameter(1, k), b=parameter(1), g=parameter(k), h=parameter(k))
    shape = (2,) if deep else ()
    found = law(model, **{f: (*shape, w) for f, w in drawn.items()})
    assert any(t.startswith("linear") for t in found.took()) or k == 2  # the std of two entries


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_every_spelling_moves_the_linear_map(law: Any, spelling: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(SPELLINGS[spelling](m, torch.cat([x[:, :2], u, x[:, 2:]], 1)), m.w)

    found = law(Model(run, w=parameter(2, 9), g=parameter(9), h=parameter(9)), u=(5,), x=(4,))
    before, after = found.flops()
    assert after <= before - 2 * (12 - 3) * 5 * 2 + 2 * 2 * 9  # and W' h, once
    assert torch.ops.aten.linear.default in found.moved()


@pytest.mark.parametrize(
    ("name", "correction", "apart"),
    [("var", 0, True), ("std", 1, True), ("var_mean", 3, True), ("var", 9, False)],
)
def test_a_spread_is_made_of_those_of_each_side(law: Any, name: str, correction: int, apart: bool) -> None:
    """Unless nothing is left to divide by."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        found = getattr(torch, name)(torch.cat([x[:, :2], u, x[:, 2:]], 1), 1, correction=correction)
        return (found if isinstance(found, Tensor) else found[0] + 2 * found[1]).tanh()

    found = law(Model(run), u=(5,), x=(4,))
    assert (torch.ops.aten.mean.dim in found.moved()) is apart
    assert (f"aten.{name}." not in found.code()) is apart


def test_rows_of_zeros_keep_their_gradients(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u * 0, x * 0], 1)
        return F.linear(F.normalize(h, dim=1), m.w) + F.linear(
            (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1), m.w
        )

    law(Model(run, w=parameter(2, 7)), u=(3,), x=(4,))


@pytest.mark.parametrize("spelling", ["rms_norm", "std", "squares", "length", "var_mean"])
def test_low_precision_is_as_good_as_the_original(law: Any, spelling: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(SPELLINGS[spelling](m, torch.cat([u + 3, x], 1)), m.w)

    law(Model(run, w=parameter(2, 24), g=parameter(24), h=parameter(24)), u=(16,), x=(8,)).precise()


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


@pytest.mark.parametrize("case", ["two dims", "dropout", "softmax", "by column"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        if case == "softmax":
            return F.linear(F.rms_norm(h.flatten(1), (20,)).softmax(1), m.v)
        if case == "by column":  # the factor is no constant
            return F.linear(F.rms_norm(h.flatten(1), (20,)) * x.flatten(1).repeat(1, 3)[:, :20], m.v)
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
