"""bmm(T, T'), T = cat[E a, c]: the block of the request with itself once per request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor

SPELLINGS = {
    "bmm": lambda t: torch.bmm(t, t.transpose(1, 2)),
    "matmul": lambda t: t @ t.transpose(-1, -2),
    "einsum": lambda t: torch.einsum("bik,bjk->bij", t, t),
}


@few
@given(fields(), st.sampled_from(sorted(SPELLINGS)), st.booleans())
def test_the_request_block_moves(law: Any, drawn: dict[str, int], spelling: str, triangle: bool) -> None:
    request, impression = widths(drawn)
    names, n = list(drawn), request + impression
    rows, columns = torch.triu_indices(n, n, 1)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        pairs = SPELLINGS[spelling](side_by_side(inputs, names, 1))
        return pairs[:, m.rows, m.columns] if triangle and n > 1 else pairs

    found = law(Model(run, rows=rows, columns=columns), **{f: (w, 5) for f, w in drawn.items()})
    before, after = found.flops()
    assert before == 2 * 12 * n * n * 5
    assert after <= before - 2 * (12 - 3) * request * request * 5


def test_pairs_into_a_linear_map(law: Any) -> None:
    rows, columns = torch.triu_indices(5, 5, 1)

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([x[:, :1], u, x[:, 1:]], 1)
        return (t @ t.transpose(1, 2))[:, m.rows, m.columns] @ m.w

    found = law(Model(run, rows=rows, columns=columns, w=parameter(10, 2)), u=(3, 4), x=(2, 4))
    before, after = found.flops()
    assert after <= before - 2 * 9 * (9 * 4 + 3 * 2)


@pytest.mark.parametrize("names", [["u0", "u1", "x"], ["x0", "u0", "x1", "u1", "u2"]])
def test_outer_products_of_fields_weighed_by_scores(law: Any, names: list[str]) -> None:
    n, request = len(names), sum(f[0] == "u" for f in names)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        t = side_by_side(inputs, names, 1)
        scores = (t @ t.transpose(1, 2)).unsqueeze(-1)
        return (torch.einsum("bnd,bmd->bnmd", t, t).tanh() * scores).flatten(1) @ m.w

    found = law(Model(run, w=parameter(n * n * 3, 2)), **dict.fromkeys(names, (1, 3)))
    before, after = found.flops()
    assert after <= before - 2 * 9 * request * request * (3 + 3 * 2)


def test_an_outer_product_of_both_sides_is_not_cut(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return (u.unsqueeze(2) * x.unsqueeze(1)).tanh() @ m.w

    moved = law(Model(run, w=parameter(4, 2)), u=(3, 4), x=(2, 4)).moved()
    assert torch.ops.aten.tanh.default not in moved


@pytest.mark.parametrize("all_pairs", [True, False])
def test_outer_products_of_listed_pairs_into_a_linear_map(law: Any, all_pairs: bool) -> None:
    """Without a pair of the request alone nothing is cut."""
    rows, columns = torch.cartesian_prod(torch.arange(4), torch.arange(4)).t() if all_pairs else ([0, 3, 1], [2, 0, 3])

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([u, x], 1)
        products = torch.einsum("bnh,bnd->bnhd", t[:, m.rows], t[:, m.columns])
        return products.permute(0, 2, 3, 1) @ m.w

    rows, columns = torch.as_tensor(rows), torch.as_tensor(columns)
    found = law(Model(run, rows=rows, columns=columns, w=parameter(len(rows), 2)), u=(2, 3), x=(2, 3))
    before, after = found.flops()
    assert after == before - (9 * 2 * 9 * 4 * 2 if all_pairs else 0)


def test_explicit_pairs(law: Any) -> None:
    rows, columns = torch.triu_indices(5, 5, 1)

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([u, x], 1)
        return (t[:, m.rows] * t[:, m.columns]).sum(-1)

    assert law(Model(run, rows=rows, columns=columns), u=(3, 4), x=(2, 4)).moved()


def test_explicit_pairs_listed_in_forward(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([x, u], 1)
        rows, columns = torch.triu_indices(5, 5, 1)
        return ((t @ m.w)[:, rows] * t[:, columns]).flatten(1).tanh() @ m.out

    before, after = law(Model(run, w=parameter(4, 4), out=parameter(40, 2)), u=(3, 4), x=(2, 4)).flops()
    assert after <= before - 2 * 9 * (3 * 4 * 4 + 3 * 4 * 2)


def test_bilinear_pairs(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([u, x], 1)
        return torch.einsum("bik,kl,bjl->bij", t, m.w, t)

    law(Model(run, w=parameter(4, 4)), u=(3, 4), x=(2, 4))


@pytest.mark.parametrize(
    "equation", ["bik,bjk->b", "bik,bjk->ij", "bik,cjk->bc", "bik,bik->bi", "bii,bij->bj", "bik,bkj->bij"]
)
def test_other_einsums_stay_equal(law: Any, equation: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        t = torch.cat([u, x], 1)
        return torch.einsum(equation, t, t).softmax(-1)

    law(Model(run), u=(3, 5), x=(2, 5))


def test_a_contracted_dim_of_one_is_broadcast(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bik,bkj->bij", x[:, :, :1], torch.cat([u, x], 1))

    law(Model(run), u=(3, 4), x=(2, 4))


def test_index_vectors_that_broadcast(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.cat([u, x], 1)[:, torch.tensor([0, -1, 3]), torch.tensor([1])]

    law(Model(run), u=(3, 4), x=(2, 4))
