"""Another name for an op: the same values, and the op that a split knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph

import roo_rewrite as roo
from passes.normalize import normalize
from passes.synonyms import SYNONYMS
from tests.passes.conftest import Called

aten = torch.ops.aten

SAID: dict[str, Callable[..., Any]] = {
    "tensor_split.indices": lambda m, u, x: torch.hstack([(u + x).tensor_split([1, 3], dim=1)[1], u.hsplit([2])[0]]),
    "hsplit.array": lambda m, u, x: (u + x).hsplit([1])[1],
    "hsplit.int": lambda m, u, x: (u + x).hsplit(2)[1],
    "dsplit.array": lambda m, u, x: (u + x).view(-1, 1, 4).dsplit([1])[0],
    "dsplit.int": lambda m, u, x: (u + x).view(-1, 1, 4).dsplit(2)[1],
    "inner.default": lambda m, u, x: torch.inner(u - x, m.w) + torch.inner(u - x, m.m + 2)[:, None],
    "mv.default": lambda m, u, x: torch.mv(u - x, m.m + 2),
    "addmv.default": lambda m, u, x: torch.addmv(u[:, 0], u - x, m.m + 2),
    "fliplr.default": lambda m, u, x: torch.fliplr(u - x),
    "broadcast_to.default": lambda m, u, x: torch.broadcast_to(u[:, None], (u.shape[0], 3, 4)) - x[:, None],
    "multiply.Tensor": lambda m, u, x: torch.multiply(u, x).multiply(3),
    "divide.Tensor": lambda m, u, x: torch.divide(u - x, 3),
    "true_divide.Tensor": lambda m, u, x: torch.true_divide(u - x, 3),
    "subtract.Tensor": lambda m, u, x: torch.subtract(u, x),
    "negative.default": lambda m, u, x: torch.negative(u - x),
}


def _targets(graph: Graph) -> set[str]:
    return {str(n.target).removeprefix("aten.") for n in graph.nodes}


@pytest.mark.parametrize("name", SAID)
def test_said_with_another_name(name: str, captured: Callable[..., Any]) -> None:
    trace, _ = captured(SAID[name])
    assert name in _targets(trace.graph)
    normalize(trace)
    assert not _targets(trace.graph) & set(SAID)
    u, x = torch.randn(5, 4), torch.randn(5, 4)
    (found,) = torch.fx.GraphModule(trace.model, trace.graph)(u, x)
    torch.testing.assert_close(found, Called(SAID[name])(u, x))


def test_all_are_tried() -> None:
    assert set(SAID) == {str(target).removeprefix("aten.") for target in SYNONYMS}


STAYS: dict[str, tuple[Callable[..., Any], Any]] = {
    "other weights": (lambda m, u, x: torch.subtract(u, x, alpha=2), aten.subtract.Tensor),
    "other weights of a product": (lambda m, u, x: torch.addmv(u[:, 0], x, m.m, beta=0.5), aten.addmv.default),
    "counted from the end": (lambda m, u, x: (u + x).tensor_split([-3], 1)[0], aten.tensor_split.indices),
    "past the end": (lambda m, u, x: (u + x).tensor_split([1, 9], 1)[1], aten.tensor_split.indices),
    "cuts of the batch": (lambda m, u, x: (u + x).tensor_split([1])[1], aten.tensor_split.indices),
    "more dims than two": (lambda m, u, x: torch.inner(u, m.w.view(2, 2, 4)), aten.inner.default),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_more_than_a_name_stays(name: str, captured: Callable[..., Any]) -> None:
    function, target = STAYS[name]
    trace, _ = captured(function)
    normalize(trace)
    assert target in {n.target for n in trace.graph.nodes}


@pytest.mark.parametrize("product", [torch.matmul, torch.mv])
def test_a_vector_of_weights_is_cut(product: Callable[..., Any]) -> None:
    model = Called(lambda m, u, x: product(torch.hstack([u, x]), torch.cat([m.w[0] * 2, m.w[1]]))).double()
    with torch.no_grad():
        model.w.copy_(torch.randn(4, 4))
    example = (torch.randn(6, 4).double(), torch.randn(6, 4).double())
    rewritten = roo.rewrite(model, example, spec=roo.FeatureSpec(["u"], ["x"]), split="always", check=True)
    assert [c.taken for c in rewritten._whole_program().candidates] == [True]
    roo.verify(model, rewritten, batches=6)
