"""Opaque leaves: what cannot or should not be traced is called as it is.

A leaf is a submodule, or an `autograd.Function` with a backward of its own. While tracing, its call is one
custom op, `roo::leaf(tensors, site)`; its output shapes come from running the real thing at two batch
sizes. In the emitted model the site calls the real submodule, found by its path, so that it may be
replaced (sharded, say) later. Whether a leaf is row-wise is shown in `probing`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError
from roo_rewrite.functions import functions_intercepted

_SITES: list[LeafSite] = []
# Module prefixes of Functions that belong to the tracer itself.
_TRACER = ("torch._", "torch.fx", "torch.export", "torch.autograd")


@dataclass
class LeafSite:
    """One call of a leaf in the traced forward: of the submodule at `path`, or of `function`.

    shapes: of every output tensor, at the two batch sizes of `batches`.
    """

    path: str
    function: type[torch.autograd.Function] | None = None
    batches: tuple[int, int] = (0, 0)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
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
        return f"leaf {self.path!r}" if self.function is None else f"autograd.Function {self.function.__qualname__}"

    def call(self, root: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the real leaf of `root` on these tensors and returns its output tensors."""
        assert self.in_tree is not None
        stock = iter(tensors)
        values = [next(stock) if isinstance(v, Tensor) else v for v in self.in_values]
        args, kwargs = pytree.tree_unflatten(values, self.in_tree)
        target: Callable[..., Any] = root.get_submodule(self.path) if self.function is None else self.function.apply
        return tensors_of(target(*args, **kwargs))

    def fake(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the right shapes for traced inputs."""
        one, two = self.batches
        batch: Any = next(
            (s for t in tensors for s in t.shape if isinstance(s, torch.SymInt) and s.node.hint == one), None
        )
        outputs = []
        for (first, second), dtype in zip(self.shapes, self.dtypes):
            shape: list[Any] = []
            for a, b in zip(first, second):
                if a == b:
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


Handle = Callable[[str, "type[torch.autograd.Function] | None", Callable[..., Any], Any, Any], Any]


@contextlib.contextmanager
def intercepted(model: nn.Module, paths: Sequence[str], handle: Handle) -> Iterator[None]:
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

    modules = {p: model.get_submodule(p) for p in paths}
    try:
        for path, module in modules.items():
            module.__dict__["_compiled_call_impl"] = lambda *a, _p=path, _m=module, **k: guarded(
                _p, None, _m._call_impl, a, k
            )
        with functions_intercepted(apply):
            yield
    finally:
        for module in modules.values():
            module.__dict__.pop("_compiled_call_impl", None)


@contextlib.contextmanager
def observed(model: nn.Module, paths: Sequence[str], sites: list[LeafSite], second: bool) -> Iterator[None]:
    """While active, real calls of the leaves are noted in `sites`, in calling order."""
    count = iter(range(10**9))

    def note(path: str, function: Any, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        values, tree = pytree.tree_flatten((args, kwargs))
        given = [v for v in values if isinstance(v, Tensor)]
        copies, versions = [v.detach().clone() for v in given], [v._version for v in given]
        out = real(*args, **kwargs)
        if [v._version for v in given] != versions:
            raise CaptureError(f"{path or function.__qualname__!r} writes into its inputs")
        _note(sites, next(count), LeafSite(path, function, in_tree=tree, in_values=values), copies, out, second)
        return out

    with intercepted(model, paths, note):
        yield


def _note(sites: list[LeafSite], at: int, site: LeafSite, given: list[Tensor], out: Any, second: bool) -> None:
    outputs = tensors_of(out)
    if not second:
        site.out_values, site.out_tree = pytree.tree_flatten(out)
        site.shapes = [(tuple(t.shape), tuple(t.shape)) for t in outputs]
        site.dtypes = [t.dtype for t in outputs]
        site.observed = [given, [t.detach().clone() for t in outputs]]
        sites.append(site)
        return
    known = sites[at] if at < len(sites) else None
    if known is None or (known.path, known.function) != (site.path, site.function) or not _alike(known, site, outputs):
        raise CaptureError(f"{site.label} is called differently at different batch sizes")
    known.shapes = [(a, tuple(t.shape)) for (a, _), t in zip(known.shapes, outputs)]


def _alike(known: LeafSite, site: LeafSite, outputs: list[Tensor]) -> bool:
    """Whether two calls differ in their tensors only."""
    if len(known.shapes) != len(outputs) or known.in_tree != site.in_tree:
        return False
    pairs = zip(known.in_values, site.in_values)
    return all(
        isinstance(a, Tensor) == isinstance(b, Tensor) and (isinstance(a, Tensor) or a is b or bool(a == b))
        for a, b in pairs
    )


@contextlib.contextmanager
def opaque(model: nn.Module, paths: Sequence[str], sites: list[LeafSite]) -> Iterator[None]:
    """While active, each leaf's call is the op `roo::leaf`; the k-th call stands for `sites[k]`."""
    _SITES[:] = sites
    count = iter(range(len(sites)))

    def stand_in(path: str, function: Any, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        at = next(count, None)
        if at is None or (sites[at].path, sites[at].function) != (path, function):
            raise CaptureError("a leaf is called otherwise while tracing than when run")
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        site = sites[at]
        if len(tensors) != sum(isinstance(v, Tensor) for v in site.in_values):
            raise RuntimeError(f"{site.label} takes what the trace keeps in another form, a packed sequence say")
        outputs = iter(torch.ops.roo.leaf(tensors, at))
        assert site.out_tree is not None
        values = [next(outputs) if isinstance(v, Tensor) else v for v in site.out_values]
        return pytree.tree_unflatten(values, site.out_tree)

    try:
        with intercepted(model, paths, stand_in):
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
