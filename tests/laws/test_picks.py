"""Entries in another order, more than once, masked, or with constants beside them: parts stay parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side
from torch import Tensor

ALONG = {
    "flip": lambda m, x, d: x.flip(d),
    "roll": lambda m, x, d: x.roll(2, d),
    "roll back": lambda m, x, d: x.roll((-1, 3), (d, d)),
    "narrow": lambda m, x, d: x.narrow(d, 1, x.shape[d] - 1),
    "chunk": lambda m, x, d: torch.cat(x.chunk(2, d)[::-1], d),
    "tensor_split": lambda m, x, d: torch.cat(x.tensor_split(2, d)[::-1], d),
    "split": lambda m, x, d: x.split(2, d)[0],
    "unbind": lambda m, x, d: torch.stack(x.unbind(d)[::-1], d),
    "index_select": lambda m, x, d: x.index_select(d, m.index),
    "index": lambda m, x, d: x[:, m.index] if d == 1 else x[..., m.index],
    "repeat": lambda m, x, d: x.repeat(*[2 if i == d else 1 for i in range(x.ndim)]),
    "tile": lambda m, x, d: x.tile(*[3 if i == d else 1 for i in range(x.ndim)]),
    "repeat_interleave": lambda m, x, d: x.repeat_interleave(2, d),
    "pad": lambda m, x, d: F.pad(x, (0, 0) * (x.ndim - 1 - d) + (1, 2)),
    "pad with ones": lambda m, x, d: F.pad(x, (0, 0) * (x.ndim - 1 - d) + (0, 1), value=1.0),
    "crop": lambda m, x, d: F.pad(x, (0, 0) * (x.ndim - 1 - d) + (-1, 2)),
    "crop the end": lambda m, x, d: F.pad(x, (0, 0) * (x.ndim - 1 - d) + (1, -1)),
    "crop both ends": lambda m, x, d: F.pad(x, (0, 0) * (x.ndim - 1 - d) + (-1, -1)),
    "masked_fill": lambda m, x, d: x.masked_fill(keep(m.v, x, d), 0.5),
    "where": lambda m, x, d: torch.where(keep(m.v, x, d), x, 0.0),
    "where else": lambda m, x, d: torch.where(keep(m.v, x, d), x, keep(m.v, x, d) * m.v[0]),
    "gather": lambda m, x, d: x.gather(d, gathered(m.index, x, d)),
    "gather one": lambda m, x, d: x.narrow(d, 0, 1).gather(d, torch.zeros_like(x).long().narrow(d, 0, 1).expand_as(x)),
}


def keep(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """A mask of a parameter, along `dim`."""
    return (v[: x.shape[dim]] > 0).view([-1 if i == dim else 1 for i in range(x.ndim)])


def gathered(index: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [len(index) if i == dim else n for i, n in enumerate(x.shape)]
    return index.view([-1 if i == dim else 1 for i in range(x.ndim)]).expand(shape)


@few
@given(fields(2, 4), st.sampled_from(sorted(ALONG)), st.sampled_from([1, 2]))
def test_along_the_cut_dim_and_another(law: Any, drawn: dict[str, int], name: str, dim: int) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return ALONG[name](m, side_by_side(inputs, names, 1), dim).sum((1, 2)).tanh()

    model = Model(run, v=parameter(16), index=torch.tensor([2, 0, 2, 1]))
    law(model, **{f: (w, 3) for f, w in drawn.items()})


@pytest.mark.parametrize("name", sorted(set(ALONG) - {"unbind", "split", "gather one"}))
def test_a_linear_map_that_follows_moves(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = ALONG[name](m, torch.cat([x, u, x.tanh()], 1), 1)
        return F.linear(h, m.w[:, : h.shape[1]])

    model = Model(run, w=parameter(1, 64), v=parameter(16), index=torch.tensor([5, 4, 4, 1, 7]))
    found = law(model, u=(5,), x=(2,))
    before, after = found.flops()
    assert after < before
    assert torch.ops.aten.linear.default in found.moved()


@pytest.mark.parametrize("name", ["repeat", "tile", "repeat_interleave"])
def test_copies_of_a_row_are_multiplied_once(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(ALONG[name](m, torch.cat([x, u], 1).unsqueeze(1), 1), m.w).tanh()

    found = law(Model(run, w=parameter(2, 7)), u=(5,), x=(2,))
    assert found.flops()[1] == 2 * 2 * (3 * 5 + 12 * 2)


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.pad(torch.cat([u, x], 1), (1, 2), value=0.3).roll(5, 1).repeat(1, 2), m.w)

    law(Model(run, w=parameter(3, 54)), u=(16,), x=(8,)).precise()


@pytest.mark.parametrize("case", ["index of the batch", "reflected", "gather by row"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        if case == "reflected":
            return F.linear(F.pad(h, (2, 1), mode="reflect"), m.v)
        index = (x[:, :3] > 0).long()
        return F.linear(h.gather(1, index) if case == "gather by row" else h[:, index[0]], m.w)

    found = law(Model(run, w=parameter(2, 3), v=parameter(2, 11)), u=(4,), x=(4,))
    before, after = found.flops()
    assert before == after
