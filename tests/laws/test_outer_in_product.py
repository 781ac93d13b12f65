"""sum_hm q[h] k[m] W[h, m, n]  =  sum_h q[h] (sum_m k[m] W[h, m, n])        k: the request's

With a weight for each position of the history or one for all, as in activation units that flatten the outer product of
the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

HISTORY, COLUMNS = 4, 3
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "target first": lambda q, k: torch.einsum("bfi,bfj->bfij", q, k).flatten(2),
    "history first": lambda q, k: (k.unsqueeze(3) * q.unsqueeze(2)).flatten(2),
    "a target of one row": lambda q, k: (q[:, :1].unsqueeze(3) * k.unsqueeze(2)).view(*k.shape[:2], -1),
    "columns times rows": lambda q, k: (k.unsqueeze(3) @ q.unsqueeze(2)).flatten(2),
}
WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a weight for each position": lambda x, w: torch.einsum("btk,tkn->btn", x, w),
    "the weight first": lambda x, w: torch.einsum("tkn,btk->bnt", w, x),
    "positions are summed": lambda x, w: torch.einsum("btk,tkn->bn", x, w),
    "one weight": lambda x, w: torch.einsum("btk,kn->btn", x, w[0]),
    "a linear map": lambda x, w: F.linear(x, w[0].t()),
}


def _unit(product: str, weighed: str, order: tuple[int, ...] = (0, 1, 2)) -> Callable[..., Tensor]:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        q = x.unsqueeze(1).repeat(1, HISTORY, 1)
        parts = [PRODUCTS[product](q, u), q, u]
        return WEIGHED[weighed](torch.cat([parts[i] for i in order], 2), m.w).tanh()

    return run


def _width(q: int, k: int) -> int:
    return q * k + q + k


@few
@given(
    st.sampled_from(sorted(PRODUCTS)),
    st.sampled_from(sorted(WEIGHED)),
    st.permutations([0, 1, 2]),
    st.integers(2, 4),
    st.integers(2, 4),
)
def test_the_requests_factor_goes_into_the_weight(
    law: Any, product: str, weighed: str, order: list[int], q: int, k: int
) -> None:
    weight = parameter(HISTORY, _width(q, k), COLUMNS)
    law(Model(_unit(product, weighed, tuple(order)), w=weight), u=(HISTORY, k), x=(q,))


@pytest.mark.parametrize("weighed", ["a weight for each position", "a linear map"])
@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_no_outer_product_meets_the_weight(law: Any, product: str, weighed: str) -> None:
    q, k = 8, 8
    unit = Model(_unit(product, weighed), w=parameter(HISTORY, _width(q, k), COLUMNS))
    requests, impressions, each = 3, 12, 2 * HISTORY * COLUMNS
    inside = requests * each * q * k + impressions * each * q
    shared = HISTORY if weighed == "a linear map" else 1  # the target's row, once for all positions
    beside = requests * each * k + impressions * each * q // shared
    assert law(unit, u=(HISTORY, k), x=(q,)).flops()[1] == inside + beside


@pytest.mark.parametrize("spelled", ["einsum", "bmm", "mul"])
def test_an_outer_product_of_two_vectors(law: Any, spelled: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        if spelled == "einsum":
            return F.linear(torch.einsum("bi,bj->bij", u, x).flatten(1), m.w)
        rows, columns = u.unsqueeze(2), x.unsqueeze(1)
        return F.linear((torch.bmm(rows, columns) if spelled == "bmm" else rows * columns).flatten(1), m.w)

    assert law(Model(run, w=parameter(4, 30)), u=(10,), x=(3,)).flops()[1] == 2 * 3 * 30 * 4 + 2 * 12 * 3 * 4


@pytest.mark.parametrize("weighed", ["a weight for each position", "a linear map"])
def test_low_precision_is_as_good_as_the_original(law: Any, weighed: str) -> None:
    run = _unit("target first", weighed)
    law(Model(run, w=parameter(HISTORY, _width(8, 8), COLUMNS)), u=(HISTORY, 8), x=(8,)).precise()


@pytest.mark.parametrize(
    "case", ["the impression's weight", "a product of one side", "some of the pairs", "entries, not pairs"]
)
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        q = x.unsqueeze(1).repeat(1, HISTORY, 1)
        if case == "entries, not pairs":
            return torch.einsum("btk,tkn->btn", torch.cat([q * u, u], 2), m.w[:, :6]).tanh()
        if case == "some of the pairs":
            return F.linear(PRODUCTS["target first"](q, u)[..., 1:], m.w[0, :8].t()).tanh()
        if case == "a product of one side":
            flat = torch.cat([PRODUCTS["target first"](q, q), u], 2)
            return torch.einsum("btk,tkn->btn", flat, m.w[:, :12]).tanh()
        flat = torch.cat([PRODUCTS["target first"](q, u), u], 2)
        return torch.einsum("btk,bkn->btn", flat, x.repeat(1, 12).view(-1, 12, 3)).tanh()

    found = law(Model(run, w=parameter(HISTORY, 15, COLUMNS)), u=(HISTORY, 3), x=(3,))
    assert "[4, 3, 3" not in found.code()
