"""Loops over the steps of packed sequences as ops on all rows (`roo_rewrite.loops`), proved and written out.

    traced                                       becomes, with m the mask [B, T] of the entries that are there
    data = packed_data(x: [B, T, D])             x, where(m, x, x[:, :1])
    step_rows(data, 3)                           x[:, 3]
    first_rows(h, 3)                             where(m[:, 3], h, 0)
    put_first_rows(last, h, 3)                   where(m[:, 3], h, last)
    put_step(put_step(data, h0, 0), h1, 1)       stack([h0, h1], 1)
    padded_data(data)                            data, [B, T, D] again
    in_order(x), in_place(x)                     x

An entry that is not there holds the first of its row, or what was made of that and zeros; nobody reads it where

- a value of the rows of a step meets only values of the same step's and such as have no rows, and is made row by row:
  then on rows that have the step it is the original's;
- entries of one packing are read by the sizes of another only where their masks are made in the same way;
- nobody counts the steps: the trace in which the longest row ends after 1, or after T - 1, is this one without
  the writes behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.branches import Numbers, acts, orders, results
from passes.functionalize import keeps
from passes.kept_regions import mixed, rowless
from passes.normalize import normalize
from passes.traced import called
from roo_rewrite.capture import Captured
from roo_rewrite.errors import CaptureError
from roo_rewrite.ops.kept import kept_rows, sorted_rows, step_rows, unsorted_rows

aten = torch.ops.aten
roo = torch.ops.roo
_ALL = -1  # the step of all entries
_MOVES = {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default}
_WRITES: dict[Any, int] = {roo.put_step.default: 4, roo.put_first_rows.default: 3}  # which argument is the step
_POINTWISE = torch.Tag.pointwise


def written_out(captured: Captured, annotate: Callable[[], None]) -> bool:
    """Writes the loops of a normalized graph out. Whether that is proved; if not, the graph is of no use."""
    masks = _masks(captured.graph)
    if not _uncounted(captured, masks):
        return False
    _Lowered(captured.graph).run()
    annotate()
    if not _proved(captured.graph):
        return False
    for node in [n for n in captured.graph.nodes if n.target is step_rows]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        captured.graph.erase_node(node)
    return True


def _masks(graph: Graph) -> list[tuple[Any, Any]]:
    """The pairs of masks by which entries of one packing are read as those of another."""
    at: dict[Any, tuple[int, int]] = {
        roo.padded_data.default: (1, 2),
        roo.step_rows.default: (1, 2),
        roo.put_step.default: (2, 3),
    }
    found = [(n.args[i], n.args[j]) for n in graph.nodes if n.target in at for i, j in [at[n.target]]]
    return [(a, b) for a, b in found if a is not b]


class _Values(Numbers):
    """Numbers of values, on whatever device. ended: no row has this step or a later one."""

    def __init__(self, ended: int | None = None):
        super().__init__()
        self.ended = ended

    def kept(self, node: Node, made: dict[Node, int]) -> Any:
        args: Any = node.args
        if node.target in _MOVES:  # to another dtype it is another value
            return args[0]
        at = _WRITES.get(node.target)
        if at is not None and self.ended is not None and args[at] >= self.ended:
            return args[0]
        return super().kept(node, made)


def _uncounted(captured: Captured, masks: list[tuple[Any, Any]]) -> bool:
    """Whether nothing but rows tells how many steps there are, and masks that must be the same are."""
    assert captured.shorter is not None
    found = [n.all_input_nodes[0] for n in captured.graph.nodes if n.target is roo.step_sources.default]
    longest = max((mask.meta["val"].shape[1] for mask in found), default=1)
    try:
        numbers = _Values().of(captured)
        if any(numbers[a] != numbers[b] for a, b in masks):
            return False
        return all(_ends(captured, last) for last in {1, longest - 1} if 0 < last < longest)
    except (CaptureError, ValueError):  # the shorter trace fails, or a value has no number
        return False


def _ends(captured: Captured, last: int) -> bool:
    assert captured.shorter is not None
    other = captured.shorter(last)
    if [(s.path, s.function) for s in other.sites] != [(s.path, s.function) for s in captured.sites]:
        return False
    normalize(other)
    numbers = _Values(last)
    mine, theirs = numbers.of(captured), numbers.of(other)
    return (
        [mine[n] for n in mine if acts(n)] == [theirs[n] for n in theirs if acts(n)]
        and orders(mine) == orders(theirs)
        and results(captured, mine) == results(other, theirs)
        and (captured.out_values, captured.out_tree) == (other.out_values, other.out_tree)
        and captured.accepts == other.accepts
    )


@dataclass
class _Entries:
    """Packed entries: `[B, T, ...]`, with steps written over."""

    whole: Node
    mask: Node
    steps: dict[int, Node]


class _Lowered:
    """The graph with the loops' ops written out, what is of a step marked by `ops.kept.step_rows`."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.entries: dict[Node, _Entries] = {}

    def run(self) -> None:
        steps: dict[Any, Callable[..., Node | None]] = {
            roo.packed_data.default: self._data,
            roo.padded_data.default: self._padded,
            roo.step_rows.default: self._step,
            roo.put_step.default: self._put_step,
            roo.first_rows.default: self._first,
            roo.put_first_rows.default: self._put_first,
            roo.in_order.default: lambda node, x, mask, source: self._of(x, mask, 0),
            roo.in_place.default: lambda node, x, mask: self._of(x, mask, None),
        }
        for node in list(self.graph.nodes):
            write = steps.get(node.target)
            if write is None:
                continue
            with self.graph.inserting_before(node):
                made = write(node, *node.args)
            if made is not None:
                made.meta = {**node.meta, "val": made.meta["val"]}
                node.replace_all_uses_with(made)
        self.graph.eliminate_dead_code(is_impure_node=keeps)

    def _of(self, x: Node, mask: Node, at: int | None) -> Node:
        """x, of the rows of a step."""
        made = self.graph.call_function(step_rows, (x, mask, at))
        made.meta = dict(x.meta)
        return made

    def _flags(self, mask: Node, like: Node, at: int | None = None) -> Node:
        """The mask, or a step of it, over the dims of a value."""
        made = mask if at is None else called(self.graph, aten.select.int, mask, 1, at)
        for _ in range(like.meta["val"].ndim - made.meta["val"].ndim):
            made = called(self.graph, aten.unsqueeze.default, made, -1)
        return made

    def _data(self, node: Node, steps: Node, mask: Node, source: Node) -> Node | None:
        first = called(self.graph, aten.slice.Tensor, steps, 1, 0, 1)
        whole = called(self.graph, aten.where.self, self._flags(mask, steps), steps, first)
        self.entries[node] = _Entries(whole, mask, {})
        return self._flat(node)

    def _flat(self, node: Node) -> Node | None:
        """Entries as one vector, for who reads them other than by steps."""
        reads = {roo.padded_data.default, roo.step_rows.default, roo.put_step.default}
        if all(n.target in reads and n.args[0] is node for n in node.users):
            return None
        entries = self.entries[node]
        whole = self._whole(entries, entries.mask)
        flat = called(self.graph, aten.view.default, whole, [-1, *whole.meta["val"].shape[2:]])
        made = self._of(flat, entries.mask, _ALL)
        self.entries[made] = entries
        return made

    def _entries_of(self, data: Node, mask: Node) -> _Entries:
        if data not in self.entries:
            plain = self._of(data, mask, None)
            shape = [-1, mask.meta["val"].shape[1], *data.meta["val"].shape[1:]]
            self.entries[data] = _Entries(called(self.graph, aten.view.default, plain, shape), mask, {})
        return self.entries[data]

    def _whole(self, entries: _Entries, mask: Node) -> Node:
        if not entries.steps:
            return entries.whole
        steps = [self._entry(entries, mask, at) for at in range(mask.meta["val"].shape[1])]
        return called(self.graph, aten.stack.default, [self._of(s, mask, None) for s in steps], 1)

    def _entry(self, entries: _Entries, mask: Node, at: int) -> Node:
        known = entries.steps.get(at)
        return known or self._of(called(self.graph, aten.select.int, entries.whole, 1, at), mask, at)

    def _padded(self, node: Node, data: Node, mask: Node, own: Node) -> Node:
        return self._whole(self._entries_of(data, mask), mask)

    def _step(self, node: Node, data: Node, mask: Node, own: Node, source: Node, at: int) -> Node:
        return self._of(self._entry(self._entries_of(data, mask), mask, at), mask, at)

    def _put_step(self, node: Node, data: Node, values: Node, mask: Node, own: Node, at: int) -> Node | None:
        entries = self._entries_of(data, mask)
        self.entries[node] = _Entries(entries.whole, mask, {**entries.steps, at: values})
        return self._flat(node)

    def _first(self, node: Node, x: Node, mask: Node, source: Node, at: int) -> Node:
        flags = self._flags(mask, x, at)
        return self._of(called(self.graph, aten.where.ScalarOther, flags, self._of(x, mask, None), 0), mask, at)

    def _put_first(self, node: Node, out: Node, values: Node, mask: Node, at: int, of: int) -> Node:
        flags = self._flags(mask, out, at)
        plain = (self._of(v, mask, None) for v in (values, out))
        return self._of(called(self.graph, aten.where.self, flags, *plain), mask, of)


def _proved(graph: Graph) -> bool:
    """Whether the rows of each step are by themselves."""
    region: dict[Node, tuple[Node, int]] = {}
    for node in graph.nodes:
        if node.target is step_rows:
            _, mask, at = node.args
            if mask in region:
                return False
            if at is not None:
                region[node] = (mask, at)
            continue
        found = {region[n] for n in node.all_input_nodes if n in region}
        if not found:
            continue
        if len(found) > 1 or node.op != "call_function" or keeps(node) or _refused(node):
            return False
        (region[node],) = found
        if mixed(node, region) or rowless(node) or (region[node][1] == _ALL and not _by_entry(node)):
            return False
    return True


def _refused(node: Node) -> bool:
    return node.target in (kept_rows, sorted_rows, unsorted_rows)


def _by_entry(node: Node) -> bool:
    """Whether an op on all packed entries treats each by itself."""
    target = node.target
    plain = isinstance(target, OpOverload) and _POINTWISE in target.tags
    return plain or target in (aten.linear.default, aten.sym_size.int)
