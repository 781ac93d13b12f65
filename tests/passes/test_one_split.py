"""one_split: slices of one value become one split, where they lie apart and on one side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node

import roo_rewrite as roo
from passes.one_split import one_split
from roo_rewrite.facts import SIDE

aten = torch.ops.aten
LARGEST = 2**63 - 1


def sliced(*slices: tuple[Any, ...], sides: str = "") -> Graph:
    """x [3, 8], these slices (dim, start, end) of it, each doubled."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta = {"val": torch.zeros(3, 8), SIDE: "i"}
    outputs = []
    for (dim, *ends), side in zip(slices, sides or "i" * len(slices)):
        node = graph.call_function(aten.slice.Tensor, (x, dim, *ends))
        node.meta = {"val": x.meta["val"].narrow(dim, 0, 1), SIDE: side}
        outputs.append(graph.call_function(aten.mul.Tensor, (node, 2.0)))
    graph.output(tuple(outputs))
    return graph


def run(graph: Graph, x: Tensor) -> list[Tensor]:
    return list(Interpreter(nn.Module(), graph=graph).run(x))


def splits(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.target is aten.split_with_sizes.default]


@pytest.mark.parametrize(
    ("slices", "sizes"),
    [
        ([(1, 0, 4), (1, 4, 8)], [4, 4]),
        ([(1, 6, LARGEST), (1, 0, 2)], [2, 4, 2]),
        ([(-1, 1, 3), (1, -4, -2), (1, 1, 3)], [1, 2, 1, 2, 2]),
        ([(1, None, 1), (1, 1)], [1, 7]),
        ([(1, 3, 3), (1, 0, 1), (1, 1, 2)], [1, 1, 6]),
    ],
)
def test_slices_that_lie_apart(slices: list[Any], sizes: list[int]) -> None:
    graph, x = sliced(*slices), torch.randn(3, 8, requires_grad=True)
    want = run(graph, x)
    one_split(graph)
    graph.lint()
    assert [n.args[1] for n in splits(graph)] == [sizes]
    got = run(graph, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    grads = [torch.autograd.grad(sum((t**2).sum() for t in some), x)[0] for some in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "graph",
    [
        sliced((1, 0, 4)),
        sliced((1, 0, 4), (1, 3, 8)),
        sliced((1, 0, 4), (0, 1, 2)),
        sliced((1, 0, 4, 2), (1, 4, 8, 2)),
        sliced((1, 0, 4), (1, 4, 8), sides="ri"),
    ],
    ids=["one", "overlapping", "of two dims", "with a step", "on two sides"],
)
def test_others_stay(graph: Graph) -> None:
    before = str(graph)
    one_split(graph)
    assert str(graph) == before


def test_slices_of_a_value_that_is_written_into_stay() -> None:
    graph = sliced((1, 0, 4), (1, 4, 8))
    x = next(iter(graph.nodes))
    with graph.inserting_after(x):
        graph.call_function(aten.add_.Tensor, (x, 1.0))
    one_split(graph)
    assert not splits(graph)


def test_slices_of_slices() -> None:
    graph, x = sliced((1, 0, 4), (1, 4, 8)), torch.randn(3, 8)
    first = next(n for n in graph.nodes if n.target is aten.slice.Tensor)
    first.meta["val"] = torch.zeros(3, 4)
    *_, output = graph.nodes
    with graph.inserting_before(output):
        inner = [graph.call_function(aten.slice.Tensor, (first, 1, i, i + 1)) for i in range(2)]
    for node in inner:
        node.meta = {"val": torch.zeros(3, 1), SIDE: "i"}
    output.args = ((*output.args[0], *inner),)
    want = run(graph, x)
    one_split(graph)
    graph.lint()
    assert len(splits(graph)) == 2
    for a, b in zip(run(graph, x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_model_that_takes_fields_apart() -> None:
    class Fields(nn.Module):
        def forward(self, u: Tensor, x: Tensor) -> Tensor:
            h = torch.sigmoid(u) * torch.sigmoid(x)
            return torch.cat([h[:, 4:].sin(), h[:, :2].cos()], 1)

    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    made = roo.rewrite(Fields(), (torch.randn(6, 8), torch.randn(6, 8)), spec=spec, check=True)
    assert "split_with_sizes" in made.code
    assert "slice" not in made.code
    roo.verify(Fields(), made, batches=5)
