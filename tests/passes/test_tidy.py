"""tidy: views, concatenations and scaled terms in fewer calls, values and gradients as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node

import roo_rewrite as roo
from passes.functionalize import keeps
from passes.tidy import scaled_terms, tidy
from roo_rewrite.facts import AUTOCAST, SIDE

aten = torch.ops.aten
Make = Callable[[Callable[..., Node], Node, Node], Any]
EARLY, LATE = "request", "impression"


def graph_of(make: Make, *, marks: dict[str, Any] | None = None) -> Graph:
    """Ops on x and y [3, 4], all on one side."""
    graph = Graph()
    inputs = [graph.placeholder(name) for name in ("x", "y")]
    for node in inputs:
        node.meta = {"val": torch.zeros(3, 4), SIDE: LATE}

    def call(target: Any, *args: Any, side: str = LATE) -> Node:
        made = graph.call_function(target, args)
        made.meta = {"val": target(*torch.fx.map_arg(args, lambda n: n.meta["val"])), SIDE: side, **(marks or {})}
        return made

    graph.output(make(call, *inputs))
    return graph


def outcome(graph: Graph, seed: int = 0) -> list[Tensor]:
    """Values, and gradients of both inputs."""
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(3, 4, generator=g, requires_grad=True) for _ in range(2)]
    made = list(Interpreter(nn.Module(), graph=graph).run(*inputs))
    sum((i + 1) * (v * v).sum() for i, v in enumerate(made)).backward()  # type: ignore[union-attr]
    return [*made, *(v.grad for v in inputs)]  # type: ignore[list-item]


def targets(graph: Graph) -> list[str]:
    return [n.target.__name__ for n in graph.nodes if n.op == "call_function"]


def turned(call: Any, *nodes: Node) -> list[Node]:
    return [call(aten.transpose.int, n, 0, -1) for n in nodes]


def column(call: Any, *nodes: Node) -> list[Node]:
    return [call(aten.unsqueeze.default, n, 1) for n in nodes]


CASES: dict[str, tuple[Make, list[str]]] = {
    "a view in the shape it began with": (
        lambda call, x, y: (
            call(
                aten.mul.Tensor,
                call(aten.reshape.default, call(aten.unsqueeze.default, call(aten.exp.default, x), 1), [3, 4]),
                y,
            ),
        ),
        ["exp.default", "mul.Tensor"],
    ),
    "of other views": (
        lambda call, x, y: (
            call(aten.exp.default, call(aten.squeeze.dims, call(aten.unflatten.int, x, 1, [1, 4]), [1])),
            call(aten.exp.default, call(aten.flatten.using_ints, call(aten.unflatten.int, y, 1, [2, 2]), 1, 2)),
        ),
        ["exp.default", "exp.default"],
    ),
    "a transpose is no view in order": (
        lambda call, x, y: (
            call(
                aten.reshape.default, call(aten.transpose.int, call(aten.reshape.default, x, [3, 2, 2]), 1, 2), [3, 4]
            ),
        ),
        ["reshape.default", "transpose.int", "reshape.default"],
    ),
    "columns side by side are a stack": (
        lambda call, x, y: (call(aten.cat.default, column(call, x, y), 1),),
        ["stack.default"],
    ),
    "columns along another dim are none": (
        lambda call, x, y: (call(aten.cat.default, column(call, x, y), 2),),
        ["unsqueeze.default", "unsqueeze.default", "cat.default"],
    ),
    "the same parts twice": (
        lambda call, x, y: (
            call(aten.cat.default, column(call, x, y), 1),
            call(aten.cat.default, [x, y], 1),
            call(aten.cat.default, column(call, x, y), 2),
        ),
        ["stack.default", "reshape.default", "reshape.default"],
    ),
    "in another order": (
        lambda call, x, y: (call(aten.cat.default, [x, y], 1), call(aten.cat.default, [y, x], 1)),
        ["cat.default", "cat.default"],
    ),
    "of parts transposed": (
        lambda call, x, y: (call(aten.cat.default, [x, y], 1), call(aten.cat.default, turned(call, x, y), 0)),
        ["cat.default", "transpose.int"],
    ),
    "of parts transposed, along another dim": (
        lambda call, x, y: (call(aten.cat.default, [x, y], 1), call(aten.cat.default, turned(call, x, y), 1)),
        ["cat.default", "transpose.int", "transpose.int", "cat.default"],
    ),
    "of parts transposed, alone": (
        lambda call, x, y: (call(aten.cat.default, turned(call, x, y), 0),),
        ["transpose.int", "transpose.int", "cat.default"],
    ),
    "along another dim": (
        lambda call, x, y: (call(aten.cat.default, [x, y], 0), call(aten.cat.default, [x, y], 1)),
        ["cat.default", "cat.default"],
    ),
    "of both sides": (
        lambda call, x, y: (
            call(aten.cat.default, [x, y], 1, side=EARLY),
            call(aten.cat.default, [x, y], 1),
        ),
        ["cat.default", "cat.default"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_views_and_concatenations(name: str) -> None:
    make, want = CASES[name]
    graph, before = graph_of(make), outcome(graph_of(make))
    tidy(graph)
    graph.lint()
    assert targets(graph) == want
    for a, b in zip(outcome(graph), before, strict=True):
        torch.testing.assert_close(a, b)


class Fields(nn.Module):
    """A factorization machine and a linear map of the same embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(7, 3) for _ in range(4))
        self.deep = nn.Linear(12, 2)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        ids = [u[:, 0], x[:, 0], u[:, 1], x[:, 1]]
        columns = [table(i).unsqueeze(1) for table, i in zip(self.tables, ids)]
        fields = torch.cat(columns, 1)
        squares = 0.5 * (fields.sum(1).pow(2) - fields.pow(2).sum(1)).sum(1, keepdim=True)
        return squares + self.deep(torch.cat(columns, 2).flatten(1))


