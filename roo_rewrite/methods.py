"""Functions and methods as leaves: where a trace fails in one that forward calls itself, its call is one op.

    def forward(self, items, x):
        nodes, edges = self.graph(items)      NumPy, or a loop over the rows: what it takes and gives is kept
        return self.score(self.net(nodes, edges), x)      and this is traced

A call may stand for itself only where what it takes and gives is all there is to it. A method shares an object with
the code around it, so each of these is looked at while the model runs, and what does not hold makes it `Unfit`:

- it takes tensors, plain values and submodules of the model, and gives tensors;
- its tensors have one dim of the batch's size, or none, also when it is called with a few of the rows;
- what it gives shares no memory with what it takes;
- forward changed nothing in the model before it, and it changes nothing itself;
- a copy of the model that has never run gives the same, and so does one that ran on other rows.

Then the next larger call, up to the module, is tried.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from roo_rewrite.errors import CaptureError
from roo_rewrite.outlook import Outlook, reads
from roo_rewrite.swallowed import foreign

if TYPE_CHECKING:
    from roo_rewrite.leaves import LeafSite

Leaf = str | types.FunctionType
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)
_ODD = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Unfit(CaptureError):  # noqa: N818 - a verdict on `leaf`, a path or a function; another is tried
    """This cannot be a leaf."""

    def __init__(self, leaf: Leaf, message: str):
        super().__init__(message)
        self.leaf = leaf


@dataclass(frozen=True)
class Submodule:
    """Stands for the submodule at `path` among the arguments of a call."""

    path: str

    def of(self, root: nn.Module) -> nn.Module:
        """The submodule of `root`, or of the original that `root` was rewritten from."""
        original = vars(root).get("_original", root)
        assert isinstance(original, nn.Module)
        return original.get_submodule(self.path)


def named(leaf: Leaf) -> str:
    """What to call a leaf in messages."""
    return f"module {leaf!r}" if isinstance(leaf, str) else f"function {leaf.__qualname__!r}"


def failed_in(model: nn.Module, error: BaseException) -> Iterator[Leaf]:
    """The modules and functions that the error passed through, innermost first."""
    # The tracer may run a stand-in for a module, of another identity but with the same attributes.
    paths = {id(vars(m)): p for p, m in model.named_modules()}
    frames, trace = list[types.FrameType](), error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        path = paths.get(id(getattr(owner, "__dict__", None)))
        if path is not None and frame.f_code.co_name in ("forward", "_traced"):
            if path and not isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
                yield path
        elif not foreign(frame.f_code.co_filename):
            found = _located(frame)
            if found is not None and not found.__code__.co_flags & _ODD:
                yield found


def _located(frame: types.FrameType) -> types.FunctionType | None:
    """The function that a frame runs, found by its name in its module or the class of its first argument."""
    code = frame.f_code
    held: Any = types.SimpleNamespace(**{k: v for k, v in frame.f_globals.items() if k.isidentifier()})
    for name in code.co_qualname.split("."):
        held = inspect.getattr_static(held, name, None)
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    of_class = [vars(c).get(code.co_name) for c in type(first).__mro__]
    for value in (held, *of_class):
        value = getattr(value, "__func__", value)
        while isinstance(value, types.FunctionType):
            if value.__code__ is code:
                return value
            value = getattr(value, "__wrapped__", None)
    return None


class Start:
    """The model as it is when its forward begins."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.outlook = _whole(model)
        self.buffers = [(m, k, b, b._version) for m in model.modules() for k, b in m._buffers.items() if b is not None]

    def written(self) -> set[tuple[int, str]]:
        """The buffers that are no longer as they were: the id of their module and their name."""
        return {(id(m), k) for m, k, b, version in self.buffers if m._buffers[k] is not b or b._version != version}


def _whole(model: nn.Module) -> Outlook:
    found = Outlook()
    ours = {"_compiled_call_impl"}  # of modules that are leaves
    found.look(model, (), {path: set(vars(m)) - ours for path, m in model.named_modules()}, ())
    return found


