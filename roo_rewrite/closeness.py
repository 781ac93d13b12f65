"""How far two results lie apart: values by the scale of each, gradients by the scale of all.

The gradient of a table is 0 outside the rows that a batch reads. `compact` keeps the others, `together` gives the
gradients of one parameter in several runs over the rows that any of them has: what is left out is 0 in all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 18  # entries of a gradient from which on its rows of zeros are left out
_CHUNK = 1 << 20  # entries looked at in one go

Gradients = Sequence[Tensor | None]


def compare(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    reshape: bool = False,
    precision: torch.dtype = torch.float64,
) -> str | None:
    """The first output that differs beyond the rounding of its dtype, or of a lower `precision`, in words."""
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    for i, (got, want) in enumerate(zip(found, expected)):
        if reshape and got.numel() == want.numel():
            want = want.reshape(got.shape)
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"output {i} is {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
        error = distance(got, want)
        if error > max(tolerance(want.dtype), tolerance(precision) * want.is_floating_point()):
            return f"output {i} is off by {error:.2e} of its scale"
    return None


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute the same may lie apart, relative to the largest entry."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}.get(real, 0.0)


def distance(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest difference relative to the scale of `want`, at least `floor`; what is not finite must agree."""
    if not want.numel():
        return 0.0
    if not want.is_floating_point() and not want.is_complex():
        return 0.0 if torch.equal(got, want) else float("inf")
    if not all(math.isfinite(_largest(t)) for t in (got, want)):
        finite = torch.isfinite(want)
        if not torch.equal(torch.isfinite(got), finite):
            return float("inf")
        if not torch.equal(torch.nan_to_num(got[~finite], 7.0), torch.nan_to_num(want[~finite], 7.0)):
            return float("inf")
        if not bool(finite.any()):
            return 0.0
        got, want = got[finite], want[finite]
    return _largest(got - want) / max(_largest(want), floor, 1e-3)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; not finite where an entry is not."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# -- gradients


def compact(grad: Tensor | None) -> Tensor | None:
    """A dense gradient, or of a large one its rows that are not all 0, as a sparse tensor of rows in order.

    grad: dense or sparse, of any shape. A large one of which most rows are in use stays dense.
    """
    if grad is None or grad.numel() < _LARGE or grad.ndim == 0:
        return None if grad is None else _dense(grad)
    if grad.layout is torch.sparse_coo and grad.sparse_dim() == 1:
        return grad.coalesce()
    grad = _dense(grad)
    rows = _rows_in_use(grad)
    if 2 * len(rows) > len(grad):
        return grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 warns that nothing is checked even when told to check
        return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, is_coalesced=True, check_invariants=True)


def _rows_in_use(grad: Tensor) -> Tensor:
    step = max(1, _CHUNK * len(grad) // grad.numel())
    used = [(part != 0).flatten(1).any(1) if part.ndim > 1 else part != 0 for part in torch.split(grad, step)]
    return torch.cat(used).nonzero().flatten()


def together(*runs: Gradients) -> list[list[Tensor | None]]:
    """The gradients of several runs, dense, each over the rows that it has in any run."""
    aligned = [_aligned(of_one) for of_one in zip(*runs, strict=True)]
    return [[of_one[i] for of_one in aligned] for i in range(len(runs))]


def _aligned(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    sparse = [g for g in grads if g is not None and g.layout is torch.sparse_coo]
    if not sparse or any(g is not None and g.layout is torch.strided for g in grads):
        return [None if g is None else _dense(g) for g in grads]
    rows = torch.unique(torch.cat([g.indices()[0] for g in sparse]))
    return [None if g is None else _over(rows, g) for g in grads]


def _over(rows: Tensor, grad: Tensor) -> Tensor:
    """Rows of a compact gradient, all of its own among them."""
    made = grad.values().new_zeros(len(rows), *grad.shape[1:])
    made[torch.searchsorted(rows, grad.indices()[0])] = grad.values()
    return made


def gradients_differ(names: Sequence[str], got: Gradients, want: Gradients, precision: torch.dtype) -> str | None:
    """The first gradient that is missing, or differs beyond rounding, in words."""
    got, want = together(got, want)
    limit, floor = max(1e-7, 10 * tolerance(precision)), noise(want, precision)
    for name, a, b in zip(names, got, want, strict=True):
        if (a is None) != (b is None) and not _zero(a if b is None else b):
            return f"the gradient of {name!r} is {'missing' if a is None else 'there'}, unlike the original's"
        error = 0.0 if a is None or b is None else off_by(a, b, floor)
        if error > limit:
            return f"the gradient of {name!r} is off by {error:.2e} of its scale"
    return None


def off_by(got: Tensor, want: Tensor, floor: float) -> float:
    """As `distance`, over the entries of the original's gradient that are finite: the others train nothing."""
    known = None if math.isfinite(_largest(want)) else torch.isfinite(want)
    return distance(got, want, floor) if known is None else distance(got[known], want[known], floor)


def noise(grads: Gradients, precision: torch.dtype = torch.float64) -> float:
    """The scale below which a gradient is judged as one that should be 0 (of a bias before a batch norm, say)."""
    sizes = [_largest(_dense(g)) for g in grads if g is not None]
    return max(1e-3, tolerance(precision) / 6) * max((s for s in sizes if math.isfinite(s)), default=0.0)


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.layout != torch.strided else grad


def _zero(grad: Tensor | None) -> bool:
    return grad is None or not bool(grad.any())
