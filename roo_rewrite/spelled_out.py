"""Functions of torch that a trace cannot follow, in ops that it follows.

    kron(a, b)[i p + k, j q + l]  =  a[i, j] b[k, l]        b: [p, q]
    multi_dot([a, b, c])          =  (a b) c or a (b c), whichever takes fewer multiplications
    cov(x)                        =  (x - m) w (x - m)^T / n
    gradient(x)[i]                =  (x[i + 1] - x[i - 1]) / 2h
    vander(x)[i, k]               =  x[i]^k

torch makes plain numbers of their sizes, or asks what their weights are. Each takes what torch takes, or hands it on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch's own makes plain numbers of the sizes it broadcasts. Raises RuntimeError as it does."""
    if dim is None or x.ndim != indices.ndim:
        return torch.take_along_dim(x, indices, dim)
    dim = dim % x.ndim if -x.ndim <= dim < x.ndim else dim
    kept, rest = list(x.shape), list(indices.shape)
    kept[dim] = rest[dim] = 1
    both = list(torch.broadcast_shapes(kept, rest))  # type: ignore[no-untyped-call]
    kept[:], rest[:] = both, both
    kept[dim], rest[dim] = x.shape[dim], indices.shape[dim]
    return x.expand(kept).gather(dim, indices.expand(rest))


def combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """torch's own reads them off a mask, whose count a trace does not know. x: [n], n the same for every batch."""
    n = x.shape[0] if x.ndim == 1 else None
    if not isinstance(n, int) or r < 1:
        return torch.combinations(x, r, with_replacement)
    chosen = (itertools.combinations_with_replacement if with_replacement else itertools.combinations)(range(n), r)
    places = torch.tensor(list(chosen), dtype=torch.int64, device=x.device).reshape(-1, r)
    return x[places]


def kron(input: Tensor, other: Tensor) -> Tensor:
    """Both of any dims, the one with fewer as if of size 1 in front."""
    ndim = max(input.ndim, other.ndim)
    left, right = ([1] * (ndim - x.ndim) + list(x.shape) for x in (input, other))
    if not ndim:
        return input * other
    spread = input.reshape([s for size in left for s in (size, 1)])
    both = spread * other.reshape([s for size in right for s in (1, size)])
    return both.reshape([a * b for a, b in zip(left, right)])


def multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices, the first and the last may be vectors."""
    parts = list(tensors)
    first, last = parts[0].ndim == 1, parts[-1].ndim == 1
    if len(parts) < 2:
        return tensors[0]  # an error of torch's own, when the model is run
    parts[0] = parts[0].unsqueeze(0) if first else parts[0]
    parts[-1] = parts[-1].unsqueeze(1) if last else parts[-1]
    made: Tensor = _product(parts, [*(_hint(p.shape[0]) for p in parts), _hint(parts[-1].shape[1])])
    made = made.squeeze(1) if last else made
    return made.squeeze(0) if first else made


def chain_matmul(*matrices: Tensor) -> Tensor:
    """The same under its old name, of one matrix too."""
    return matrices[0] if len(matrices) == 1 else multi_dot(matrices)


def _product(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The product of matrices of sizes [s0, s1], [s1, s2], .. in the order that takes fewest multiplications."""
    n = len(parts)
    best: dict[tuple[int, int], tuple[int, int]] = {(i, i + 1): (0, i) for i in range(n)}  # cost, where it is cut
    for width in range(2, n + 1):
        for i in range(n - width + 1):
            j = i + width
            costs = [(best[i, k][0] + best[k, j][0] + sizes[i] * sizes[k] * sizes[j], k) for k in range(i + 1, j)]
            best[i, j] = min(costs)

    def made(i: int, j: int) -> Tensor:
        k = best[i, j][1]
        return parts[i] if j == i + 1 else torch.matmul(made(i, k), made(k, j))

    return made(0, n)


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """Of the rows of input `[variables, observations]`, or of one row. Its weights are not checked."""
    if input.ndim > 2:
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    x = input if input.is_floating_point() or input.is_complex() else input.to(torch.get_default_dtype())
    x = x.reshape(1, -1) if x.ndim < 2 else x
    weights = fweights if aweights is None else aweights if fweights is None else fweights * aweights
    if weights is None:
        mean, count = x.mean(1, keepdim=True), torch.sym_max(x.shape[1] - correction, 0)  # type: ignore[no-untyped-call]
        centred = weighted = x - mean
    else:
        total = weights.sum()
        lost = correction if aweights is None else correction * (weights * aweights).sum() / total
        mean, count = (x * weights).sum(1, keepdim=True) / total, (total - lost).clamp(min=0)
        centred, weighted = x - mean, (x - mean) * weights
    made: Tensor = weighted @ centred.mH / count
    return made.reshape(()) if isinstance(x.shape[0], int) and x.shape[0] == 1 else made


