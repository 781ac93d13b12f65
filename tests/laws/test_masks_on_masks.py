"""Masks on top of each other: what one number fills stays one number, whatever the next mask says.

fill(fill(x, True, a), m, a)     =  fill(x, True, a)
op(fill(x, True, a))             =  fill(y, True, op(a))
all(cat[x, True], dim)           =  all(x, dim)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from law_parts import Model
from torch import Tensor

aten = torch.ops.aten
INF = float("inf")
LATER = torch.ones(4, 4, dtype=torch.bool).triu(1)


def padding(n: int) -> Tensor:
    """Rows all of padding among them."""
    return torch.rand(n, 3) < 0.5


def masks(u_pad: Tensor, x: Tensor) -> Tensor:
    return torch.cat([u_pad, torch.zeros(x.shape[0], 1, dtype=torch.bool)], 1).unsqueeze(1)


def blind_rows_are_zeros(scores: Tensor, h: Tensor) -> Tensor:
    blind = scores.isinf().all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(blind, 0.0) @ h


FILLS = {
    "order first": lambda s, pad, later: s.masked_fill(later, -INF).masked_fill(pad, -INF),
    "padding first": lambda s, pad, later: s.masked_fill(pad, -INF).masked_fill(later, -INF),
    "scaled between": lambda s, pad, later: (s.masked_fill(later, -INF) * 0.5).masked_fill(pad, -INF),
}


@pytest.mark.parametrize("name", sorted(FILLS))
def test_the_request_sees_itself_alone_under_two_masks(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        return blind_rows_are_zeros(FILLS[name](h @ h.transpose(1, 2), masks(u_pad, x), m.later), h)

    found = law(Model(run, later=LATER), u=(3, 4), u_pad=padding, x=(1, 4))
    moved = found.moved()
    assert {aten.softmax.int, aten.isinf.default, aten.all.dim} <= set(moved), moved


@pytest.mark.parametrize("lows", [(-1e9, -INF), (-INF, -1e9), (-1e9, -2e9)])
def test_low_numbers_of_two_kinds(law: Any, lows: tuple[float, float]) -> None:
    """Every row sees itself: neither number weighs anything."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        scores = (h @ h.transpose(1, 2)).masked_fill(m.later, lows[0])
        return scores.masked_fill((h.detach() > 9.0) & m.later, lows[1]).softmax(-1) @ h

    law(Model(run, later=LATER), u=(3, 4), x=(1, 4))


@pytest.mark.parametrize("low", [0.0, float("nan"), -10.0])
def test_declines_a_second_number_that_lets_the_impression_in(law: Any, low: float) -> None:
    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        scores = (h @ h.transpose(1, 2)).masked_fill(m.later, -INF).masked_fill(masks(u_pad, x), low)
        return scores.masked_fill(m.later & (u_pad[:, :1, None]), low).softmax(-1) @ h

    found = law(Model(run, later=LATER), u=(3, 4), u_pad=padding, x=(1, 4))
    assert aten.softmax.int not in found.moved()


@pytest.mark.parametrize("low", [-1e9, -INF])
def test_declines_rows_that_two_masks_leave_nothing(law: Any, low: float) -> None:
    """The first row sees nothing: where the numbers are finite it weighs what is banned after all."""

    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        scores = (h @ h.transpose(1, 2)).masked_fill(m.later, -1e9).masked_fill(masks(u_pad, x), low)
        return scores.softmax(-1) @ h

    found = law(Model(run, later=LATER), u=(3, 4), u_pad=padding, x=(1, 4))
    assert aten.softmax.int not in found.moved()


OPS = {
    "isinf": torch.isinf,
    "exp": torch.exp,
    "compared": lambda s: (s == -INF).to(s),
    "clamped": lambda s: s.clamp(min=-3.0),
    "as whole numbers": lambda s: s.clamp(min=-3.0).long().double(),
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_of_one_number(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        return OPS[name]((h @ h.transpose(1, 2)).masked_fill(m.later, -INF)).double().sum(-1)

    found = law(Model(run, later=LATER), u=(3, 4), x=(1, 4))
    assert aten.sum.dim_IntList in found.moved()


@pytest.mark.parametrize("how", ["all", "any", "prod"])
def test_entries_that_do_not_count(law: Any, how: str) -> None:
    """True among all, False among any and 1 in a product; the other number is counted as before."""

    def run(m: Model, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.cat([u, x], 1)
        scores = h @ h.transpose(1, 2)
        both = (scores.masked_fill(m.later, 1.0), scores.masked_fill(m.later, 0.0))
        if how == "prod":
            return tuple(s.prod(-1) for s in both)
        return tuple(getattr(s != 0, how)(-1) for s in both)

    law(Model(run, later=LATER), u=(3, 4), x=(1, 4))
