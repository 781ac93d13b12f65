"""What is chance and what is rounding in a result: dropout without chance, and entries that a shake moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from roo_rewrite.purity import duplicate

aten = torch.ops.aten
_CHUNK = 1 << 20  # entries shaken in one go
_NEAR_ZERO = {torch.float64: 1e-12}  # equal rows after batch norm, rsqrt(1e-5) times a rounding error, are less
SHAKES = 3  # by one, an entry may stay where it is by chance


class SteadyNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, a mask keeps everything: drawing it gives its expectation, whatever the shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


Values = Sequence[Tensor | None]


def steadied(found: Values, expected: Values, runs: Sequence[tuple[Values, Values]], limit: float) -> list[Any]:
    """`found`, but for those entries that are noise taken from `expected`: all others are to be judged.

    runs: results of a model and of the same model shaken. An entry is noise where one differs from the other by
    more than `limit` of the largest.
    """
    made: list[Any] = []
    for i, (got, want) in enumerate(zip(found, expected)):
        pairs = [(a[i], b[i]) for a, b in runs if i < min(len(a), len(b))]
        if got is None or want is None or got.numel() != want.numel():
            made.append(got)
            continue
        flat, true = _dense(got), _dense(want)
        noise = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        for a, b in pairs:
            if a is not None and b is not None and a.numel() == b.numel() == flat.numel():
                noise |= _moved(a, b, limit)
        made.append(torch.where(noise, true.to(flat.dtype), flat).reshape(got.shape))
    return made


def _moved(one: Tensor, other: Tensor, limit: float) -> Tensor:
    one, other = _dense(one), _dense(other)
    if not one.is_floating_point() and not one.is_complex():
        return one != other
    scale = torch.nan_to_num(one.abs(), 0.0, 0.0, 0.0).max().clamp_min(1e-3) if one.numel() else 1.0
    same = (one == other) | (one.isnan() & other.isnan())
    return ~(same | ((one - other).abs() <= limit * scale))


def judged(found: Values, steady: Values, unmoved: int = 0) -> bool:
    """Whether most entries were left to be judged. unmoved: entries of theirs that are 0 in all runs, left out."""
    pairs = [(a, b) for a, b in zip(found, steady) if a is not None and b is not None and a.numel() == b.numel()]
    changed = sum(int((_dense(a) != _dense(b)).sum()) for a, b in pairs)
    return 2 * changed <= unmoved + sum(a.numel() for a, _ in pairs)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense().flatten() if tensor.layout != torch.strided else tensor.flatten()


def _nearly_one(like: Tensor, generator: torch.Generator) -> Tensor:
    """A factor for each entry, off 1 by up to four units in the last place."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(like)
    return drawn.mul_(4 * torch.finfo(like.dtype).eps).add_(1)


def jittered(atoms: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Inputs off by a few units in the last place, each row on its own; whole numbers (ids, flags) stay.

    Batch norm over the equal rows of one request is noise although no parameter comes before it.
    """
    generator = torch.Generator().manual_seed(seed)
    made = list(atoms)
    for i, t in enumerate(atoms):
        if t.is_floating_point():
            factor = _nearly_one(t, generator)
            made[i] = t * torch.where(t == t.round(), torch.ones_like(factor), factor)
    return made


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with every parameter off by a few units in the last place: what that changes is noise.

    Batch norm over one request, or the direction of a vector that should be 0, is nothing else. A bias of 0 has no
    last place: it goes up in one shake and down in the next, or a ReLU at 0 would stay where rounding put it.
    """
    made, generator = duplicate(module), torch.Generator().manual_seed(seed)
    sign = -1 if seed % 2 else 1
    with torch.no_grad():
        for p in made.parameters():
            if p.is_floating_point():
                rows = max(1, _CHUNK * len(p) // p.numel()) if p.ndim and p.numel() else 0
                for part in torch.split(p, rows) if rows else [p]:
                    part.mul_(_nearly_one(part, generator))
                if p.ndim == 1:
                    p.masked_fill_(p == 0, sign * _NEAR_ZERO.get(p.dtype, 4 * torch.finfo(p.dtype).eps))
    return made
