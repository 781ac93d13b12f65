"""lookups: rows of one table that are put side by side are looked up together, gradients as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Interpreter, Node

from passes.lookups import together
from roo_rewrite.facts import SIDE

aten = torch.ops.aten


class Tables(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.arange(12.0).view(6, 2))
        self.second = torch.nn.Parameter(torch.ones(6, 2))


def lookups(tables: str, dim: int = 1, *rest: Any, **change: Any) -> Graph:
    """cat of lookups of x and y [3, 2] in turn. side, read: that of the last, and whether it is read once more."""
    graph, made = Graph(), list[Node]()
    inputs = [graph.placeholder(name) for name in ("x", "y")]
    for node in inputs:
        node.meta = {"val": torch.zeros(3, 2, dtype=torch.long), SIDE: "late"}
    weights = {"f": graph.get_attr("first"), "s": graph.get_attr("second")}
    for weight in weights.values():
        weight.meta = {"val": torch.ones(6, 2), SIDE: "late"}
    for i, table in enumerate(tables):
        made.append(graph.call_function(aten.embedding.default, (weights[table], inputs[i % 2], *rest)))
        made[-1].meta = {"val": torch.ones(3, 2, 2), SIDE: "late"}
    made[-1].meta[SIDE] = change.get("side", "late")
    joined = graph.call_function(aten.cat.default, (made, dim))
    joined.meta = {"val": torch.cat([n.meta["val"] for n in made], dim), SIDE: "late"}
    graph.output((joined, made[-1]) if change.get("read") else (joined,))
    return graph


CASES: dict[str, tuple[Graph, int]] = {
    "of one table": (lookups("ff"), 1),
    "one entry never learns": (lookups("fff", 0, 2), 1),
    "sparse": (lookups("ff", 1, -1, False, True), 1),
    "in runs": (lookups("ffsf"), 3),
    "of two tables": (lookups("fs"), 2),
    "by the occurrences": (lookups("ff", 1, -1, True), 2),
    "columns of the rows": (lookups("ff", 2), 2),
    "of two sides": (lookups("ff", side="early"), 2),
    "read by another": (lookups("ff", read=True), 2),
}


def outcome(graph: Graph) -> list[Any]:
    """Values, and gradients of the tables."""
    model = Tables()
    index = torch.tensor([[0, 1], [2, 2], [5, 0]])
    made = Interpreter(model, graph=graph).run(index, 5 - index)
    sum((v * v).sum() for v in made).backward()  # type: ignore[union-attr]
    return [*made, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_lookups_side_by_side(name: str) -> None:
    graph, count = CASES[name]
    before = outcome(graph)
    together(graph)
    graph.eliminate_dead_code()
    graph.lint()
    assert sum(n.target is aten.embedding.default for n in graph.nodes) == count
    for a, b in zip(outcome(graph), before, strict=True):
        torch.testing.assert_close(a, b)
