"""Whether a leaf is row-wise, shown by running it: gathered rows in, gathered rows out.

Values on permuted, repeated and single rows of several draws; then the gradients, because a backward of
its own may know other rows (or bend the gradient, which a sum over impressions would not survive). A recurrence may
blow rounding up beyond all bounds: a submodule that differs is run once more, in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, Several
from roo_rewrite.leaves import LeafSite, frozen_buffers
from roo_rewrite.methods import Submodule
from roo_rewrite.purity import duplicate, random_kept, state

_DRAWS = 3
_LARGE = 1 << 25  # entries of the parameters of a leaf


def probe(site: LeafSite, root: nn.Module, batchings: Sequence[Batching], batch: int, declared: bool) -> Batching:
    """The batching of each output of a leaf call, whose tensors have `batchings`.

    Raises NotRowWise with what was seen. A leaf that is declared row-wise is taken at its word, but for the
    place of the batch in its outputs, and unless it draws random numbers or keeps state.
    """
    if any(type(b) not in (Rows, Replicated) for b in batchings):
        raise NotRowWise(f"{site.label} is called with more than plain rows")
    places = [_place(first, second, site.batches) for first, second in site.shapes]
    with random_kept(), frozen_buffers(root):
        generator = torch.Generator().manual_seed(0)
        _steady(site, root)
        for draw in range(0 if declared else _DRAWS):
            inputs = [_moved(t, b, generator) if draw else t for t, b in zip(site.observed[0], batchings)]
            try:
                _Law(site, root, inputs, batchings, places, batch).hold(generator)
            except NotRowWise:
                if not _widens(site, root, inputs):
                    raise
                with _in_float64():
                    wide = [t.double() if t.is_floating_point() else t for t in inputs]
                    _Law(
                        site, _Alone(duplicate(root.get_submodule(site.path)).double()), wide, batchings, places, batch
                    ).hold(generator)
    return Several(tuple(places))


class _Alone(nn.Module):
    """A root of whose submodules one is asked for."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def get_submodule(self, target: str) -> nn.Module:
        return self.module


