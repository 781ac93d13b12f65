"""What is known of a value: who it depends on, and where its batch lives.

Two independent facts, computed once by `passes.annotate` and kept, frozen, in `node.meta["roo"]`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch.fx

# Keys of node.meta: the annotation, the side of a hoisted node, an effect that keeps its place, the autocast around it.
META = "roo"
SIDE = "roo_side"
EFFECT = "roo_effect"
AUTOCAST = "roo_autocast"
COUNTS = "num_impressions"  # the placeholder of a request-level graph


class Provenance(enum.IntEnum):
    """Which side of the request a value depends on; the join of two is the larger."""

    CONSTANT = 0
    REQUEST = 1
    IMPRESSION = 2


class Batching:
    """Where the batch lives in a value. One of the classes below."""


@dataclass(frozen=True)
class Replicated(Batching):
    """No batch: the value is the same whatever the rows are."""


@dataclass(frozen=True)
class Rows(Batching):
    """Dim `dim` has `outer * B * inner` entries, row-major: the batch merged with its neighbours by a view.

    `[B, D]` is `Rows(0)`; `[B*T, D]` from `[B, T, D]` is `Rows(0, inner=T)`; `[T*B, D]` from
    `[T, B, D]` is `Rows(0, outer=T)`.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    def __str__(self) -> str:
        merged = "" if (self.outer, self.inner) == (1, 1) else f", outer={self.outer}, inner={self.inner}"
        return f"Rows({self.dim}{merged})"


@dataclass(frozen=True)
class RowIndex(Batching):
    """`step * arange(B)` laid along `dim`: it may pick rows, and is no value of its own."""

    dim: int
    step: int = 1


@dataclass(frozen=True)
class Ragged(Batching):
    """The values of a jagged pair: dim 0 is the rows of all requests, one after the other.

    `lengths` names what holds how many belong to each batch row: a graph input, or see `computed_lengths`.
    """

    lengths: str


@dataclass(frozen=True)
class Lengths(Rows):
    """The lengths `[B]` of a jagged pair: `Rows(0)`, and known to be the graph input `lengths`."""

    dim: int = 0
    lengths: str = ""


@dataclass(frozen=True)
class Offsets(Batching):
    """Where the rows of a jagged pair begin and end: `[B + 1]`, or `[B]` without the `first` 0 or the `last` total."""

    lengths: str
    first: bool = True
    last: bool = True

    @property
    def total(self) -> bool:
        """Whether there is an entry more than there are rows."""
        return self.first and self.last


@dataclass(frozen=True)
class Size(Batching):
    """A SymInt that depends on the batch size."""


@dataclass(frozen=True)
class Several(Batching):
    """The batching of each output of an op with several."""

    parts: tuple[Batching, ...]


def computed_lengths(node: torch.fx.Node) -> str:
    """The name of lengths that the graph computes: `[B]` whole numbers, row by row."""
    return f"%{node.name}"


def parts(batching: Batching) -> tuple[Batching, ...]:
    """The batching of each tensor among the outputs, those inside lists too, in order."""
    if not isinstance(batching, Several):
        return (batching,)
    return tuple(p for part in batching.parts for p in parts(part))


@dataclass(frozen=True)
class CrossRow(Batching):
    """A row of the value depends on other rows, or cannot be shown not to. Stays at impression level."""

    reason: str


@dataclass(frozen=True)
class Annotation:
    """The facts of one node. `reason` says why a node is not request-level although its inputs are."""

    provenance: Provenance
    batching: Batching
    reason: str = ""


def annotation(node: torch.fx.Node) -> Annotation:
    """The facts of `node`. Raises KeyError before `annotate` has run."""
    found: Any = node.meta[META]
    assert isinstance(found, Annotation)
    return found