@contextlib.contextmanager
def witnessed(function: types.FunctionType, start: Start) -> Iterator[None]:
    """Around a real call of `function`. Raises Unfit where more goes in or out than arguments and results."""
    name = named(function)
    if start.outlook.changed():
        raise Unfit(function, f"forward sets attributes before it calls {name}")
    before = Start(start.model)
    dirty = start.written()
    with reads() as found:
        yield
    if before.outlook.changed() or before.written():
        raise Unfit(function, f"{name} changes attributes or buffers")
    if any(key in found.get(module, ()) for module, key in dirty):
        raise Unfit(function, f"{name} reads a buffer that forward has written")


def marked(values: Sequence[Any], model: nn.Module) -> list[Any]:
    """The arguments of a call, submodules of `model` as what stands for them."""
    paths = {id(m): p for p, m in model.named_modules()}
    return [Submodule(paths[id(v)]) if isinstance(v, nn.Module) and id(v) in paths else v for v in values]


def check_values(function: types.FunctionType, given: Sequence[Any], made: Sequence[Any], model: nn.Module) -> None:
    """Raises Unfit where a call takes or gives what has no place in a graph."""
    odd = [v for v in marked(given, model) if not isinstance(v, (Tensor, Submodule, *_PLAIN))]
    odd += [v for v in made if not isinstance(v, (Tensor, type(None)))]
    if odd:
        raise Unfit(function, f"{named(function)} takes or gives a {type(odd[0]).__name__}")
    tensors = [v for v in given if isinstance(v, Tensor)]
    memory = {_memory(t) for t in (*tensors, *model.parameters(), *model.buffers()) if t.numel()}
    for out in made:
        if isinstance(out, Tensor) and _memory(out) in memory:
            raise Unfit(function, f"{named(function)} gives what it takes, a parameter, or a view of one")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def confirm(site: LeafSite, copies: Sequence[nn.Module]) -> None:
    """Calls the function of a site again, with what it was called with and with a few of its rows.

    copies: of the model, one that never ran and one that ran on other rows. Raises Unfit.
    """
    function = site.function
    assert isinstance(function, types.FunctionType)
    dims = [_rows(function, pair, site.batches) for pair in site.given]
    places = [_rows(function, pair, site.batches) for pair in site.shapes]
    if max(dims, default=-1) < 0:
        raise Unfit(function, f"{named(function)} takes no rows")
    tensors, outputs = site.observed
    for copied in copies:
        before = torch.get_rng_state()
        again = site.call(copied, [t.clone() for t in tensors])
        if torch.equal(before, torch.get_rng_state()) and not _same(again, outputs):
            raise Unfit(function, f"{named(function)} knows more than its arguments")
    for rows in (torch.tensor(r) for r in _FEW):
        few = [t.index_select(d, rows) if d >= 0 else t.clone() for t, d in zip(tensors, dims)]
        try:
            made = [list(t.shape) for t in site.call(copies[0], few)]
        except Exception:  # rows that the original refuses say nothing
            continue
        want = [list(t.index_select(d, rows).shape if d >= 0 else t.shape) for t, d in zip(outputs, places)]
        if made != want:
            raise Unfit(function, f"{named(function)} gives {made} for {len(rows)} rows, not {want}")


_FEW = (*([row, row] for row in range(8)), [2, 0, 1])


def _rows(function: types.FunctionType, shapes: tuple[Sequence[int], Sequence[int]], batches: Sequence[int]) -> int:
    """The dim of the batch in a tensor of these shapes at two batch sizes, -1 for none. Raises Unfit."""
    first, second = shapes
    moved = [d for d, (a, b) in enumerate(zip(first, second)) if a != b]
    if len(first) != len(second) or any((first[d], second[d]) != tuple(batches) for d in moved) or len(moved) > 1:
        raise Unfit(function, f"{named(function)} takes or gives tensors without one dim of the batch's size")
    return moved[0] if moved else -1


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal beyond rounding."""
    return len(one) == len(two) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(one, two)
    )