def _widens(site: LeafSite, root: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a leaf can be run in float64 by itself, and would be another. A large one is not copied for that."""
    if site.function is not None or any(isinstance(v, Submodule) for v in site.in_values):
        return False
    floats = [t.dtype for t in inputs if t.is_floating_point()]
    small = sum(p.numel() for p in root.get_submodule(site.path).parameters()) <= _LARGE
    return small and bool(floats) and torch.float64 not in floats


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _place(first: tuple[int, ...], second: tuple[int, ...], batches: tuple[int, int]) -> Batching:
    moved = [d for d, (a, b) in enumerate(zip(first, second)) if a != b]
    if not moved:
        return Replicated()
    if len(moved) > 1 or (first[moved[0]], second[moved[0]]) != batches:
        raise NotRowWise("the outputs of the leaf do not have one dim of the batch's size")
    return Rows(moved[0])


def _steady(site: LeafSite, root: nn.Module) -> None:
    """Declines a leaf that draws random numbers, or that another call would find changed."""
    module = root.get_submodule(site.path)
    before = torch.get_rng_state()
    buffers = [(b, b.clone()) for b in module.buffers()]
    with torch.no_grad():
        site.call(root, site.observed[0])
        known = state(module)
        site.call(root, site.observed[0])
    if not torch.equal(before, torch.get_rng_state()):
        raise NotRowWise(f"{site.label} draws random numbers")
    if state(module) != known or any(not torch.equal(b, old) for b, old in buffers):
        raise NotRowWise(f"{site.label} keeps state from call to call")


def _moved(tensor: Tensor, batching: Batching, generator: torch.Generator) -> Tensor:
    """Other floats, three times as large; ids and flags in another order of rows are drawn by the law itself."""
    if not tensor.is_floating_point() or not isinstance(batching, Rows):
        return tensor
    return tensor + 3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def _probes(batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield torch.randperm(batch, generator=generator)
    for size in (2, batch // 2, batch + 3):
        yield torch.randint(batch, (size,), generator=generator)
    yield torch.arange(2).repeat_interleave(3)
    for row in range(min(batch, 3)):
        yield torch.tensor([row])


class _Law:
    """f(E a) == E f(a) for one draw of the inputs."""

    def __init__(
        self,
        site: LeafSite,
        root: nn.Module,
        inputs: list[Tensor],
        batchings: Sequence[Batching],
        places: Sequence[Batching],
        batch: int,
    ):
        self.site, self.root, self.batch = site, root, batch
        self.inputs, self.batchings, self.places = inputs, batchings, places

    def hold(self, generator: torch.Generator) -> None:
        """Raises NotRowWise where the law does not hold."""
        self.values(generator)
        self.gradients(generator)

    def _call(self, inputs: list[Tensor]) -> list[Tensor]:
        try:
            return self.site.call(self.root, inputs)
        except Exception as e:  # whatever user code raises
            raise NotRowWise(f"{self.site.label} fails on other rows: {type(e).__name__}: {e}") from e

    def _gathered(self, tensors: Sequence[Tensor], batchings: Sequence[Batching], rows: Tensor) -> list[Tensor]:
        return [_gather(t, b, rows, self.batch) for t, b in zip(tensors, batchings)]

    def values(self, generator: torch.Generator) -> None:
        """The law on the values."""
        with torch.no_grad():
            outputs = self._call(self.inputs)
            for rows in _probes(self.batch, generator):
                found = self._call(self._gathered(self.inputs, self.batchings, rows))
                for got, want in zip(found, self._gathered(outputs, self.places, rows), strict=True):
                    if got.shape != want.shape or not _close(got, want):
                        raise NotRowWise(f"{self.site.label} gives a row another result among other rows")

    def gradients(self, generator: torch.Generator) -> None:
        """The law on the gradients of inputs and parameters, for small and large gradients of the outputs."""
        inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in self.inputs]
        module = self.root.get_submodule(self.site.path) if self.site.function is None else nn.Identity()
        wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
        with torch.enable_grad():
            outputs = self._call(inputs)
            rows = torch.randint(self.batch, (self.batch + 5,), generator=generator)
            left = self._gathered(outputs, self.places, rows)
            right = self._call(self._gathered(inputs, self.batchings, rows))
            if not wanted or not any(t.requires_grad for t in left):
                return
            for scale in (0.01, 1.0, 100.0):
                ups = [scale * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in left]
                sides = [_gradients(side, ups, wanted, self.site) for side in (left, right)]
                if not all(_close(a, b, 1e-3) for a, b in zip(*sides)):
                    raise NotRowWise(f"the gradient of {self.site.label} is another among other rows")


def _gather(tensor: Tensor, batching: Batching, rows: Tensor, batch: int) -> Tensor:
    if not isinstance(batching, Rows):
        return tensor
    dim = batching.dim
    split = tensor.reshape(*tensor.shape[:dim], batching.outer, batch, batching.inner, *tensor.shape[dim + 1 :])
    return split.index_select(batching.dim + 1, rows).flatten(batching.dim, batching.dim + 2)


def _gradients(outputs: list[Tensor], ups: list[Tensor], wanted: list[Tensor], site: LeafSite) -> list[Tensor]:
    pairs = [(t, g) for t, g in zip(outputs, ups) if t.requires_grad]
    try:
        found = torch.autograd.grad(
            [t for t, _ in pairs], wanted, [g for _, g in pairs], retain_graph=True, allow_unused=True
        )
    except RuntimeError as e:
        raise NotRowWise(f"the backward of {site.label} fails on other rows: {e}") from e
    return [torch.zeros_like(w) if g is None else g.to_dense() for g, w in zip(found, wanted)]


def _close(got: Tensor, want: Tensor, relative: float = 1e-4) -> bool:
    """Equal beyond rounding, relative to the largest entry."""
    if not want.is_floating_point():
        return torch.equal(got, want)
    finite = want[torch.isfinite(want)]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(got, want, rtol=relative, atol=1e-2 * relative * scale + 1e-12, equal_nan=True)
