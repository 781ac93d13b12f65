"""Rows removed by a mask and put back, traced with all rows.

    y = x[mask]          the rows of x that `mask [B]` keeps
    out[mask] = f(y)     each result in its row again

How many rows are kept is for data to say, and no trace can ask for it. Traced are all B rows, with a kept row in the
place of each that is not (`kept_rows`), and those results are not put back: `out = where(mask, f(y), out)`. Where f is
row-wise that is the same, and f sees no row that it would not have seen. While tracing, the kept rows have a size of
their own, so that neither forward nor the trace mistakes it for the batch's; then it is put for that. That f is
row-wise is proved in `passes.kept_regions`; else the model is captured again without this.

    masked_select(x, mask.view(-1, 1)).view(-1, n)      the same rows as `x[mask]`
    x[steps == last]      entries of x `[B, T, ...]`, where each row has one: `marked_entries`

That each row has one is seen when the model is run, and asked of every batch.

    if mask.any(): out[mask] = f(x[mask])      goes in; a batch where it would not runs on the original: `some_rows`
"""

from __future__ import annotations

import contextlib
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError
from roo_rewrite.flags import Flags, column
from roo_rewrite.nodes import replaced
from roo_rewrite.ops.kept import kept_rows, marked_entries, some_rows
from roo_rewrite.swallowed import asking

aten = torch.ops.aten
_SELECTS = (torch.masked_select, torch.Tensor.masked_select)
_ANY = (torch.any, torch.Tensor.any)


@torch.library.custom_op("roo::kept_source", mutates_args=())
def source_op(mask: Tensor) -> Tensor:
    """Stands for the numbers of the kept rows while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::kept_source exists only while tracing")


@source_op.register_fake
def _source_shape(mask: Tensor) -> Tensor:
    return mask.new_empty((torch.library.get_ctx().new_dynamic_size(min=2),), dtype=torch.long)


@torch.library.custom_op("roo::put_rows", mutates_args=())
def put_op(out: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Stands for `out` with the kept rows written over while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::put_rows exists only while tracing")


@put_op.register_fake
def _put_shape(out: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("roo::marked_entries", mutates_args=())
def marked_op(x: Tensor, mask: Tensor) -> Tensor:
    """Stands for the entry that a mask marks in each row while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::marked_entries exists only while tracing")


@marked_op.register_fake
def _marked_shape(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:1], *x.shape[2:]))


