"""bmm(E K, q)  =  jagged_bmm(K, q, offsets): K stays at R rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few
from torch import Tensor

PRODUCTS = {
    "bmm": lambda k, q: torch.bmm(k, q.unsqueeze(2)).squeeze(2),
    "matmul": lambda k, q: q.unsqueeze(1) @ k.transpose(1, 2),
    "einsum": lambda k, q: torch.einsum("btd,bd->bt", k, q),
    "sum": lambda k, q: (k * q.unsqueeze(1)).sum(-1),
    "attention": lambda k, q: F.scaled_dot_product_attention(q.unsqueeze(1), k, k),
}


@few
@given(st.sampled_from(sorted(PRODUCTS)), st.integers(2, 5), st.booleans())
def test_keys_are_not_copied(law: Any, spelling: str, length: int, weighted: bool) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        keys = (u * 2).tanh()
        scores = PRODUCTS[spelling](keys, x)
        if not weighted or spelling == "attention":
            return scores
        return (scores.reshape(-1, 1, length).softmax(-1) @ keys).squeeze(1)

    found = law(Model(run), u=(length, 4), x=(4,))
    assert "jagged_einsum" in found.code()
    assert "index_select" not in found.code()


@pytest.mark.parametrize("kind", ["flags", "floats", "heads"])
def test_a_row_that_sees_nothing_gets_zero(law: Any, kind: str) -> None:
    """As in the fused op: a request with an empty history."""

    def run(m: Model, u: Tensor, u_seen: Tensor, x: Tensor) -> Tensor:
        mask = u_seen.unsqueeze(1)
        if kind == "floats":
            mask = torch.zeros(mask.shape, dtype=u.dtype).masked_fill(~mask, float("-inf"))
        if kind == "heads":
            split = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (x.unsqueeze(1), u)]
            return F.scaled_dot_product_attention(split[0], split[1], split[1], attn_mask=mask.unsqueeze(1))
        return F.scaled_dot_product_attention(x.unsqueeze(1), u, u, attn_mask=mask)

    law(Model(run), u=(3, 4), u_seen=lambda n: torch.rand(n, 3) < 0.3, x=(4,))


UNFIT = {
    "all dims": lambda u, x: torch.sum(u * x, dim=[]) + x,
    "integers": lambda u, x: ((u * 9).int() * (x * 9).int()).sum(1),
    "flags": lambda u, x: ((u > 0) * (x > 0)).sum(1),
    "mixed": lambda u, x: ((u * 9).long() * x).sum(1) + (u * (x > 0)).sum(1),
    "other dtype": lambda u, x: (u * x).sum(1, dtype=torch.float32),
    "keepdim": lambda u, x: (u * x).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", sorted(UNFIT))
def test_declines_what_is_no_product_of_floats(law: Any, name: str) -> None:
    found = law(Model(lambda m, u, x: UNFIT[name](u, x)), u=(4,), x=(4,))
    assert "jagged_einsum" not in found.code()
