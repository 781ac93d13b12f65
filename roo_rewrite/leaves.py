"""Opaque leaves: what cannot or should not be traced is called as it is.

A leaf is a submodule, an `autograd.Function` with a backward of its own, or a function (see `methods`). While
tracing, its call is one custom op, `roo::leaf(tensors, site)`; its output shapes come from running the real thing
at two batch sizes. In the emitted model the site calls the real submodule, found by its path, so that it may be
replaced (sharded, say) later. Whether a leaf is row-wise is shown in `probing`.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError, InputError
from roo_rewrite.functions import calls_intercepted, functions_intercepted
from roo_rewrite.methods import Leaf, Start, Submodule, Unfit, check_values, marked, witnessed
from roo_rewrite.packed import Steps, lengths_of, loosened, tightened

_SITES: list[LeafSite] = []
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Module prefixes of Functions that belong to the tracer itself.
_TRACER = ("torch._", "torch.fx", "torch.export", "torch.autograd")


class OtherSizesError(InputError):
    """A leaf gives other sizes than those its trace was built on."""


Function = type[torch.autograd.Function] | types.FunctionType | None


@dataclass
class LeafSite:
    """One call of a leaf in the traced forward: of the submodule at `path`, or of `function`.

    shapes: of every output tensor, at the two batch sizes of `batches`; given: of every input tensor.
    packed: whether it takes packed sequences.
    """

    path: str
    function: Function = None
    packed: bool = False
    batches: tuple[int, int] = (0, 0)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    given: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    in_tree: pytree.TreeSpec | None = None
    in_values: list[Any] = field(default_factory=list)
    out_tree: pytree.TreeSpec | None = None
    out_values: list[Any] = field(default_factory=list)
    observed: list[list[Tensor]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> LeafSite:
        # Only ever written while capturing; a copied model shares it.
        return self

    @property
    def label(self) -> str:
        """What to call it in messages."""
        if self.function is None:
            return f"leaf {self.path!r}"
        return f"{'function' if self.called else 'autograd.Function'} {self.function.__qualname__}"

    def _steps(self) -> set[int]:
        """Which of the output tensors are the steps of packed sequences."""
        assert self.out_tree is not None
        tree = pytree.tree_unflatten(self.out_values, self.out_tree)
        found = [v for v in pytree.tree_leaves(tree, is_leaf=lambda v: isinstance(v, Steps)) if isinstance(v, Steps)]
        tensors = [v for v in self.out_values if isinstance(v, Tensor)]
        return {i for i, t in enumerate(tensors) if any(v.steps is t for v in found)}

    @property
    def checked(self) -> bool:
        """Whether it was observed: what it gives is then held against those sizes. A TorchRec lookup knows its own."""
        return bool(self.shapes)

    @property
    def called(self) -> bool:
        """Whether it is a plain function."""
        return isinstance(self.function, types.FunctionType)

    def leaf(self) -> Leaf:
        """What was chosen to be a leaf."""
        return cast(Leaf, self.function) if self.called else self.path

    def call(self, root: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the real leaf of `root` on these tensors and returns its output tensors."""
        assert self.in_tree is not None
        stock = iter(tensors)
        values = [next(stock) if isinstance(v, Tensor) else v for v in self.in_values]
        values = [v.of(root) if isinstance(v, Submodule) else v for v in values]
        args, kwargs = given = pytree.tree_unflatten(values, self.in_tree)
        if self.packed:
            args, kwargs = tightened(given)
        target: Any = root.get_submodule(self.path) if self.function is None else self.function
        out = (target if self.called or not self.function else target.apply)(*args, **kwargs)
        return tensors_of(loosened(out, lengths_of(given)[0]) if self.packed else out)

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Raises OtherSizesError where it gives other sizes than those its trace was built on."""
        steps = self._steps()
        if len(outputs) != len(self.shapes):
            raise OtherSizesError(f"{self.label} gives {len(outputs)} tensors, not {len(self.shapes)}")
        for at, (out, (first, second)) in enumerate(zip(outputs, self.shapes)):
            other = [d for d, (a, b) in enumerate(zip(first, second)) if a == b and (d != 1 or at not in steps)]
            if out.ndim != len(first) or any(out.shape[d] != first[d] for d in other):
                raise OtherSizesError(f"{self.label} gives {list(out.shape)}, not {list(first)} as for the example")

    def fake(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the right shapes for traced inputs."""
        one, two = self.batches
        batch: Any = next(
            (
                s
                for t, (first, _) in zip(tensors, self.given)
                for s, a in zip(t.shape, first)
                if isinstance(s, torch.SymInt) and a == one
            ),
            None,
        )
        assert self.in_tree is not None
        stock, steps = iter(tensors), self._steps()
        values = [next(stock) if isinstance(v, Tensor) else v for v in self.in_values]
        total = lengths_of(pytree.tree_unflatten(values, self.in_tree))[0] if self.packed else None
        outputs = []
        for at, ((first, second), dtype) in enumerate(zip(self.shapes, self.dtypes)):
            shape: list[Any] = []
            for dim, (a, b) in enumerate(zip(first, second)):
                if at in steps and dim == 1:
                    shape.append(total)
                elif a == b:
                    shape.append(a)
                elif batch is not None and a % one == 0 and b == (a // one) * two:
                    shape.append(batch * (a // one))
                else:
                    shape.append(torch.library.get_ctx().new_dynamic_size())
            outputs.append(tensors[0].new_empty(shape, dtype=dtype) if tensors else torch.empty(shape, dtype=dtype))
        return outputs


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensor leaves of a pytree, in order."""
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


def add_site(sites: list[LeafSite], site: LeafSite) -> int:
    """A call met while tracing: its number for the op `roo::leaf`."""
    sites.append(site)
    _SITES.append(site)
    return len(_SITES) - 1


@torch.library.custom_op("roo::leaf", mutates_args=())
def leaf_op(tensors: list[Tensor], site: int) -> list[Tensor]:
    """Stands for a leaf call while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::leaf exists only while tracing")


@leaf_op.register_fake
def _leaf_shapes(tensors: list[Tensor], site: int) -> list[Tensor]:
    return _SITES[site].fake(tensors)


Handle = Callable[[str, Function, Callable[..., Any], Any, Any], Any]


@contextlib.contextmanager
def intercepted(model: nn.Module, leaves: Sequence[Leaf], handle: Handle) -> Iterator[None]:
    """While active, calls of the leaves go to `handle(path, function, real, args, kwargs)`.

    A leaf's call is all of it, hooks included. Within a leaf nothing is intercepted.
    """
    busy = False

    def guarded(path: str, function: Any, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal busy
        if busy:
            return real(*args, **kwargs)
        busy = True
        try:
            return handle(path, function, real, args, kwargs)
        finally:
            busy = False

    def apply(real: Callable[..., Any], cls: type, args: Any, kwargs: Any) -> Any:
        if cls.__module__ == "torch.utils.checkpoint":
            return args[0](*args[2:]) if cls.__name__ == "CheckpointFunction" else real(cls, *args, **kwargs)
        if cls.__module__.startswith(_TRACER):
            return real(cls, *args, **kwargs)
        return guarded("", cls, functools.partial(real, cls), args, kwargs)

    def plain(function: types.FunctionType, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return guarded("", function, real, args, kwargs)

    modules = {p: model.get_submodule(p) for p in leaves if isinstance(p, str)}
    try:
        for path, module in modules.items():
            module.__dict__["_compiled_call_impl"] = lambda *a, _p=path, _m=module, **k: guarded(
                _p, None, _m._call_impl, a, k
            )
        own = [f for f in leaves if isinstance(f, types.FunctionType)]
        with functions_intercepted(apply), calls_intercepted(own, plain):
            yield
    finally:
        for module in modules.values():
            module.__dict__.pop("_compiled_call_impl", None)


@contextlib.contextmanager
def observed(model: nn.Module, leaves: Sequence[Leaf], sites: list[LeafSite], second: bool) -> Iterator[None]:
    """While active, real calls of the leaves are noted in `sites`, in calling order."""
    count, start = iter(range(10**9)), list[Start]()

    def note(path: str, function: Any, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        held = tensors_of((args, kwargs))
        versions = [t._version for t in held]
        loose = loosened((args, kwargs))
        values, tree = pytree.tree_flatten(loose)
        copies = [v.detach().clone() for v in values if isinstance(v, Tensor)]
        totals = lengths_of(loose)
        site = LeafSite(path, function, bool(totals), in_tree=tree, in_values=marked(values, model))
        with witnessed(function, start[0]) if site.called else contextlib.nullcontext():
            made = real(*args, **kwargs)
        if [t._version for t in held] != versions:
            raise Unfit(site.leaf(), f"{site.label} writes into its inputs")
        if site.called:
            check_values(function, values, pytree.tree_leaves(made), model)
        out = loosened(made, totals[0]) if totals else made
        _note(sites, next(count), site, copies, out, second)
        return made

    with intercepted(model, leaves, note):
        start.append(Start(model))
        yield


def _note(sites: list[LeafSite], at: int, site: LeafSite, given: list[Tensor], out: Any, second: bool) -> None:
    outputs = tensors_of(out)
    if not second:
        site.out_values, site.out_tree = pytree.tree_flatten(out)
        site.shapes = [(tuple(t.shape), tuple(t.shape)) for t in outputs]
        site.given = [(tuple(t.shape), tuple(t.shape)) for t in given]
        site.dtypes = [t.dtype for t in outputs]
        site.observed = [given, [t.detach().clone() for t in outputs]]
        sites.append(site)
        return
    known = sites[at] if at < len(sites) else None
    if known is None or (known.path, known.function) != (site.path, site.function) or not _alike(known, site, out):
        raise Unfit(site.leaf(), f"{site.label} is called differently at different batch sizes")
    known.shapes = [(a, tuple(t.shape)) for (a, _), t in zip(known.shapes, outputs)]
    known.given = [(a, tuple(t.shape)) for (a, _), t in zip(known.given, given)]


def _alike(known: LeafSite, site: LeafSite, out: Any) -> bool:
    """Whether two calls differ in their tensors only."""
    made, tree = pytree.tree_flatten(out)
    if (known.out_tree, known.in_tree) != (tree, site.in_tree):
        return False
    return _same_values(known.in_values, site.in_values) and _same_values(known.out_values, made)


def _same_values(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two lists of arguments differ in their tensors only."""
    return all(
        isinstance(a, Tensor) == isinstance(b, Tensor) and (isinstance(a, Tensor) or a is b or bool(a == b))
        for a, b in zip(one, two, strict=True)
    )


@contextlib.contextmanager
def opaque(model: nn.Module, leaves: Sequence[Leaf], sites: list[LeafSite]) -> Iterator[None]:
    """While active, each leaf's call is the op `roo::leaf`; the k-th call stands for `sites[k]`."""
    _SITES[:] = sites
    count = iter(range(len(sites)))

    def stand_in(path: str, function: Any, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        at = next(count, None)
        if at is None or (sites[at].path, sites[at].function) != (path, function):
            raise CaptureError("a leaf is called otherwise while tracing than when run")
        given, tree = pytree.tree_flatten(loosened((args, kwargs)))
        tensors, site = [v for v in given if isinstance(v, Tensor)], sites[at]
        if len(tensors) != sum(isinstance(v, Tensor) for v in site.in_values) or tree != site.in_tree:
            raise RuntimeError(f"{site.label} takes what the trace keeps in another form, a packed sequence say")
        if any(isinstance(v, _SYMBOLS) for v in given) or not _same_values(site.in_values, marked(given, model)):
            raise Unfit(site.leaf(), f"{site.label} takes a number that depends on the batch")
        outputs = iter(torch.ops.roo.leaf(tensors, at))
        assert site.out_tree is not None
        values = [next(outputs) if isinstance(v, Tensor) else v for v in site.out_values]
        return tightened(pytree.tree_unflatten(values, site.out_tree))

    try:
        with intercepted(model, leaves, stand_in):
            yield
    finally:
        _SITES.clear()


@contextlib.contextmanager
def frozen_buffers(module: nn.Module) -> Iterator[None]:
    """Puts the module's buffers back as they were."""
    saved = [(b, b.clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def default_leaves(model: nn.Module) -> list[str]:
    """Paths of the modules that are leaves by nature.

    TorchRec's sharded embedding modules, and modules with backward hooks, which a trace loses.
    """
    names = {"ShardedEmbeddingBagCollection", "ShardedEmbeddingCollection"}
    torchrec = [
        p for p, m in model.named_modules() if p and type(m).__name__ in names and "torchrec" in type(m).__module__
    ]
    hooked = [p for p, m in model.named_modules() if p and (m._backward_hooks or m._backward_pre_hooks)]
    return outermost([*torchrec, *hooked])


def outermost(paths: Sequence[str]) -> list[str]:
    """The paths that lie under no other of them."""
    unique = list(dict.fromkeys(paths))
    return [p for p in unique if not any(p.startswith(f"{q}.") for q in unique)]
