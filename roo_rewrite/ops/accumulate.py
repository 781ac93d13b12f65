"""Products added to a value that is there already, without a pass over memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_onto(base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`base + linear(x, weight)`. base: `[..., n]`, written into, so nothing else may read it; x: `[..., k]`.

    Autograd copies what is written through a view, so with gradients on only a matrix is written into.
    """
    if base.ndim == 2:
        return base.addmm_(x, weight.t())
    flat, given = base.flatten(0, -2), x.flatten(0, -2)
    if torch.is_grad_enabled():
        flat = torch.addmm(flat, given, weight.t())
        made: Tensor = torch.ops.aten._unsafe_view.default(flat, base.shape)
        return made
    flat.addmm_(given, weight.t())
    return base
