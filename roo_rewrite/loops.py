"""Loops over the steps of a packed sequence, traced padded.

    data, sizes, order, places = packed         rows sorted by length; sizes[t] of them have a step t
    for size in sizes:
        x = data[begin : begin + size]          the rows that have a step t
        h = cell(x, h[:size])                   of these the states so far
        out[begin : begin + size] = h
        last[:size] = h
        begin += size
    PackedSequence(out, sizes, order, places), last[places]

Data decides the sizes, and no trace can follow. Traced are all rows at all steps; an entry that is not there holds what
nobody reads. Each read and write above is one op while tracing, and gives rows of a size of their own, one for each
step, so that neither forward nor the trace mistakes them for others. `passes.packed_loops` proves that these rows are
worked on row by row and leave by such ops alone, and that nobody counts the steps; it says what the ops are. Else the
module is a leaf, as it is where it asks anything else of a packed sequence.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils import rnn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError
from roo_rewrite.kept import resized
from roo_rewrite.nodes import replaced
from roo_rewrite.packed import Padded, Unknown, untold

aten = torch.ops.aten


@torch.library.custom_op("roo::step_sources", mutates_args=())
def sources_op(mask: Tensor) -> list[Tensor]:
    """Stands for the numbers of all entries, then of the rows of each step, while tracing; it is never run."""
    raise RuntimeError("roo::step_sources exists only while tracing")


@sources_op.register_fake
def _sources(mask: Tensor) -> list[Tensor]:
    made = torch.library.get_ctx()
    return [mask.new_empty((made.new_dynamic_size(min=0),), dtype=torch.long) for _ in range(1 + int(mask.shape[1]))]


@torch.library.custom_op("roo::packed_data", mutates_args=())
def data_op(steps: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Stands for the entries of steps `[B, T, ...]` that mask has, packed, while tracing; it is never run."""
    raise RuntimeError("roo::packed_data exists only while tracing")


