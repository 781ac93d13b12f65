"""Products added to a value that is there already, without a pass over memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_onto(base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`base + linear(x, weight)`. base: `[..., n]`, written into, so nothing else may read it; x: `[..., k]`.

    Autograd copies what is written through a view, so with gradients on only a matrix is written into.
    """
    into, product = base.flatten(0, -2), (x.flatten(0, -2), weight.t())
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and base.ndim > 2):
        made: Tensor = torch.ops.aten._unsafe_view.default(torch.addmm(into, *product), base.shape)
        return made
    if torch.is_grad_enabled():
        return base.addmm_(*product)
    torch.addmm(into, *product, out=into)  # unlike addmm_, FLOP counters know it
    return into.view(base.shape)  # not base: flattening one that is not contiguous copies it