@torch.library.custom_op("roo::some_rows", mutates_args=())
def some_op(x: Tensor, mask: Tensor) -> Tensor:
    """Stands for x, of a batch where a mask is true of some row, while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::some_rows exists only while tracing")


@some_op.register_fake
def _some_shape(x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(x)


class Masked:
    """Whether rows that a mask keeps are traced so (`wanted`), and whether there were any (`used`).

    singly: the lines that take entries by a mask over rows and steps -> whether each row had one when they were run.
    """

    def __init__(self, wanted: bool):
        self.wanted, self.used = wanted, False
        self.singly: dict[tuple[str, int], bool] = {}
        self._tracing: _KeptRows | None = None

    def rows(self, size: int, tracing: bool) -> contextlib.AbstractContextManager[Any]:
        """While active, on a batch of `size` rows it is done so."""
        if not self.wanted:
            return contextlib.nullcontext()
        made = _KeptRows(self, size, tracing)
        self._tracing = made if tracing else None
        return made

    def assured(self, values: list[Any]) -> list[Any]:
        """What a traced forward returns; on a batch where an answer of the trace does not hold, it raises.

        Raises CaptureError where a mask that was asked for any row keeps none of them.
        """
        promised = self._tracing.promised if self._tracing is not None else {}
        if not promised:
            return values
        assert self._tracing is not None
        tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        written = any(mask._version != version for mask, version in promised.values())
        if written or not tensors or not set(promised) <= set(self._tracing.sources):
            raise CaptureError("forward asks whether a mask is true anywhere, and keeps no rows by it")
        at = next(
            (i for i in tensors if values[i].ndim and _hint(values[i].shape[0]) == self._tracing.rows), tensors[0]
        )
        made = values[at]
        for mask, _ in promised.values():
            made = torch.ops.roo.some_rows(made, mask)
        return [*values[:at], made, *values[at + 1 :]]


class _KeptRows(TorchFunctionMode):
    """`x[mask]` and `out[mask] = y` on a batch of `rows` rows, as above."""

    def __init__(self, masked: Masked, rows: int, tracing: bool):
        super().__init__()
        self.masked, self.rows, self.tracing = masked, rows, tracing
        self.sources: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.promised: dict[int, tuple[Tensor, int]] = {}
        self.flags = Flags()
        self._any: dict[int, tuple[Tensor, Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple) and self._leads(*args):
            args = (args[0][(slice(None), *args[1][1:])], args[1][0])
        if func is torch.Tensor.__getitem__ and self._masked(*args):
            return self._taken(*args)
        if self.tracing and getattr(func, "__name__", "") == "__bool__" and id(args[0]) in self._any:
            return self._promise(*self._any[id(args[0])])
        if func in _SELECTS and not kwargs and self._column(*args):
            return self._taken(*args).reshape(-1)
        if func is torch.Tensor.__getitem__ and self._marks(*args):
            self.masked.used = True
            return torch.ops.roo.marked_entries(*args)
        if func is torch.Tensor.__setitem__ and self._masked(*args[:2]) and self._kept(*args):
            out, mask, values = args
            mask = self.flags.first(mask)
            put = (
                torch.ops.roo.put_rows(out, mask, values)
                if self.tracing
                else torch.where(_over(mask, out), values, out)
            )
            out.copy_(put)
            return None
        result = func(*args, **(kwargs or {}))
        if self.tracing and not kwargs:
            self.flags.note(getattr(func, "__name__", ""), args, result)
            if func in _ANY and len(args) == 1 and self._masked(args[0], args[0]):
                self._any[id(result)] = result, args[0], args[0]._version
        return result

    def _promise(self, answer: Tensor, mask: Tensor, version: int) -> bool:
        """Whether a mask keeps any row: it does in all batches but those that run on the original."""
        self.masked.used = True
        if answer._version or mask._version != version:
            raise CaptureError("forward asks what was written to since")
        first = self.flags.first(mask)
        self.promised[id(first)] = first, first._version
        return True

    def _leads(self, x: Tensor, index: tuple[Any, ...]) -> bool:
        """Whether a mask over the batch comes first in an index, with nothing but slices and numbers behind."""
        plain = all(i is None or i is Ellipsis or isinstance(i, slice) or type(i) is int for i in index[1:])
        return plain and len(index) > 1 and self._masked(x, index[0])

    def _taken(self, x: Tensor, mask: Tensor) -> Tensor:
        """The rows of x that a mask keeps."""
        self.masked.used = True
        if not self.tracing:
            return kept_rows(x, mask.reshape(-1))
        return x.index_select(0, self._source(mask))

    def _column(self, x: Tensor, mask: Tensor) -> bool:
        """Whether a mask of as many dims as x takes whole rows of it."""
        if mask.ndim != x.ndim or x.ndim < 2 or not column(mask):
            return False
        flat = self.flags.first(mask) if self.tracing else mask.reshape(-1)
        return self._masked(x, flat)

    def _marks(self, x: Tensor, mask: Any) -> bool:
        """Whether a mask over rows and steps marks one entry of each row, wherever the model was run."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2 or x.ndim < 2:
            return False
        if self.tracing:
            return self.masked.singly.get(asking(), False) and _symbols(mask) == _symbols(x)[:2]
        if self.rows == mask.shape[0] and mask.shape == x.shape[:2]:
            line = asking()
            self.masked.singly[line] = self.masked.singly.get(line, True) and bool((mask.sum(1) == 1).all())
        return False

    def _masked(self, x: Any, index: Any) -> bool:
        """Whether an index is one mask over the batch, the first dim of x."""
        plain = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == 1 and x.ndim > 0
        return plain and _hint(index.shape[0]) == _hint(x.shape[0]) == self.rows

    def _kept(self, out: Tensor, mask: Tensor, values: Any) -> bool:
        """Whether values have a row for each that is kept."""
        if not isinstance(values, Tensor) or values.ndim != out.ndim:
            return False
        if not self.tracing:
            return values.shape[0] == self.rows
        mask = self.flags.first(mask)
        known = self.sources.get(id(mask))
        return known is not None and known[1] == mask._version and _symbols(values)[0] == _symbols(known[2])[0]

    def _source(self, mask: Tensor) -> Tensor:
        mask = self.flags.first(mask)
        known = self.sources.get(id(mask))
        if known is None or known[1] != mask._version:
            known = self.sources[id(mask)] = (mask, mask._version, torch.ops.roo.kept_source(mask))
        return known[2]