def corrcoef(input: Tensor) -> Tensor:
    """The same over standard deviations."""
    if input.is_complex():
        return torch.corrcoef(input)
    made = cov(input)
    if made.ndim == 0:
        return made / made
    spread = made.diagonal().sqrt()
    return (made / spread[:, None] / spread).clamp(-1, 1)


def vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    """x: [n] -> [n, N], powers from high to low unless `increasing`."""
    count = x.shape[0] if N is None else N
    if not isinstance(count, int) or count < 1 or x.ndim != 1:
        return torch.vander(x, N, increasing)
    x = x if x.is_floating_point() or x.is_complex() else x.long()
    powers = list(itertools.accumulate([x] * (count - 1), torch.mul, initial=torch.ones_like(x)))
    return torch.stack(powers if increasing else powers[::-1], 1)


def gradient(input: Tensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1) -> list[Tensor]:
    """Along each of the dims. spacing: the distance of two entries, one for all dims or one each; or where they are."""
    dims = list(range(input.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    steps = list(spacing) if isinstance(spacing, (list, tuple)) else [spacing] * len(dims)
    if len(steps) != len(dims) or not all(
        isinstance(s, (int, float)) or (isinstance(s, Tensor) and s.ndim == 1) for s in steps
    ):
        given = {} if dim is None else {"dim": dim}
        return list(torch.gradient(input, spacing=spacing, edge_order=edge_order, **given))
    return [_slope(input, d % input.ndim, step, edge_order) for d, step in zip(dims, steps)]


def _slope(x: Tensor, dim: int, step: float | Tensor, edge_order: int) -> Tensor:
    """Differences to both neighbours inside, to one or two at the edges.

    f'  =  (f(+b) a / b - f(-a) b / a + f(0) (b / a - a / b)) / (a + b)        a, b: the distances to both
    """
    size = x.shape[dim]
    first: Any
    second: Any
    before: Any
    last: Any

    def at(start: Any, stop: Any) -> Tensor:
        return x.narrow(dim, start, stop - start)

    if isinstance(step, Tensor):
        gaps = step.diff().reshape([-1] + [1] * (x.ndim - dim - 1))
        a, b = gaps.narrow(0, 0, size - 2), gaps.narrow(0, 1, size - 2)
        first, second, before, last = (gaps.narrow(0, i % (size - 1), 1) for i in (0, 1, size - 3, size - 2))
        inside = at(2, size) * (a / b) - at(0, size - 2) * (b / a) + at(1, size - 1) * (b / a - a / b)
        inside = inside / (a + b)
    else:
        first = second = before = last = step
        inside = (at(2, size) - at(0, size - 2)) / (2 * step)
    left, right = (at(1, 2) - at(0, 1)) / first, (at(size - 1, size) - at(size - 2, size - 1)) / last
    if edge_order == 2:  # the line through the slopes of the two gaps at the edge
        inner = (at(2, 3) - at(1, 2)) / second, (at(size - 2, size - 1) - at(size - 3, size - 2)) / before
        left = left + (left - inner[0]) * first / (first + second)
        right = right + (right - inner[1]) * last / (last + before)
    return torch.cat([left, inside, right], dim)
