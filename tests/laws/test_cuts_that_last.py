"""A cut along a dim outlives what is done along other dims: merged rows, concatenations, broadcast products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor, nn

aten = torch.ops.aten
MERGED = {
    "batch first": lambda h, op: op(h.reshape(-1, h.shape[-1])).reshape(h.shape[0], h.shape[1], -1),
    "sequence first": lambda h, op: (
        op(h.transpose(0, 1).reshape(-1, h.shape[-1])).reshape(h.shape[1], h.shape[0], -1).transpose(0, 1)
    ),
    "heads regrouped": lambda h, op: op(h.unflatten(2, (2, -1)).flatten(0, 1).reshape(-1, h.shape[-1])).view(
        -1, h.shape[1], 3
    ),
}


@few
@given(st.sampled_from(sorted(MERGED)), st.integers(1, 3), st.integers(1, 2))
def test_rows_merged_with_the_batch(law: Any, how: str, length: int, targets: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return MERGED[how](torch.cat([u, x], 1), lambda h: m.second(F.linear(h, m.w).relu()).sigmoid())

    found = law(Model(run, w=parameter(6, 4), second=nn.Linear(6, 3)), u=(length, 4), x=(targets, 4))
    a_row = 2 * 6 * (4 + 3)
    assert found.flops() == (12 * (length + targets) * a_row, (3 * length + 12 * targets) * a_row)


def test_ids_flattened_and_looked_up(law: Any) -> None:
    """A history and its target in one vector of ids."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        rows = F.embedding(torch.cat([u, x.unsqueeze(1)], 1).flatten(), m.table)
        h = torch.cat([rows, rows * 2], 1).view(x.shape[0], -1, 8)
        return F.linear(h[:, :-1], m.w).sum(1) * F.linear(h[:, -1], m.w)

    model = Model(run, table=parameter(9, 4), w=parameter(6, 8))
    found = law(model, u=lambda n: torch.randint(9, (n, 3)), x=lambda n: torch.randint(9, (n,)))
    assert found.flops()[1] == 2 * 6 * 8 * (3 * 3 + 12)


def test_a_recurrent_cell_on_merged_rows(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1).view(-1, 4)
        return m.cell(F.linear(h, m.w), h).view(-1, 3, 4)

    found = law(Model(run, cell=nn.GRUCell(4, 4), w=parameter(4, 4)), u=(2, 4), x=(1, 4))
    assert aten.gru_cell.default in found.moved()


ACROSS = {
    "sorted": lambda m, h: h.sort(0).values,
    "summed along": lambda m, h: h.cumsum(0),
    "normalised over the rows": lambda m, h: h - h.mean(0),
    "turned round": lambda m, h: h.flip(0),
    "batch norm in training": lambda m, h: m.norm(h),
}


@pytest.mark.parametrize("name", sorted(ACROSS))
def test_declines_what_reads_other_rows(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(ACROSS[name](m, torch.cat([u, x], 1).view(-1, 4)), m.w).view(-1, 3, 6)

    norm = nn.BatchNorm1d(4, track_running_stats=False)
    found = law(Model(run, w=parameter(6, 4), norm=norm), u=(2, 4), x=(1, 4), training=name.startswith("batch"))
    assert aten.linear.default not in found.moved()


@few
@given(st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_a_concatenation_along_another_dim(law: Any, length: int, targets: int, constant: bool) -> None:
    """Positions, or another sequence of the same cut, beside each entry of a sequence."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        beside = m.places.repeat(x.shape[0], 1, 1) if constant else torch.cat([u.sin(), x], 1)
        return F.linear(torch.cat([h, beside], 2), m.w).relu().sum(1)

    places = torch.randn(1, length + targets, 4)
    found = law(Model(run, w=parameter(6, 8), places=places), u=(length, 4), x=(targets, 4))
    assert found.flops()[1] <= 2 * 6 * 8 * (3 * length + 12 * targets)


@few
@given(st.permutations(["u0", "u1", "x0", "u2", "x1", "u3", "x2"]), st.booleans())
def test_a_weight_for_each_field(law: Any, order: list[str], first: bool) -> None:
    """matmul over a dim of fields that the weight has and the batch has not."""

    def run(m: Model, **inputs: Tensor) -> Tensor:
        t = torch.stack([inputs[n] for n in order], 1)
        if first:
            return torch.matmul(m.w, t.unsqueeze(-1)).squeeze(-1)
        return torch.matmul(t.unsqueeze(2), m.w).squeeze(2) * t

    found = law(Model(run, w=parameter(7, 4, 4)), **dict.fromkeys(order, (4,)))
    assert found.flops()[1] == 2 * 4 * 4 * (4 * 3 + 3 * 12)


def test_one_weight_for_all_fields_in_a_dim_of_size_one(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.matmul(torch.cat([u, x], 1).unsqueeze(2), m.w).squeeze(2)

    found = law(Model(run, w=parameter(1, 4, 6)), u=(2, 4), x=(1, 4))
    assert found.flops()[1] == 2 * 4 * 6 * (3 * 2 + 12)


def test_pairs_by_an_index_that_is_a_parameter(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([u, x], 1)
        return F.linear(t.index_select(1, m.pairs[0]) * t.index_select(1, m.pairs[1]), m.w)

    pairs = nn.Parameter(torch.triu_indices(5, 5, 1), requires_grad=False)
    model = Model(run, w=parameter(6, 4), pairs=pairs)
    found = law(model, u=(3, 4), x=(2, 4))
    assert found.flops()[1] == 2 * 4 * 6 * (3 * 3 + 7 * 12)
    with torch.no_grad():
        model.pairs.copy_(model.pairs.flip(1))
    found.equal()