def _hint(size: int | torch.SymInt) -> int | None:
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.has_hint() else None
    return size


def _symbols(x: Tensor) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in x.shape]


def _over(mask: Tensor, out: Tensor) -> Tensor:
    return mask.view([-1] + [1] * (out.ndim - 1))


def settled(graph: Graph, bodies: nn.Module, batch: sympy.Symbol | None, rows: int) -> bool:
    """Puts all rows in the place of the kept ones, in a graph traced on `rows` of them. False where there are none.

    bodies: holds the graphs of higher-order ops. batch: the trace's symbol of the batch.

    Raises CaptureError where the kept rows of one graph go into another.
    """
    graphs = [graph, *(m.graph for m in bodies.modules() if m is not bodies and isinstance(m, GraphModule))]
    sources = [n for g in graphs for n in g.nodes if n.target is torch.ops.roo.kept_source.default]
    marks = [n for g in graphs for n in g.nodes if n.target is torch.ops.roo.marked_entries.default]
    if not (sources or marks) or batch is None:
        return False
    for node in marks:
        replaced(node.graph, node, marked_entries, *node.args)
    for node in [n for n in graph.nodes if n.target is torch.ops.roo.some_rows.default]:
        replaced(graph, node, some_rows, *node.args)
    nodes = [n for g in graphs for n in g.nodes]
    sizes = {n.meta["val"].shape[0].node.expr: batch for n in sources}
    for node in nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(lambda v: _resized(v, sizes, rows), node.meta["val"])
            node.meta.pop("unbacked_bindings", None)
    for node in nodes:
        if node.target is aten.index_select.default and node.args[2] in sources:
            replaced(node.graph, node, kept_rows, node.args[0], node.args[2].args[0])
        elif node.target is torch.ops.roo.put_rows.default:
            _put(node.graph, node)
    for node in sources:
        mask: Any = node.args[0]
        for user in list(node.users):  # how many there are is told by kept rows: that is of their region, too
            if not isinstance(user.target, OpOverload):
                raise CaptureError("the rows that a mask keeps go into a region of their own")
            with node.graph.inserting_before(user):
                kept = node.graph.call_function(kept_rows, (mask, mask))
            kept.meta = dict(mask.meta)
            replaced(node.graph, user, user.target, kept, *user.args[1:])
        node.graph.erase_node(node)
    return True


def _put(graph: Graph, node: Node) -> None:
    out, mask, values = node.args
    assert isinstance(out, Node)
    assert isinstance(mask, Node)
    shape = [-1] + [1] * (out.meta["val"].ndim - 1)
    with graph.inserting_before(node):
        over = graph.call_function(aten.view.default, (mask, shape))
    flag = mask.meta["val"]
    over.meta = {**node.meta, "val": flag.as_strided([flag.shape[0], *shape[1:]], [1] * len(shape))}
    replaced(graph, node, aten.where.self, over, values, out)


def _resized(value: Any, sizes: dict[Any, sympy.Symbol], rows: int) -> Any:
    """A traced value whose sizes in terms of `sizes` are in terms of the batch."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        if not expr.free_symbols & set(sizes):
            return value
        env: ShapeEnv = value.node.shape_env
        swapped = expr.subs(sizes)
        hint = swapped.subs(dict.fromkeys(sizes.values(), rows))
        return env.create_symintnode(swapped, hint=int(hint) if hint.is_Integer else None)
    if not isinstance(value, Tensor):
        return value
    shape, stride = ([_resized(s, sizes, rows) for s in part] for part in (value.shape, value.stride()))
    if all(a is b for a, b in zip([*value.shape, *value.stride()], [*shape, *stride])):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
