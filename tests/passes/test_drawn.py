"""Masks are those of the original, however a value came to lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import roo_rewrite as roo
from passes.drawn import in_order

aten = torch.ops.aten
ORDERS = [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)]


def lying(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x` with its dims in memory in this order, outermost first."""
    back = [order.index(d) for d in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def graph_of(traced: Tensor, target: Any, *more: Any) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    drawn = graph.call_function(target, (x, *more))
    x.meta["val"] = drawn.meta["val"] = traced
    graph.output(drawn)
    return graph


def run(graph: Graph, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    made: Tensor = GraphModule(nn.Module(), graph)(x)
    return made


@pytest.mark.parametrize(("target", "more"), [(aten.dropout.default, (0.5, True)), (aten.rand_like.default, ())])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("found", ORDERS)
def test_draws_in_the_traced_order(
    target: Any, more: tuple[Any, ...], order: tuple[int, ...], found: tuple[int, ...]
) -> None:
    x = torch.randn(4, 3, 5)
    graph = graph_of(lying(x, order), target, *more)
    want = run(graph, lying(x, order))
    in_order(graph)
    assert torch.equal(run(graph, lying(x, found)), want)


def test_a_row_picked_from_a_wider_value_draws_as_one_that_stands_alone() -> None:
    wide = torch.randn(5, 4, 3).transpose(0, 1)[:, 2]
    graph = graph_of(wide, aten.dropout.default, 0.5, True)
    want = run(graph, wide)
    in_order(graph)
    assert torch.equal(run(graph, lying(wide.clone(), (1, 0))), want)


@pytest.mark.parametrize("more", [(0.5, False), (0.0, True)])
def test_what_draws_nothing_is_left_alone(more: tuple[Any, ...]) -> None:
    graph = graph_of(torch.randn(3, 4), aten.dropout.default, *more)
    before = str(graph)
    in_order(graph)
    assert str(graph) == before


class Noisy(nn.Module):
    """Noise in the shape, and the order, of a value of the request that lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.rand_like(torch.relu(self.a(u)).T).T * x


def test_the_check_after_each_pass_draws_in_the_traced_order() -> None:
    u, x = torch.randn(2, 5, 4)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    roo.rewrite(Noisy(), (u, x), spec=spec, check=True)
