"""A tiny model in, its graph out, a line a node."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

import roo_rewrite as roo
from roo_rewrite.capture import Captured, capture
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs, bind_inputs
from roo_rewrite.legality import normalized


class Called(nn.Module):
    """A function of (u, x) as a model, with one weight `w` [4, 4] and one buffer `m` [4]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("m", torch.zeros(4))
        self.norm = nn.BatchNorm1d(4)
        self.function = function

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.function(self, u, x)


class Run(torch.fx.Interpreter):
    """A traced graph on a batch, in float64."""

    def __init__(self, trace: Captured, graph: Graph):
        super().__init__(nn.Module(), graph=graph)
        self.model, self.constants = copy.deepcopy(trace.model).double(), trace.constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target.startswith("_roo."):
            found = self.constants[target.removeprefix("_roo.")]
            return found.double() if found.is_floating_point() else found
        owner, _, name = target.rpartition(".")
        return getattr(self.model.get_submodule(owner), name)


@pytest.fixture
def captured() -> Callable[..., tuple[Captured, Inputs]]:
    """`captured(function, training=False)`: a function of (model, u [B, 4], x [B, 4]), traced; or of other sizes."""

    def make(
        function: Callable[..., Any], training: bool = False, u: Sequence[int] = (4,), x: Sequence[int] = (4,)
    ) -> tuple[Captured, Inputs]:
        model = Called(function).train(training)
        example = (torch.randn(3, *u), torch.randn(3, *x))
        inputs = bind_inputs(model.forward, example, {}, roo.FeatureSpec(["u"], ["x"]))
        atoms, statics = inputs.flatten(example, {}, Provenance.IMPRESSION)
        return capture(model, inputs, atoms, statics, []), inputs

    return make


def _written(value: Any) -> str:
    if isinstance(value, Node):
        return _name(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(v) for v in value)}]"
    return str(value)


def _name(node: Node) -> str:
    return {"atoms_0": "u", "atoms_1": "x", "num_impressions": "counts"}.get(node.name, node.name)


def _op(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return re.sub(r"\.(default|Tensor|Scalar|int|dim_IntList|dim|dims|self)$", "", name)


@pytest.fixture
def printed() -> Callable[..., str]:
    """The calls of a graph and its output, a line each; inputs, weights and sizes are left out."""

    def show(graph: Graph) -> str:
        lines = []
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"return {_written(node.args[0])}")
            elif node.op == "call_function" and _op(node) not in ("sym_size", "getattr"):
                lines.append(f"{_name(node)} = {_op(node)}({', '.join(_written(a) for a in node.args)})")
        return "\n".join(lines)

    return show


@pytest.fixture
def same() -> Callable[..., None]:
    """`same(trace, before, graph)`: both graphs give equal results on rows that have nothing in common.

    A pass that comes before the broadcast must not rely on the annotation.
    """

    def check(trace: Captured, before: Graph, graph: Graph) -> None:
        normalized(graph)
        torch.manual_seed(0)
        inputs = [n.meta["val"] for n in before.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]
        batch = [torch.randn(7, *value.shape[1:], dtype=torch.float64) for value in inputs[:2]]
        results = zip(Run(trace, graph).run(*batch), Run(trace, before).run(*batch), strict=True)
        for i, (got, want) in enumerate(results):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"output {i}: {m}")

    return check
