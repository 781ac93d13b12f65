"""Whether all rows may stand in the place of those that a mask keeps (`roo_rewrite.kept`), and sorted rows unsorted.

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
    Provenance,
    Replicated,
    RowIndex,
    Rows,
    Size,
    annotation,
    parts,
)
from roo_rewrite.ops.kept import kept_rows, sorted_rows, unsorted_rows

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default)


def unproved(graph: Graph) -> dict[Node, str]:
    """The masks and orders whose regions do not hold, and why."""
    region, reasons = dict[Node, Node](), dict[Node, str]()
    for node in graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        masks = {region[n] for n in node.all_input_nodes if n in region}
        if node.target in (kept_rows, sorted_rows, unsorted_rows):
            masks.add(node.args[1])
        reason = _visit(node, masks, region)
        if reason is not None:
            reasons |= {mask: f"{node}: {reason}" for mask in masks if mask not in reasons}
    return reasons


def _visit(node: Node, masks: set[Node], region: dict[Node, Node]) -> str | None:
    """Enters a node into `region`, which tells the mask or order of each of its nodes; why it cannot be."""
    if not masks:
        return None
    if len(masks) > 1:
        region[node] = next(iter(masks))
        return "rows of two masks or orders meet"
    (mask,) = masks
    if node.op == "output":
        return "such rows leave the region"
    starts = node.target in (kept_rows, sorted_rows)
    if starts and node.args[0] in region:
        return "rows are taken among such rows"
    if not starts and (_ends(node, mask, region) or _is_extreme(node)):
        return None
    region[node] = mask
    if node.target is unsorted_rows:
        return "rows are put back that were not sorted so"
    return (None if starts else _inside(node, region)) or _rows(node, mask)


def _rows(node: Node, mask: Node) -> str | None:
    """Why a value of the region has no rows, or must not be there at all."""
    known = annotation(node)
    if isinstance(known.batching, Size):
        return None
    if node.target is kept_rows and annotation(mask).provenance is Provenance.IMPRESSION:
        return "the mask depends on the impression"
    if not all(isinstance(part, (Rows, RowIndex)) for part in parts(known.batching)):
        return known.reason or "a value of such rows has no rows"
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


def _is_extreme(node: Node) -> bool:
    """Whether a node is an extreme of whole numbers over all of a value, which counts no entry twice."""
    x = node.args[0] if node.args else None
    if node.target not in EXTREMES or not isinstance(x, Node) or not isinstance(annotation(x).batching, Rows):
        return False
    value = x.meta["val"]
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _ends(node: Node, mask: Node, region: dict[Node, Node]) -> bool:
    """Whether a node puts rows of the region back, by the region's mask or order."""
    if node.target is unsorted_rows:
        return node.args[1] is mask and node.args[0] in region and mask not in region
    if node.target is not aten.where.self:
        return False
    over, values, out = node.args
    assert isinstance(over, Node)
    assert isinstance(values, Node)
    assert isinstance(out, Node)
    by_row = over is mask or (over.target in _VIEWS and over.args[0] is mask)
    in_place = values in region and out not in region and over not in region
    return in_place and by_row and all(annotation(n).batching == Rows(0) for n in (over, values, out))
