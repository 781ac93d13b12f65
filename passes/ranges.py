"""What the entries of a value can be, whatever the batch: masks that are known in part.

    seen = pad[:, None, :] & tril          above the diagonal: False for every batch; below: either

A range is a pair (low, high) of float64 tensors with the value's number of dims; a dim of size 1 stands for all
entries of a dim, the batch always. Every entry of the value lies between the two. An op without a line here gives
everything its dtype can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.constants import evaluate
from passes.forms import is_static, same_size
from roo_rewrite.capture import Captured
from roo_rewrite.facts import EFFECT

aten = torch.ops.aten
Range = tuple[Tensor, Tensor]
Rule = Callable[["_Walk", Node], "Range | None"]
_RULES: dict[Any, Rule] = {}


def bounds(captured: Captured, node: Node) -> Range:
    """The range of a node's value."""
    return _Walk(captured).of(node)


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


class _Walk:
    """One walk up the graph."""

    def __init__(self, captured: Captured):
        self.captured = captured
        self.memo: dict[Node, Range] = {}

    def of(self, node: Any) -> Range:
        """The range of a node, or of a number."""
        if not isinstance(node, Node):
            number = torch.tensor(float(node), dtype=torch.float64)
            return number, number
        if node not in self.memo:
            self.memo[node] = self._computed(node)
        return self.memo[node]

    def _computed(self, node: Node) -> Range:
        exact = evaluate(self.captured, node)
        if exact is not None and not exact.is_complex() and not bool(exact.isnan().any()):
            return exact.double(), exact.double()
        rule = _RULES.get(node.target) if EFFECT not in node.meta else None
        found = rule(self, node) if rule is not None and not _odd(node) else None
        value: Any = node.meta["val"]
        dtype = value.dtype if isinstance(value, Tensor) else torch.float64  # of a size
        return self.nothing_known(node, dtype) if found is None or _unsure(found) else found

    def nothing_known(self, node: Node, dtype: torch.dtype) -> Range:
        """All that `dtype` can hold, in the dims of `node`."""
        shape = [1] * len(_sizes(node))
        low, high = (0.0, 1.0) if dtype == torch.bool else (-math.inf, math.inf)
        return torch.full(shape, low, dtype=torch.float64), torch.full(shape, high, dtype=torch.float64)


