"""What a product of forms costs in parts, against the one product: both are built, and the nodes of each priced.

A batch of small products takes longer for each matrix than its FLOPs say: a grid of four parts may cost more than the
one product it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from passes.forms import PROVENANCE, Form, Sum, hint, leaves
from passes.mixed_rate import at_request_rate, written
from passes.price import Price
from passes.split import Splitter
from roo_rewrite.cost import is_view

# Grids that were timed took longer in parts than the parts are priced at, and longer still with their gradients
# (docs/speed.md).
_PARTS, _TRAINED = 1.15, 1.3


def pays(s: Splitter, what: str, whole: Form, parts: Form, built: int) -> bool:
    """Whether `parts` costs less than `whole`, both made of the nodes after the first `built`, and older ones."""
    new = set(list(s.builder.graph.nodes)[built:])
    before, after = (sum(spent(s.price, n) for n in _behind(f, new)) for f in (whole, parts))
    if isinstance(parts, Sum):
        after += (len(parts.terms) - 1) * s.price.move(parts.shape)
    else:
        after += s.price.joined(parts)
    return s.take(what, before, (_TRAINED if s.captured.model.training else _PARTS) * after)


def _behind(form: Form, new: set[Node]) -> Iterator[Node]:
    """The new nodes a form is made of."""
    waiting, seen = list(leaves(form)), set[Node]()
    while waiting:
        node = waiting.pop()
        if node in new and node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
            yield node


def spent(price: Price, node: Node) -> float:
    """Nanoseconds of a node of the split graph at the nominal batch of its side."""
    value, side = node.meta.get("val"), node.meta[PROVENANCE]
    if node.op != "call_function" or not isinstance(value, Tensor) or is_view(node):
        return 0.0
    if written(node) is not None:
        return price.start(1) + _product(price, node)
    operands = [n.meta["val"].shape for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return price.start(1) + sum(price.move(shape, side, 1.0) for shape in (tuple(value.shape), *operands))


def _product(price: Price, node: Node) -> float:
    """A batch of products; with a request's operand, where it lies in the first dim, one for each request."""
    found = written(node)
    assert found is not None
    (first, second, out), x, y = found
    size = {**dict(zip(first, x.meta["val"].shape)), **dict(zip(second, y.meta["val"].shape))}
    both = [c for c in first if c in second]
    side = node.meta[PROVENANCE]
    m, n = (price.rows([size[c] for c in names if c not in both], side) for names in (first, second))
    k = math.prod(hint(size[c]) for c in both if c not in out)
    matrices = price.rows([size[c] for c in both if c in out], side)
    early = [f for f in (x, y) if f.meta[PROVENANCE] is not side]
    if not early:
        return price.batched(matrices, m, k, n)
    if not at_request_rate(node, early[0]):
        return price.batched(matrices, m, k, n) + price.move(tuple(early[0].meta["val"].shape))
    # The impressions of a request are rows of one matrix.
    rows = (m, n * price.fanout) if early[0] is x else (m * price.fanout, n)
    return price.batched(matrices / price.fanout, rows[0], k, rows[1])
