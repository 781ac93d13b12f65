"""hoist: request nodes first, one broadcast for each value that crosses; lower: what a broadcast is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch.fx import Graph

from passes.annotate import Policy, annotate
from passes.hoist import _computable, hoist
from passes.lower import lower
from passes.mixed_rate import _batch_first
from passes.normalize import BATCH, normalize
from passes.partition import Partition, partition
from roo_rewrite.emit import emit
from roo_rewrite.facts import SIDE, Provenance
from roo_rewrite.legality import IllegalGraph, hoisted
from roo_rewrite.ops.broadcast import jagged_broadcast

aten = torch.ops.aten

COUNTS = torch.tensor([2, 0, 3])


def hoist_of(
    captured: Callable[..., Any], function: Callable[..., Any], fanout: float = 1000.0, training: bool = False
) -> tuple[Graph, Partition, Any]:
    trace, inputs = captured(function, training)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    plan = partition(trace, fanout)
    graph = hoist(trace, inputs, plan)
    hoisted(graph)
    return graph, plan, trace


def tower(m: Any, u: Any, x: Any) -> Any:
    return torch.cat([torch.relu(u @ m.w), x], 1)


def test_the_example_of_the_docstring(captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    graph, plan, _ = hoist_of(captured, tower)
    assert [n.name for n in plan.residuals] == ["relu"]
    assert printed(graph).splitlines() == [
        "matmul = matmul(u, w)",
        "relu = relu(matmul)",
        "request_of = request_of(counts, sym_size_int)",
        "jagged_broadcast = jagged_broadcast(relu, request_of, 0, 1, 1)",
        "cat = cat([jagged_broadcast, x], 1)",
        "return [cat]",
    ]
    lower(graph)
    text = printed(graph)
    assert "jagged_broadcast(" not in text
    assert "index_select(relu, 0, repeat_interleave" in text


def test_a_value_crosses_once_however_many_read_it(captured: Callable[..., Any]) -> None:
    graph, _, _ = hoist_of(captured, lambda m, u, x: (h := torch.relu(u @ m.w)) * x + h.sum(1, True) / (h + x))
    crossing = [n.args[0].name for n in graph.nodes if n.target is jagged_broadcast]
    assert "relu" in crossing
    assert len(crossing) == len(set(crossing))


@pytest.mark.parametrize(
    ("function", "training"),
    [
        (tower, False),
        (lambda m, u, x: (u @ m.w).reshape(-1, 2) * x.reshape(-1, 2), False),
        (lambda m, u, x: torch.zeros(u.shape[0], 4) + torch.relu(u @ m.w) * x, False),
        (lambda m, u, x: torch.relu(u @ m.w)[: min(u.shape[0], 2)], False),
        (lambda m, u, x: torch.tanh(m.norm(u)) * x, True),
        (lambda m, u, x: torch.relu(u @ m.w) - torch.relu(u @ m.w).mean(0) + x, False),
        (lambda m, u, x: torch.relu(u @ m.w), False),
    ],
)
def test_the_emitted_function_computes_the_original_on_the_expanded_batch(
    captured: Callable[..., Any], function: Callable[..., Any], training: bool
) -> None:
    graph, _, trace = hoist_of(captured, function, training=training)
    lower(graph)
    u, x = torch.randn(3, 4), torch.randn(5, 4)
    made = emit(graph)
    (got,) = made.whole(trace.model, u, x, COUNTS)
    rows = u[[0, 0, 2, 2, 2]]
    torch.testing.assert_close(got, trace.model(rows, x), rtol=1e-4, atol=1e-5)
    (parts,) = made.impression(trace.model, *made.request(trace.model, u, COUNTS), x, COUNTS)
    torch.testing.assert_close(parts, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "outer"),
    [
        (lambda m, u, x: (x * 2).unsqueeze(2) @ x.unsqueeze(1), True),
        (lambda m, u, x: torch.bmm((x * 2).unsqueeze(2), x.unsqueeze(1)), True),
        (lambda m, u, x: x.view(-1, 2, 2, 1) @ x.view(-1, 2, 1, 2), True),
        (lambda m, u, x: x.view(-1, 2, 2) @ x.view(-1, 2, 2), False),
        (lambda m, u, x: x.unsqueeze(1) @ x.unsqueeze(2), False),
        (lambda m, u, x: x.unsqueeze(2) @ m.w[:1], False),
    ],
)
def test_an_outer_product_is_a_product_entry_by_entry(
    captured: Callable[..., Any], function: Callable[..., Any], outer: bool
) -> None:
    graph, _, trace = hoist_of(captured, function)
    lower(graph)
    assert any(n.target in (aten.bmm.default, aten.matmul.default) for n in graph.nodes) != outer
    u, x = torch.randn(3, 4), torch.randn(5, 4)
    (got,) = emit(graph).whole(trace.model, u, x, COUNTS)
    torch.testing.assert_close(got, trace.model(u[[0, 0, 2, 2, 2]], x))


def test_a_value_crosses_before_it_grows(captured: Callable[..., Any]) -> None:
    _, plan, _ = hoist_of(captured, lambda m, u, x: torch.tanh((u @ m.w).repeat(1, 64)) + x.repeat(1, 64), fanout=1.0)
    assert "repeat" not in {n.name for n in plan.residuals}


def test_a_read_without_a_broadcast_is_illegal(captured: Callable[..., Any]) -> None:
    graph, _, _ = hoist_of(captured, tower)
    cross = next(n for n in graph.nodes if n.target is jagged_broadcast)
    cross.replace_all_uses_with(cross.args[0])
    with pytest.raises(IllegalGraph, match="without a broadcast"):
        hoisted(graph)


def test_a_request_node_that_reads_an_impression_is_illegal(captured: Callable[..., Any]) -> None:
    graph, _, _ = hoist_of(captured, tower)
    next(n for n in graph.nodes if n.name == "cat").meta[SIDE] = Provenance.REQUEST
    with pytest.raises(IllegalGraph, match="reads"):
        hoisted(graph)


def test_only_sizes_that_can_be_written_are_computed() -> None:
    assert all(_computable(size, {}) for size in (sympy.Integer(3), BATCH * 3 + 1, BATCH**2, sympy.Max(BATCH - 1, 2)))
    assert not any(
        _computable(s, {}) for s in (1 / BATCH, sympy.sqrt(BATCH), sympy.sin(BATCH), BATCH + sympy.Symbol("n"))
    )


@pytest.mark.parametrize(
    ("equation", "after"),
    [
        ("nhm,bmx->bnhx", "bmx,nhm->bnhx"),
        ("bmx,nhm->bnhx", None),
        ("bm,bmx->bx", None),
        ("nm,bm->nb", None),
        ("nhm,...m->...nh", None),
        ("nm,bm", None),
        ("nm,bm,bx->bnx", None),
        ("b->b", None),
    ],
)
def test_of_two_operands_the_one_with_the_batch_comes_first(equation: str, after: str | None) -> None:
    graph = Graph()
    operands = [graph.placeholder(f"x{i}") for i in range(equation.count(",") + 1)]
    node = graph.call_function(torch.ops.aten.einsum.default, (equation, operands))
    _batch_first(node)
    assert node.args == ((equation, operands) if after is None else (after, operands[::-1]))