@data_op.register_fake
def _data(steps: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return steps.new_empty((*source.shape, *steps.shape[2:]))


@torch.library.custom_op("roo::padded_data", mutates_args=())
def padded_op(data: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    """Stands for packed entries, padded again, while tracing; it is never run. own: the mask they were packed by."""
    raise RuntimeError("roo::padded_data exists only while tracing")


@padded_op.register_fake
def _padded(data: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    return data.new_empty((*mask.shape, *data.shape[1:]))


@torch.library.custom_op("roo::step_rows", mutates_args=())
def step_op(data: Tensor, mask: Tensor, own: Tensor, source: Tensor, at: int) -> Tensor:
    """Stands for the rows of packed entries at a step while tracing; it is never run."""
    raise RuntimeError("roo::step_rows exists only while tracing")


@step_op.register_fake
def _step(data: Tensor, mask: Tensor, own: Tensor, source: Tensor, at: int) -> Tensor:
    return data.new_empty((*source.shape, *data.shape[1:]))


@torch.library.custom_op("roo::put_step", mutates_args=())
def put_step_op(data: Tensor, values: Tensor, mask: Tensor, own: Tensor, at: int) -> Tensor:
    """Stands for packed entries with a step written over while tracing; it is never run."""
    raise RuntimeError("roo::put_step exists only while tracing")


@put_step_op.register_fake
def _put_step(data: Tensor, values: Tensor, mask: Tensor, own: Tensor, at: int) -> Tensor:
    return torch.empty_like(data)


@torch.library.custom_op("roo::first_rows", mutates_args=())
def first_op(x: Tensor, mask: Tensor, source: Tensor, at: int) -> Tensor:
    """Stands for those rows of an earlier step that have this one, too, while tracing; it is never run."""
    raise RuntimeError("roo::first_rows exists only while tracing")


@first_op.register_fake
def _first(x: Tensor, mask: Tensor, source: Tensor, at: int) -> Tensor:
    return x.new_empty((*source.shape, *x.shape[1:]))


@torch.library.custom_op("roo::put_first_rows", mutates_args=())
def put_first_op(out: Tensor, values: Tensor, mask: Tensor, at: int, of: int) -> Tensor:
    """Stands for rows of step `of`, those that have step `at` written over, while tracing; it is never run."""
    raise RuntimeError("roo::put_first_rows exists only while tracing")


@put_first_op.register_fake
def _put_first(out: Tensor, values: Tensor, mask: Tensor, at: int, of: int) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("roo::in_order", mutates_args=())
def order_op(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Stands for all rows, sorted by length, while tracing; it is never run."""
    raise RuntimeError("roo::in_order exists only while tracing")


@order_op.register_fake
def _in_order(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return x.new_empty((*source.shape, *x.shape[1:]))


@torch.library.custom_op("roo::in_place", mutates_args=())
def place_op(x: Tensor, mask: Tensor) -> Tensor:
    """Stands for rows sorted by length, put back, while tracing; it is never run."""
    raise RuntimeError("roo::in_place exists only while tracing")


@place_op.register_fake
def _in_place(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((*mask.shape[:1], *x.shape[1:]))


@torch.library.custom_op("roo::packed_index", mutates_args=())
def index_op(like: Tensor) -> Tensor:
    """Stands for the order of rows sorted by length, or their places, while tracing; it is never run."""
    raise RuntimeError("roo::packed_index exists only while tracing")


@index_op.register_fake
def _index(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:1], dtype=torch.long)


# What may be told a number of rows as a size.
_SIZED: set[Any] = {aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_ones.default}
_SIZED |= {aten.view.default, aten.reshape.default, aten.expand.default, aten._assert_scalar.default}
_SIZED |= {operator.add, operator.sub, operator.mul}


class Loops:
    """Whether loops over packed steps are traced so (`wanted`), and whether there were any (`used`).

    upto: how many steps the longest row is taken to have; None for as many as there are.
    """

    def __init__(self, wanted: bool, upto: int | None = None):
        self.wanted, self.upto, self.used = wanted, upto, False


class _Sizes:
    """`batch_sizes` of a packed sequence: the first, and all in turn; how many there are is not told."""

    device = torch.device("cpu")

    def __init__(self, pack: _Pack, upto: int | None):
        self.pack, self._upto = pack, upto

    def __iter__(self) -> Iterator[Any]:
        return (s.shape[0] for s in self.pack.sources[1:][: self._upto])

    def __getitem__(self, at: Any) -> Any:
        if type(at) is not int or at != 0:
            raise untold("a size of a packed sequence but the first")
        return self.pack.sources[1].shape[0]


@dataclass(eq=False)
class _Pack:
    """One packing: its lengths, and the sizes it has while tracing. order, places: stand for its indices."""

    mask: Tensor
    lengths: Tensor
    sources: list[Tensor]
    order: Tensor
    places: Tensor
    symbols: list[sympy.Expr] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.symbols = [_symbol(s) for s in self.sources]

    def data(self, steps: Tensor) -> Tensor:
        made: Tensor = torch.ops.roo.packed_data(steps, self.mask, self.sources[0])
        return made


class Followed(TorchFunctionMode):
    """Reads and writes of the steps of packed sequences, as above."""

    def __init__(self, loops: Loops):
        super().__init__()
        self.loops, loops.used = loops, False
        self.packs = list[_Pack]()
        self._data = list[tuple[Padded, Tensor]]()
        self._seen = list[tuple[Tensor, int]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.packs and func is torch.Tensor.__getitem__:
            made = self._taken(*args)
            if made is not None:
                return made
        if self.packs and func is torch.Tensor.__setitem__ and self._put(*args):
            return None
        return func(*args, **(kwargs or {}))

    def fields(self, padded: Padded) -> tuple[Any, ...]:
        """data, batch_sizes, sorted_indices and unsorted_indices of a packed sequence."""
        if not self.loops.wanted or not isinstance(padded.mask.shape[1], int):
            return (Unknown(),) * 4
        self.loops.used = True
        pack = next((p for p in self.packs if p.mask is padded.mask), None)
        if pack is None:
            sources = torch.ops.roo.step_sources(padded.mask)
            order, places = (torch.ops.roo.packed_index(t) for t in (sources[1], padded.mask))
            pack = _Pack(padded.mask, padded.lengths, sources, order, places)
            self.packs.append(pack)
        data = next((d for p, d in self._data if p is padded), None)
        if data is None:
            data = pack.data(padded.steps)
            self._data.append((padded, data))
        return data, _Sizes(pack, self.loops.upto), pack.order, pack.places

    def packed(self, data: Tensor, sizes: _Sizes, order: Any = None, places: Any = None) -> Padded:
        """`PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)`."""
        pack = sizes.pack
        if order is not pack.order or places not in (None, pack.places):
            raise untold("a packed sequence of other rows than its sizes")
        own, at = self._of(data)
        if at != 0:
            raise untold("a packed sequence of other entries than its sizes")
        self._note(data)
        return Padded(torch.ops.roo.padded_data(data, pack.mask, own.mask), pack.lengths, pack.mask, self.fields)

    def _taken(self, x: Tensor, index: Any) -> Tensor | None:
        for pack in self.packs:
            if index is pack.places and self._is(x, pack, 1):
                return torch.ops.roo.in_place(x, pack.mask)  # type: ignore[no-any-return]
            if index is pack.order and _symbol(x) == _symbol(pack.mask):
                return torch.ops.roo.in_order(x, pack.mask, pack.sources[1])  # type: ignore[no-any-return]
        span = self._span(index)
        if span is None:
            return None
        pack, at, begin = span
        own, of = self._of(x)
        if of == 0:
            self._same_steps(pack, own, begin, at)
            made: Tensor = torch.ops.roo.step_rows(x, pack.mask, own.mask, pack.sources[at], at - 1)
        elif own is pack and of <= at and begin == 0:
            if of == at:
                return x
            made = torch.ops.roo.first_rows(x, pack.mask, pack.sources[at], at - 1)
        else:
            raise untold("rows of a packed sequence that do not go by its steps")
        self._note(x)
        self._note(made)
        return made

    def _put(self, out: Tensor, index: Any, values: Any) -> bool:
        span = self._span(index)
        if span is None:
            return False
        pack, at, begin = span
        if not isinstance(values, Tensor) or values.ndim != out.ndim or not self._is(values, pack, at):
            raise untold("what is not of the rows of a step is written to them")
        own, of = self._of(out)
        if of == 0:
            self._same_steps(pack, own, begin, at)
            out.copy_(torch.ops.roo.put_step(out, values, pack.mask, own.mask, at - 1))
        elif own is pack and of <= at and begin == 0:
            out.copy_(torch.ops.roo.put_first_rows(out, values, pack.mask, at - 1, of - 1))
        else:
            raise untold("rows of a packed sequence that do not go by its steps")
        return True

    def _same_steps(self, pack: _Pack, own: _Pack, begin: sympy.Expr, at: int) -> None:
        alike = len(own.symbols) == len(pack.symbols) and _symbol(own.mask) == _symbol(pack.mask)
        if not alike or begin != sympy.Add(*pack.symbols[1:at]):
            raise untold("entries of a packed sequence that are not those of a step")

    def _span(self, index: Any) -> tuple[_Pack, int, sympy.Expr] | None:
        """Which step's number of rows a slice is long, and where it begins."""
        if isinstance(index, tuple) and index and all(i == slice(None) for i in index[1:]):
            index = index[0]
        if not isinstance(index, slice):
            return None
        begin, end = (_expr(0 if v is None else v) for v in (index.start, index.stop))
        known = {s: (p, at) for p in self.packs for at, s in enumerate(p.symbols)}
        if begin is None or end is None or not (begin.free_symbols | end.free_symbols) & set(known):
            return None
        pack, at = known.get(sympy.expand(end - begin), (None, 0))
        if pack is None or at == 0 or index.step is not None:
            raise untold("rows of a packed sequence that are not those of a step")
        return pack, at, sympy.expand(begin)

    def _of(self, x: Tensor) -> tuple[_Pack, int]:
        """The packing whose rows x has: 0 for all of its entries, else those of a step, from 1."""
        found = next(((p, at) for p in self.packs for at in range(len(p.symbols)) if self._is(x, p, at)), None)
        if found is None:
            raise untold("rows that are not those of a packed sequence")
        return found

    def _is(self, x: Tensor, pack: _Pack, at: int) -> bool:
        return x.ndim > 0 and _symbol(x) == pack.symbols[at]

    def _note(self, x: Tensor) -> None:
        self._seen.append((x, x._version))

    def written(self) -> bool:
        """Whether something was written into after parts of it were read, or into the parts."""
        return any(x._version != version for x, version in self._seen)


def _expr(value: Any) -> sympy.Expr | None:
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.Integer(value) if isinstance(value, int) else None


def _symbol(x: Tensor) -> sympy.Expr | None:
    return _expr(x.shape[0]) if x.ndim else None


@contextlib.contextmanager
def followed(followed: Followed, model: nn.Module) -> Iterator[None]:
    """While active, packed sequences are made of what loops over them made, and `int(batch_sizes[0])` is that size."""
    original = rnn.PackedSequence.__new__

    def new(cls: Any, data: Any, batch_sizes: Any = None, *indices: Any, **named: Any) -> Any:
        if not isinstance(batch_sizes, _Sizes):
            return original(cls, data, batch_sizes, *indices, **named)
        named = {{"sorted_indices": "order", "unsorted_indices": "places"}[k]: v for k, v in named.items()}
        return followed.packed(data, batch_sizes, *indices, **named)

    def whole(value: Any = 0, *base: Any, **named: Any) -> Any:
        sizes = {s for p in followed.packs for s in p.symbols}
        kept = isinstance(value, torch.SymInt) and value.node.expr in sizes
        return value if kept else builtins.int(value, *base, **named)

    codes = [(f, f.__code__) for f in _methods(model) if _calls_int(f.__code__)]
    rnn.PackedSequence.__new__ = new  # type: ignore[method-assign]
    for function, code in codes:
        names = tuple(_WHOLE if n == "int" else n for n in code.co_names)
        function.__code__ = code.replace(co_names=names)
        function.__globals__[_WHOLE] = whole
    try:
        yield
    finally:
        rnn.PackedSequence.__new__ = original  # type: ignore[method-assign]
        for function, code in codes:
            function.__code__ = code
            function.__globals__.pop(_WHOLE, None)


_WHOLE = "_roo_whole_number"


def _methods(model: nn.Module) -> list[types.FunctionType]:
    """What the model's own modules define."""
    classes = {c for m in model.modules() for c in type(m).__mro__}
    own = [c for c in classes if not c.__module__.startswith(("torch.", "builtins"))]
    return [f for c in own for f in vars(c).values() if isinstance(f, types.FunctionType)]


def _calls_int(code: types.CodeType) -> bool:
    """Whether a function calls the `int` of Python, and does nothing else with it."""
    named = [i for i in dis.get_instructions(code) if i.argval == "int" and i.opname.startswith("LOAD_")]
    others = [i for i in dis.get_instructions(code) if i.argval == "int" and i not in named]
    calls = all(i.opname == "LOAD_GLOBAL" and (i.arg or 0) & 1 for i in named)  # with room for the callee's self
    return bool(named) and not others and calls


def settled(graph: Graph, bodies: nn.Module, followed: Followed, rows: int) -> None:
    """Puts all rows in the place of each step's, in a graph traced on `rows` of them.

    bodies: holds the graphs of higher-order ops.

    Raises CaptureError where their number is used as anything but a size, or they leave the graph.
    """
    found = [n for n in graph.nodes if n.target is torch.ops.roo.step_sources.default]
    if followed.written():
        raise CaptureError("a loop over packed steps writes into what it has read parts of")
    sizes: dict[sympy.Symbol, sympy.Expr] = {}
    for node in found:
        batch, longest = node.args[0].meta["val"].shape
        first, *others = (_symbol(v) for v in node.meta["val"])
        sizes |= {first: _expr(batch) * longest, **dict.fromkeys(others, _expr(batch))}
    for node in graph.nodes:
        _check(node, set(sizes))
    inner = [n for m in bodies.modules() if isinstance(m, GraphModule) and m is not bodies for n in m.graph.nodes]
    if any(_within(n, set(sizes)) for n in inner):
        raise CaptureError("rows of a packed step go into a region of their own")
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(lambda v: resized(v, sizes, rows), node.meta["val"])
            node.meta.pop("unbacked_bindings", None)
    for node in found:
        _plain_sizes(graph, node)


def _within(node: Node, symbols: set[sympy.Symbol]) -> bool:
    """Whether a value has a size, or is a number, in terms of the symbols."""
    found = [v for t in pytree.tree_leaves(node.meta.get("val")) for v in (t.shape if isinstance(t, Tensor) else (t,))]
    return any(v.node.expr.free_symbols & symbols for v in found if hasattr(v, "node"))


def _check(node: Node, symbols: set[sympy.Symbol]) -> None:
    sources = [n for n in node.all_input_nodes if _within(n, symbols)]
    numbers = [n for n in sources if not isinstance(n.meta["val"], (Tensor, list, tuple))]
    bound = node.target is operator.ge and node.args[1] == 0  # a check of the trace's own
    if numbers and node.target not in _SIZED and not bound:
        raise CaptureError("how many rows have a step is used as a number")
    if node.op == "output" and sources:
        raise CaptureError("rows of a packed step are returned")
    if node.target is torch.ops.roo.packed_index.default and node.users:
        raise CaptureError("the order of packed rows is used as numbers")
    if node.target is aten.squeeze.default and sources:
        raise CaptureError("rows of a packed step are squeezed, which of one row is something else")


def _plain_sizes(graph: Graph, sources: Node) -> None:
    """Sizes of the rows of a step are the batch's, those of all entries its product with the number of steps."""
    mask: Any = sources.args[0]
    batch, longest = mask.meta["val"].shape
    for part in sources.users:
        for user in [u for u in part.users if u.target is aten.sym_size.int]:
            with graph.inserting_before(user):
                size = graph.call_function(aten.sym_size.int, (mask, 0))
            size.meta = {**user.meta, "val": batch}
            replaced(graph, user, operator.mul, size, longest if part.args[1] == 0 else 1)
