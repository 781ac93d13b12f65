"""sum_hm q[h] k[m] W[h, m, n]  =  sum_h q[h] (sum_m k[m] W[h, m, n])        k: the request's

With a weight for each position of the history, as in activation units that flatten the outer product of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, parameter
from torch import Tensor

HISTORY, COLUMNS = 4, 3
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "target first": lambda q, k: torch.einsum("bfi,bfj->bfij", q, k).flatten(2),
    "history first": lambda q, k: (k.unsqueeze(3) * q.unsqueeze(2)).flatten(2),
}
WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a weight for each position": lambda x, w: torch.einsum("btk,tkn->btn", x, w),
    "the weight first": lambda x, w: torch.einsum("tkn,btk->bnt", w, x),
    "positions are summed": lambda x, w: torch.einsum("btk,tkn->bn", x, w),
    "one weight": lambda x, w: torch.einsum("btk,kn->btn", x, w[0]),
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


@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_no_outer_product_meets_the_weight(law: Any, product: str) -> None:
    q, k = 8, 8
    found = law(
        Model(_unit(product, "a weight for each position"), w=parameter(HISTORY, _width(q, k), COLUMNS)),
        u=(HISTORY, k),
        x=(q,),
    )
    requests, impressions, each = 3, 12, 2 * HISTORY * COLUMNS
    inside = requests * each * q * k + impressions * each * q
    beside = requests * each * k + impressions * each * q
    assert found.flops() == (impressions * each * _width(q, k), inside + beside)


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    run = _unit("target first", "a weight for each position")
    law(Model(run, w=parameter(HISTORY, _width(8, 8), COLUMNS)), u=(HISTORY, 8), x=(8,)).precise()


@pytest.mark.parametrize("case", ["the impression's weight", "a product of one side", "entries, not pairs"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        q = x.unsqueeze(1).repeat(1, HISTORY, 1)
        if case == "entries, not pairs":
            return torch.einsum("btk,tkn->btn", torch.cat([q * u, u], 2), m.w[:, :6]).tanh()
        if case == "a product of one side":
            flat = torch.cat([PRODUCTS["target first"](q, q), u], 2)
            return torch.einsum("btk,tkn->btn", flat, m.w[:, :12]).tanh()
        flat = torch.cat([PRODUCTS["target first"](q, u), u], 2)
        return torch.einsum("btk,bkn->btn", flat, x.repeat(1, 12).view(-1, 12, 3)).tanh()

    found = law(Model(run, w=parameter(HISTORY, 15, COLUMNS)), u=(HISTORY, 3), x=(3,))
    assert "[4, 3, 3" not in found.code()
