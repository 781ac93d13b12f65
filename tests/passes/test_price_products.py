"""The price of a product taken in parts: large grids pay, small ones do not; and what its nodes are priced at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.annotate import Policy, annotate
from passes.normalize import normalize
from passes.price import Price
from passes.price_products import spent
from passes.split import Split, split
from roo_rewrite.capture import Captured
from roo_rewrite.cost import CPU, NOMINAL_IMPRESSIONS

Function = Callable[..., Any]
HEADS = "haid,hajd->haij"


def split_of(captured: Function, function: Function, fanout: float) -> tuple[Captured, Split]:
    """The trace, split where that pays, and what was considered."""
    trace, inputs = captured(function)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    return trace, split(trace, fanout)


def of_pairs(fields: int, dim: int, twice: bool = False) -> Function:
    """Products of every pair of 2 * fields fields, half of them the user's; or of the fields and twice the fields."""

    def model(m: Any, u: Tensor, x: Tensor) -> Tensor:
        sides = [side.repeat(1, fields * dim // 4).view(-1, fields, dim) for side in (u.exp(), x.exp())]
        every = torch.cat(sides, 1)
        return torch.bmm(every, (every + every if twice else every).transpose(1, 2))

    return model


def of_heads(m: Any, u: Tensor, x: Tensor) -> Tensor:
    """Scores of four fields in two heads, which come before the batch."""
    fields = torch.stack([u.exp(), u.tanh(), x.exp(), x.tanh()], 1).view(-1, 4, 2, 2).permute(2, 0, 1, 3)
    heads = torch.stack([f.squeeze(0) for f in fields.split(1)])
    return torch.einsum(HEADS, heads, heads)


@pytest.mark.parametrize(
    ("function", "fanout", "taken"),
    [(of_pairs(64, 64), 16.0, True), (of_pairs(64, 64, True), 1.0, False), (of_pairs(2, 2), 16.0, False)],
    ids=["large", "at fan-out 1", "small"],
)
def test_a_grid_of_products_is_taken_where_it_pays(
    captured: Function, function: Function, fanout: float, taken: bool
) -> None:
    trace, found = split_of(captured, function, fanout)
    (candidate,) = found.candidates
    assert candidate.taken is taken
    assert candidate.what == "product aten.bmm"
    assert (candidate.gain > 1) is taken
    assert sum("bmm" in str(n.target) for n in trace.graph.nodes) == (3 if taken else 1), (
        "those below the diagonal are transposed"
    )


def test_small_products_in_heads_stay_one(captured: Function) -> None:
    trace, found = split_of(captured, of_heads, 16.0)
    assert not any(c.taken for c in found.candidates)
    assert sum("einsum" in str(n.target) for n in trace.graph.nodes) == 1


def test_small_products_are_slower_than_their_flops_and_each_costs() -> None:
    price = Price(CPU, 16.0, 8, "priced")
    flops = 2 * 4 * 4 * 4 / CPU.product_flops_per_ns
    assert price.batched(10, 4, 4, 4) > 10 * 10 * flops
    assert price.batched(100, 4, 4, 4) == pytest.approx(10 * price.batched(10, 4, 4, 4))
    assert price.batched(10, 40, 4, 4) < 10 * price.batched(10, 4, 4, 4)  # rows of one matrix, not of ten


def test_rows_of_a_batch_are_priced_at_the_nominal_batch(captured: Function) -> None:
    trace, _ = split_of(captured, lambda m, u, x: torch.einsum("bi,eio->beo", x.exp(), torch.ones(3, 4, 5)), 16.0)
    product = next(n for n in trace.graph.nodes if "einsum" in str(n.target))
    flops = 2 * NOMINAL_IMPRESSIONS * 3 * 4 * 5 / CPU.product_flops_per_ns
    assert spent(Price(CPU, 16.0, trace.batch, "priced"), product) > flops


def test_experts_in_one_einsum_are_taken_apart(captured: Function) -> None:
    def experts(m: Any, u: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([u.repeat(1, 16), x.repeat(1, 16)], 1).exp()
        return torch.einsum("bi,eio->beo", both, torch.ones(3, 128, 16))

    _, found = split_of(captured, experts, 16.0)
    assert [c.taken for c in found.candidates if "einsum" in c.what] == [True]


def test_a_view_costs_nothing_and_a_copy_what_it_reads_and_writes(captured: Function) -> None:
    trace, _ = split_of(captured, lambda m, u, x: x[:, 1:3].exp(), 16.0)
    price = Price(CPU, 16.0, trace.batch, "priced")
    cut, exp = (next(n for n in trace.graph.nodes if name in str(n.target)) for name in ("slice", "exp"))
    assert spent(price, cut) == 0
    assert spent(price, exp) == pytest.approx(price.start(1) + price.move(exp.meta["val"].shape))
