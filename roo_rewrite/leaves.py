"""Opaque leaf modules: what cannot or should not be traced is called as it is.

While tracing, a leaf's forward is one custom op, `roo::leaf(tensors, site)`; its output shapes come from
running the real module at two batch sizes. In the emitted model the site calls the real submodule,
found by its path, so that it may be replaced (sharded, say) later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError, NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, Several

_SITES: list[LeafSite] = []


@dataclass
class LeafSite:
    """One call of a leaf module in the traced forward.

    shapes: of every output tensor, at the two batch sizes of `batches`.
    """

    path: str
    batches: tuple[int, int] = (0, 0)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    in_tree: pytree.TreeSpec | None = None
    in_values: list[Any] = field(default_factory=list)
    out_tree: pytree.TreeSpec | None = None
    out_values: list[Any] = field(default_factory=list)
    observed: list[list[Tensor]] = field(default_factory=list)

    def call(self, root: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the real submodule of `root` on these tensors and returns its output tensors."""
        assert self.in_tree is not None
        stock = iter(tensors)
        values = [next(stock) if isinstance(v, Tensor) else v for v in self.in_values]
        args, kwargs = pytree.tree_unflatten(values, self.in_tree)
        return tensors_of(root.get_submodule(self.path)(*args, **kwargs))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensor leaves of a pytree, in order."""
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


@torch.library.custom_op("roo::leaf", mutates_args=())
def leaf_op(tensors: list[Tensor], site: int) -> list[Tensor]:
    """Stands for a leaf call while tracing; it is never run on real tensors."""
    raise RuntimeError("roo::leaf exists only while tracing")


@leaf_op.register_fake
def _leaf_shapes(tensors: list[Tensor], site: int) -> list[Tensor]:
    found = _SITES[site]
    one, two = found.batches
    batch: Any = next((s for t in tensors for s in t.shape if isinstance(s, torch.SymInt) and s.node.hint == one), None)
    outputs = []
    for (first, second), dtype in zip(found.shapes, found.dtypes):
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


@contextlib.contextmanager
def observed(model: nn.Module, paths: Sequence[str], sites: list[LeafSite], second: bool) -> Iterator[None]:
    """While active, real calls of the leaves are noted in `sites`, in calling order."""
    count = iter(range(10**9))

    def note(path: str, args: Any, kwargs: Any, out: Any) -> None:
        at = next(count)
        outputs = tensors_of(out)
        if not second:
            values, tree = pytree.tree_flatten((args, kwargs))
            out_values, out_tree = pytree.tree_flatten(out)
            site = LeafSite(path, in_tree=tree, in_values=values, out_tree=out_tree, out_values=out_values)
            site.shapes = [(tuple(t.shape), tuple(t.shape)) for t in outputs]
            site.dtypes = [t.dtype for t in outputs]
            site.observed = [[v for v in values if isinstance(v, Tensor)], outputs]
            sites.append(site)
            return
        if at >= len(sites) or sites[at].path != path or len(sites[at].shapes) != len(outputs):
            raise CaptureError(f"leaf {path!r} is called differently at different batch sizes")
        sites[at].shapes = [(a, tuple(t.shape)) for (a, _), t in zip(sites[at].shapes, outputs)]

    handles = [
        model.get_submodule(p).register_forward_hook(
            lambda m, a, k, out, p=p: note(p, a, k, out), with_kwargs=True, always_call=False
        )
        for p in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def opaque(model: nn.Module, paths: Sequence[str], sites: list[LeafSite]) -> Iterator[None]:
    """While active, each leaf's forward is the op `roo::leaf`; the k-th call stands for `sites[k]`."""
    _SITES[:] = sites
    count = iter(range(len(sites)))

    def forward(*args: Any, **kwargs: Any) -> Any:
        at = next(count, None)
        if at is None:
            raise CaptureError("a leaf is called more often while tracing than when run")
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        outputs = iter(torch.ops.roo.leaf(tensors, at))
        site = sites[at]
        assert site.out_tree is not None
        return pytree.tree_unflatten(
            [next(outputs) if isinstance(v, Tensor) else v for v in site.out_values], site.out_tree
        )

    modules = [model.get_submodule(p) for p in paths]
    saved = [m.__dict__.get("forward") for m in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        _SITES.clear()
        for module, old in zip(modules, saved):
            if old is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = old


def probe(site: LeafSite, root: nn.Module, batchings: Sequence[Batching], batch: int, declared: bool) -> Batching:
    """Whether a leaf call is row-wise: run on gathered, permuted, repeated and single rows of what it was called with.

    Returns the batching of each output; raises NotRowWise with what was seen. A leaf that is declared
    row-wise is taken at its word, but for the place of the batch in its outputs.
    """
    if any(type(b) not in (Rows, Replicated) for b in batchings):
        raise NotRowWise(f"leaf {site.path!r} is called with more than plain rows")
    inputs, outputs = site.observed
    places = [_place(first, second, site.batches) for first, second in site.shapes]
    if not declared:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), frozen_buffers(root.get_submodule(site.path)):
            generator = torch.Generator().manual_seed(0)
            for rows in _probes(batch, generator):
                chosen = [_gather(t, b, rows, batch) for t, b in zip(inputs, batchings)]
                _compare(site, root, chosen, [_gather(t, p, rows, batch) for t, p in zip(outputs, places)])
    return Several(tuple(places))


def _place(first: tuple[int, ...], second: tuple[int, ...], batches: tuple[int, int]) -> Batching:
    moved = [d for d, (a, b) in enumerate(zip(first, second)) if a != b]
    if not moved:
        return Replicated()
    if len(moved) > 1 or (first[moved[0]], second[moved[0]]) != batches:
        raise NotRowWise("the outputs of the leaf do not have one dim of the batch's size")
    return Rows(moved[0])


def _probes(batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield torch.randperm(batch, generator=generator)
    for size in (1, 2, batch // 2, batch + 3):
        yield torch.randint(batch, (size,), generator=generator)
    for row in range(min(batch, 4)):
        yield torch.tensor([row])


def _gather(tensor: Tensor, batching: Batching, rows: Tensor, batch: int) -> Tensor:
    if not isinstance(batching, Rows):
        return tensor
    split = tensor.unflatten(batching.dim, (batching.outer, batch, batching.inner))
    return split.index_select(batching.dim + 1, rows).flatten(batching.dim, batching.dim + 2)


def _compare(site: LeafSite, root: nn.Module, inputs: list[Tensor], expected: list[Tensor]) -> None:
    try:
        found = site.call(root, inputs)
    except Exception as e:
        raise NotRowWise(f"leaf {site.path!r} fails on fewer rows: {type(e).__name__}: {e}") from e
    for got, want in zip(found, expected, strict=True):
        if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise NotRowWise(f"leaf {site.path!r} gives a row another result among other rows")


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
    """Paths of the modules that are leaves by nature: TorchRec's embedding modules, so they stay shardable."""
    names = {"EmbeddingBagCollection", "EmbeddingCollection", "ShardedEmbeddingBagCollection"}
    return [p for p, m in model.named_modules() if p and type(m).__name__ in names and "torchrec" in type(m).__module__]
