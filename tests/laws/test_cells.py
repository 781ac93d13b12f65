"""gru_cell(x, h): the products of input and state run by side, the gates per impression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few
from torch import Tensor, nn

BY_SIDE = "recurrent cell: products by side"


def cell(width: int, size: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.GRUCell(width, size, bias)


def _fields(m: Model, order: list[str], inputs: dict[str, Tensor]) -> Tensor:
    """Each field a row: the state is its own, the input what it hears of the others."""
    h = torch.stack([inputs[n] for n in order], 1)
    heard = (h - h.mean(1, keepdim=True)).tanh()
    size = h.shape[-1]
    return m.cell(heard.view(-1, size), h.view(-1, size)).view(-1, len(order), size)


@few
@given(st.permutations(["u0", "x0", "u1", "u2"]), st.booleans())
def test_rows_of_both_sides(law: Any, order: list[str], bias: bool) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        return _fields(m, order, inputs)

    found = law(Model(run, cell=cell(3, 3, bias)), **dict.fromkeys(sorted(order), (3,)))
    assert BY_SIDE in found.took()


def test_the_states_of_the_request_meet_their_weight_once(law: Any) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        return _fields(m, list(inputs), inputs)

    found = law(Model(run, cell=cell(16, 16)), u0=(16,), u1=(16,), x0=(16,))
    each = 2 * 16 * 48
    assert found.flops() == (12 * 2 * 3 * each, 12 * 3 * each + 12 * each + 3 * 2 * each)


@few
@given(st.booleans(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_input_and_state_of_two_sides(law: Any, state: bool, width: int, size: int, bias: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.cell(x, u) if state else m.cell(u, x)

    shapes = {"u": (size,), "x": (width,)} if state else {"u": (width,), "x": (size,)}
    assert BY_SIDE in law(Model(run, cell=cell(width, size, bias)), **shapes).took()


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return m.cell(x, u)

    law(Model(run, cell=cell(8, 16)), u=(16,), x=(8,)).precise()


@pytest.mark.parametrize("case", ["of the impression", "of the request", "weights of the impression"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        if case == "weights of the impression":
            return torch.gru_cell(u[:6], u[:6], x.sum() * m.cell.weight_ih, m.cell.weight_hh).sum() + x
        side = x if case == "of the impression" else u
        return m.cell(side, side.tanh()) + x + u

    assert BY_SIDE not in law(Model(run, cell=cell(3, 3)), u=(3,), x=(3,)).took()