@pytest.mark.parametrize("training", [False, True])
def test_fields_are_put_together_once_a_side(training: bool) -> None:
    model = Fields().train(training)
    example = (torch.randint(7, (8, 2)), torch.randint(7, (8, 2)))
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    made = roo.rewrite(model, example, spec=spec, fanout=16, check=True)
    roo.verify(model, made, batches=6)
    assert made.code.count("torch.stack") == 2
    assert "alpha" in made.code


def test_under_autocast_a_concatenation_stays() -> None:
    make = lambda call, x, y: (call(aten.cat.default, column(call, x, y), 1), call(aten.cat.default, [x, y], 1))  # noqa: E731
    graph = graph_of(make, marks={AUTOCAST: ("cpu", torch.bfloat16, True, True)})
    tidy(graph)
    assert targets(graph).count("cat.default") == 2


SCALED: dict[str, tuple[Make, list[str]]] = {
    "the second term": (
        lambda call, x, y: (call(aten.add.Tensor, x, call(aten.mul.Tensor, y, -0.5)),),
        ["add.Tensor"],
    ),
    "the first term": (
        lambda call, x, y: (call(aten.add.Tensor, call(aten.mul.Tensor, y, 3), x),),
        ["add.Tensor"],
    ),
    "a term read twice": (
        lambda call, x, y: (call(aten.add.Tensor, x, m := call(aten.mul.Tensor, y, 2.0)), m),
        ["mul.Tensor", "add.Tensor"],
    ),
    "no number": (
        lambda call, x, y: (call(aten.add.Tensor, x, call(aten.mul.Tensor, y, x)),),
        ["mul.Tensor", "add.Tensor"],
    ),
    "of another dtype": (
        lambda call, x, y: (
            call(aten.add.Tensor, x, call(aten.mul.Tensor, call(aten.to.dtype, y, torch.float64), 2.0)),
        ),
        ["to.dtype", "mul.Tensor", "add.Tensor"],
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_terms(name: str) -> None:
    make, want = SCALED[name]
    graph, before = graph_of(make), outcome(graph_of(make))
    scaled_terms(graph)
    graph.eliminate_dead_code(is_impure_node=keeps)
    assert targets(graph) == want
    for a, b in zip(outcome(graph), before, strict=True):
        torch.testing.assert_close(a, b)