def _odd(node: Node) -> bool:
    """Whether integers, which may wrap round, or complex numbers are involved."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    kinds = {v.dtype for v in values if isinstance(v, Tensor)}
    return any(not (k.is_floating_point or k == torch.bool) for k in kinds) and node.target not in _FACTORIES


def _unsure(found: Range) -> bool:
    return any(bool(f.isnan().any()) for f in found)


def _sizes(node: Node) -> list[Any]:
    value: Any = node.meta["val"]
    return list(value.shape) if isinstance(value, Tensor) else []


_FACTORIES: dict[Any, float | int] = {
    aten.zeros.default: 0.0,
    aten.ones.default: 1.0,
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
}


@_rule(*_FACTORIES)
def _filled(walk: _Walk, node: Node) -> Range | None:
    at = _FACTORIES[node.target]
    value = at if isinstance(at, float) else node.args[at] if at < len(node.args) else None
    if not isinstance(value, (int, float)):
        return None
    made = torch.full([1] * len(_sizes(node)), float(value), dtype=torch.float64)
    return made, made


@_rule(aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor)
def _either(walk: _Walk, node: Node) -> Range:
    (a, b), (c, d) = (walk.of(x) for x in node.args[:2])
    return torch.maximum(a, c), torch.maximum(b, d)


@_rule(aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor)
def _both(walk: _Walk, node: Node) -> Range:
    (a, b), (c, d) = (walk.of(x) for x in node.args[:2])
    return torch.minimum(a, c), torch.minimum(b, d)


@_rule(aten.bitwise_not.default, aten.logical_not.default)
def _not(walk: _Walk, node: Node) -> Range:
    low, high = _truth(walk, node.args[0])
    return 1 - high, 1 - low


def _truth(walk: _Walk, node: Any) -> Range:
    """Of x != 0."""
    if not _exact(walk, node):
        return walk.nothing_known(node, torch.bool)
    low, high = walk.of(node)
    return ((low > 0) | (high < 0)).double(), ((low != 0) | (high != 0)).double()


@_rule(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
@_rule(
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default
)
def _same(walk: _Walk, node: Node) -> Range:
    value: Any = node.meta["val"]
    if value.dtype == torch.bool:
        return _truth(walk, node.args[0])
    # A number out of reach of the narrower dtype is an infinity there.
    info = torch.finfo(value.dtype)
    low, high = (torch.where(f.abs() > info.max, f.sign() * math.inf, f) for f in walk.of(node.args[0]))
    return low, high


_COUNTING = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.neg.default)
_EXACT = 256.0


def _exact(walk: _Walk, node: Any) -> bool:
    """Whether a value is made of truth values and small integers alone: then no dtype rounds it."""
    if not isinstance(node, Node):
        return isinstance(node, int) and abs(node) <= _EXACT
    value: Any = node.meta["val"]
    if value.dtype == torch.bool:
        return True
    low, high = walk.of(node)
    small = bool(((low.abs() <= _EXACT) & (high.abs() <= _EXACT)).all())
    if evaluate(walk.captured, node) is not None or node.target in _FACTORIES:
        return small and bool((low == low.round()).all())
    keeps = node.target in _COUNTING or _RULES.get(node.target) in (_same, *_SHAPES)
    return small and keeps and all(_exact(walk, a) for a in _sources(node))


def _sources(node: Node) -> list[Any]:
    """The operands that entries of the value come from."""
    if node.target in _COUNTING[:-1]:
        return list(node.args[:2])
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked(walk: _Walk, node: Node) -> Range:
    x, mask, value = (walk.of(a) for a in node.args[:3])
    return _chosen(mask, value, x)


@_rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(walk: _Walk, node: Node) -> Range:
    mask, yes, no = (walk.of(a) for a in node.args[:3])
    return _chosen(mask, yes, no)


def _chosen(mask: Range, yes: Range, no: Range) -> Range:
    sure, never = mask[0] == 1, mask[1] == 0
    low, high = (
        torch.where(sure, a, torch.where(never, b, pick(a, b)))
        for a, b, pick in zip(yes, no, (torch.minimum, torch.maximum))
    )
    return low, high


@_rule(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar)
def _sum(walk: _Walk, node: Node) -> Range | None:
    if len(node.args) > 2 or node.kwargs:
        return None
    (a, b), (c, d) = (walk.of(x) for x in node.args[:2])
    if node.target is aten.add.Tensor:
        return a + c, b + d
    return (a - d, b - c) if node.target is aten.sub.Tensor else (c - b, d - a)


@_rule(aten.mul.Tensor, aten.mul.Scalar)
def _product(walk: _Walk, node: Node) -> Range:
    first, second = (walk.of(x) for x in node.args[:2])
    a, b, c, d = (x * y for x in first for y in second)
    return a.minimum(b).minimum(c).minimum(d), a.maximum(b).maximum(c).maximum(d)


@_rule(aten.neg.default)
def _negative(walk: _Walk, node: Node) -> Range:
    low, high = walk.of(node.args[0])
    return -high, -low


_TESTS: dict[Any, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    aten.eq.Scalar: lambda low, high, v: ((low == v) & (high == v), (low <= v) & (high >= v)),
    aten.ne.Scalar: lambda low, high, v: ((low > v) | (high < v), (low != v) | (high != v)),
    aten.gt.Scalar: lambda low, high, v: (low > v, high > v),
    aten.ge.Scalar: lambda low, high, v: (low >= v, high >= v),
    aten.lt.Scalar: lambda low, high, v: (high < v, low < v),
    aten.le.Scalar: lambda low, high, v: (high <= v, low <= v),
}


@_rule(*_TESTS)
def _tested(walk: _Walk, node: Node) -> Range | None:
    value = node.args[1]
    if not isinstance(value, (int, float)) or not _exact(walk, node.args[0]):
        return None
    low, high = _TESTS[node.target](*walk.of(node.args[0]), float(value))
    return low.double(), high.double()


# -- shapes


@_rule(aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.t.default)
def _moved(walk: _Walk, node: Node) -> Range:
    low, high = (node.target(f, *node.args[1:]) for f in walk.of(node.args[0]))  # type: ignore[operator]
    return low, high


@_rule(aten.expand.default, aten.expand_as.default)
def _expanded(walk: _Walk, node: Node) -> Range:
    gone = len(_sizes(node))
    low, high = (f.reshape([1] * (gone - f.ndim) + list(f.shape)) for f in walk.of(node.args[0]))
    return low, high


@_rule(aten.repeat.default)
def _repeated(walk: _Walk, node: Node) -> Range | None:
    found, times = walk.of(node.args[0]), node.args[1]
    assert isinstance(times, (list, tuple))
    low, high = (f.reshape([1] * (len(times) - f.ndim) + list(f.shape)) for f in found)
    if any(n > 1 and r != 1 for n, r in zip(low.shape, times)):
        return None
    return low, high


@_rule(aten.reshape.default, aten.view.default, aten.flatten.using_ints)
def _reshaped(walk: _Walk, node: Node) -> Range:
    """The last dims that stay as they are; what lies before them is taken together."""
    source: Any = node.args[0]
    before, after = _sizes(source), _sizes(node)
    kept = 0
    while kept < min(len(before), len(after)) and same_size(before[-1 - kept], after[-1 - kept]):
        kept += 1
    lead = list(range(len(before) - kept))
    low, high = walk.of(source)
    if lead:
        low, high = low.amin(lead), high.amax(lead)
    shape = [1] * (len(after) - kept)
    return low.reshape(shape + list(low.shape)), high.reshape(shape + list(high.shape))


@_rule(aten.slice.Tensor)
def _taken(walk: _Walk, node: Node) -> Range | None:
    low, high = walk.of(node.args[0])
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if low.shape[dim] == 1:
        return low, high
    rest: list[Any] = list(node.args[2:])
    if any(v is None or isinstance(v, Node) for v in rest[:2]):
        return None
    low, high = (aten.slice.Tensor(f, dim, *rest) for f in (low, high))
    return low, high


@_rule(aten.cat.default)
def _joined(walk: _Walk, node: Node) -> Range | None:
    given: Any = node.args[0]
    along: Any = node.args[1] if len(node.args) > 1 else 0
    dim = int(along) % len(_sizes(node))
    # torch takes `zeros(0)` beside tensors of more dims
    parts = [p for p in given if len(_sizes(p)) == len(_sizes(node))]
    if any(not is_static(_sizes(p)[dim]) for p in parts):
        return None
    found = [walk.of(p) for p in parts]
    shape = [max(f.shape[d] for f, _ in found) for d in range(len(_sizes(node)))]
    sizes = [[*shape[:dim], _sizes(p)[dim], *shape[dim + 1 :]] for p in parts]
    low, high = (torch.cat([f[i].expand(n) for f, n in zip(found, sizes)], dim) for i in (0, 1))
    return low, high


@_rule(aten.triu.default, aten.tril.default)
def _triangle(walk: _Walk, node: Node) -> Range | None:
    sizes = _sizes(node)[-2:]
    if not all(is_static(n) for n in sizes):
        return None
    found = (f.expand(*f.shape[:-2], *sizes) for f in walk.of(node.args[0]))
    # An infinity times 0 is no number, so the triangle is cut out, not multiplied.
    low, high = (node.target(f, *node.args[1:]) for f in found)  # type: ignore[operator]
    return low, high


_SHAPES = (_moved, _expanded, _repeated, _reshaped, _taken, _joined, _triangle)
