"""Whether all rows may stand in the place of those that a mask keeps (see `roo_rewrite.kept`).

    k = kept_rows(x, mask)          region: k, h, and what else is made of kept rows
    h = relu(linear(k, W))
    y = where(mask, h, out)         its end

A region holds where no row of it is told by others, and nothing but its own rows are put back: then the rows that are
not kept are read by nobody. Of its largest or smallest number, and of any or all of its truths, nothing is lost, as
they are taken over rows that are kept, some of them twice.

Run on the annotated graph. Nothing is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.annotate import EXTREMES, WEIGHTED
from roo_rewrite.facts import (
    EFFECT,
    Batching,
    Lengths,
    Provenance,
    Replicated,
    RowIndex,
    Rows,
    Size,
    annotation,
    parts,
)
from roo_rewrite.ops.kept import kept_rows

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default)


def unproved(graph: Graph) -> str | None:
    """Why some region does not hold; None where all do."""
    region: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        reason = _visit(node, region)
        if reason is not None:
            return f"{node}: {reason}"
    return None


def _visit(node: Node, region: dict[Node, Node]) -> str | None:
    """Enters a node into `region`, which tells the mask of each of its nodes; why it cannot be."""
    masks = {region[n] for n in node.all_input_nodes if n in region}
    if node.target is kept_rows:
        if masks:
            return "rows are kept among rows that a mask keeps"
        return _enter(node, node.args[1], region)  # type: ignore[arg-type]
    if not masks:
        return None
    if len(masks) > 1:
        return "rows of two masks meet"
    (mask,) = masks
    if node.op == "output":
        return "kept rows leave the region"
    if _ends(node, mask, region) or _is_extreme(node, region):
        return None
    return _inside(node, region) or _enter(node, mask, region)


def _enter(node: Node, mask: Node, region: dict[Node, Node]) -> str | None:
    region[node] = mask
    known = annotation(node)
    if isinstance(known.batching, Size):
        return None
    if annotation(mask).provenance is Provenance.IMPRESSION:
        return "the mask depends on the impression"
    if not all(_is_rows(part) for part in parts(known.batching)):
        return known.reason or "a value of kept rows has no rows"
    return None


def _inside(node: Node, region: dict[Node, Node]) -> str | None:
    """Why a node is not row-wise on the rows of its region."""
    if EFFECT in node.meta or WEIGHTED in node.meta:
        return "batch norm, or a write, sees how many rows are kept"
    for source in node.all_input_nodes:
        known = annotation(source)
        alike = isinstance(known.batching, (Replicated, Size)) or known.provenance is Provenance.CONSTANT
        if source not in region and not alike:
            return "kept rows meet all rows"
        if source not in region and isinstance(known.batching, RowIndex):
            return "kept rows are picked by the numbers of all rows"
    return None


def _is_rows(batching: Batching) -> bool:
    return isinstance(batching, (Rows, Lengths, RowIndex))


def _is_extreme(node: Node, region: dict[Node, Node]) -> bool:
    """Whether a node is an extreme of whole numbers over all of a value, which counts no entry twice."""
    x = node.args[0] if node.args else None
    if node.target not in EXTREMES or not isinstance(x, Node) or not isinstance(annotation(x).batching, Rows):
        return False
    value = x.meta["val"]
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _ends(node: Node, mask: Node, region: dict[Node, Node]) -> bool:
    """Whether a node puts rows of the region back, by the region's mask."""
    if node.target is not aten.where.self:
        return False
    over, values, out = node.args
    assert isinstance(over, Node)
    assert isinstance(values, Node)
    assert isinstance(out, Node)
    by_row = over is mask or (over.target in _VIEWS and over.args[0] is mask)
    in_place = values in region and out not in region and over not in region
    return in_place and by_row and all(annotation(n).batching == Rows(0) for n in (over, values, out))
