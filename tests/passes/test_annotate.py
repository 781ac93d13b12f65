"""annotate: who a value depends on, and where its batch lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from passes.annotate import Policy, annotate
from passes.normalize import normalize
from roo_rewrite.facts import META, Annotation, CrossRow, Provenance, Replicated, Rows, Size, annotation
from roo_rewrite.legality import IllegalGraph, annotated


def facts(captured: Callable[..., Any], function: Callable[..., Any], training: bool = False, **policy: Any) -> Any:
    trace, inputs = captured(function, training)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy(**policy))
    annotated(trace.graph)
    return {n.name: annotation(n) for n in trace.graph.nodes if n.op != "output"}, trace


def test_the_example_of_the_docstring(captured: Callable[..., Any]) -> None:
    found, _ = facts(captured, lambda m, u, x: (u @ m.w).mean(0) + x * x.shape[0])
    assert found["atoms_0"] == Annotation(Provenance.REQUEST, Rows(0))
    assert found["atoms_1"] == Annotation(Provenance.IMPRESSION, Rows(0))
    assert found["w"] == Annotation(Provenance.CONSTANT, Replicated())
    assert found["matmul"] == Annotation(Provenance.REQUEST, Rows(0))
    assert isinstance(found["mean"].batching, CrossRow)
    assert found["mean"].provenance is Provenance.IMPRESSION
    assert any(isinstance(f.batching, Size) for f in found.values())


@pytest.mark.parametrize(
    ("function", "node", "batching"),
    [
        (lambda m, u, x: u.t() @ x, "t", Rows(1)),
        (lambda m, u, x: u.reshape(-1, 2) + 1, "reshape", Rows(0, inner=2)),
        (lambda m, u, x: torch.stack([u, u]).reshape(-1, 4) + 1, "reshape", Rows(0, outer=2)),
        (lambda m, u, x: torch.zeros(u.shape[0], 4) + u, "zeros", Rows(0)),
    ],
)
def test_where_the_batch_goes(
    captured: Callable[..., Any], function: Callable[..., Any], node: str, batching: Rows
) -> None:
    found, _ = facts(captured, function)
    match = [f for n, f in found.items() if n.startswith(node)]
    assert match[0].batching == batching


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, u, x: u.cumsum(0) + x, "batch dim"),
        (lambda m, u, x: u * u.shape[0] + x, "depends on the batch size"),
        (lambda m, u, x: u + torch.rand_like(u), "random"),
        (lambda m, u, x: u[1:] * 1, "some rows"),
        (lambda m, u, x: (u @ u.t()) @ x, "batch"),
    ],
)
def test_what_stays_and_why(captured: Callable[..., Any], function: Callable[..., Any], reason: str) -> None:
    found, _ = facts(captured, function)
    assert any(reason in f.reason for f in found.values())


def test_batch_norm_in_training_is_row_wise_by_agreement(captured: Callable[..., Any]) -> None:
    found, _ = facts(captured, lambda m, u, x: m.norm(u) + x, training=True)
    assert found["batch_norm"] == Annotation(Provenance.REQUEST, Rows(0))


@pytest.mark.parametrize("dropout", ["per_impression", "per_request"])
def test_dropout_is_as_the_caller_says(captured: Callable[..., Any], dropout: str) -> None:
    function = lambda m, u, x: torch.nn.functional.dropout(u, 0.5, True) + x  # noqa: E731
    found, _ = facts(captured, function, dropout=dropout)
    assert (found["dropout"].provenance is Provenance.REQUEST) == (dropout == "per_request")


def test_a_request_node_that_reads_an_impression_is_illegal(captured: Callable[..., Any]) -> None:
    _, trace = facts(captured, lambda m, u, x: torch.relu(x) + u)
    node = next(n for n in trace.graph.nodes if n.name == "relu")
    node.meta[META] = Annotation(Provenance.REQUEST, Rows(0))
    with pytest.raises(IllegalGraph, match="request-level"):
        annotated(trace.graph)
