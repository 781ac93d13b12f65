"""Backwards of their own: Functions, checkpointing, custom ops, sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazard_parts import Plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.filterwarnings("ignore")
def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -ctx.scale * grad, None


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.05, 0.05)


class MeanGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


class ScaledByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.shape[0]


class CentredForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.sum(0)


class WritesItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w, x.sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t() + other[:, None], x.t() @ grad


class GradientReversal(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(Reverse.apply(self.user(u), 0.5), x)


class GradientReversalAtImpression(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return Reverse.apply(self.mix(self.user(u), x), 2.0)


class GradientClip(Plain):
    """The sum of clipped gradients is not the clipped sum."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(Clip.apply(self.user(u)), x)


class GradientMean(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(MeanGrad.apply(self.user(u)), x)


class GradientByRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(ScaledByRows.apply(self.user(u)), x)


class FunctionOverRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(CentredForward.apply(self.user(u)), x)


class FunctionWrites(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u) * 1
        WritesItsInput.apply(h)
        return self.mix(h, x)


class FunctionWithWeight(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h, s = TwoResults.apply(u, self.a.weight)
        return self.mix(torch.relu(h), x) + s


class FunctionInSubmodule(Plain):
    hoists = True

    class Inner(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return Clip.apply(h)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.inner(self.user(u)), x)


class FunctionTwice(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(Reverse.apply(self.user(u), 0.5), Reverse.apply(x, 3.0))


class FunctionOfBatchSize(Plain):
    """The size of the batch as a plain argument."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(Reverse.apply(self.user(u), float(x.shape[0])), x)


class Checkpointed(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(checkpoint(self.user, u, use_reentrant=False), x)


class CheckpointedReentrant(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(checkpoint(self.user, u * 1, use_reentrant=True), x)


class CheckpointedWhole(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return checkpoint(lambda a, b: self.mix(self.user(a), b), u, x, use_reentrant=False)


@torch.library.custom_op("hazards::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(lambda x: torch.empty_like(x))
double.register_autograd(lambda ctx, grad: grad * 2)


@torch.library.custom_op("hazards::centre", mutates_args=())
def centre(x: Tensor) -> Tensor:
    return x - x.sum(0)


centre.register_fake(lambda x: torch.empty_like(x))
centre.register_autograd(lambda ctx, grad: grad - grad.sum(0))


@torch.library.custom_op("hazards::scale_", mutates_args=("x",))
def scale_(x: Tensor, by: float) -> None:
    x.mul_(by)


class CustomOp(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(double(self.user(u)), x)


class CustomOpOverRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(centre(self.user(u)), x)


class CustomOpWrites(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).detach()
        scale_(h, 3.0)
        return self.mix(h, x)


class SparseEmbedding(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4, sparse=True)
        self.a = nn.Linear(4, 4)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return (torch.relu(self.a(self.e(u_id))) * x).sum(-1)


class ScaledByFrequency(nn.Module):
    """The gradient is divided by how often an id occurs in the batch."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4, scale_grad_by_freq=True)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return (self.e(u_id) * x).sum(-1)


class BagScaledByFrequency(nn.Module):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(6, 4, mode="sum", scale_grad_by_freq=True)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        return (self.e(u_ids) * x).sum(-1)


class MaxNormEmbedding(nn.Module):
    """A lookup that rescales the rows it finds too long."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4, max_norm=0.5)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return (self.e(u_id) * x).sum(-1)


class PaddedEmbedding(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4, padding_idx=0)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        mask = (u_ids != 0).to(x.dtype)[..., None]
        pooled = (self.e(u_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return (torch.tanh(pooled) * x).sum(-1)


class EmbeddingBagMean(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(6, 4, mode="mean", padding_idx=0)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        return (self.e(u_ids) * x).sum(-1)


class EmbeddingBagOffsets(nn.Module):
    """Flat ids with offsets made in forward."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(6, 4, mode="sum")

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        offsets = torch.arange(0, u_ids.numel(), u_ids.shape[1])
        return (self.e(u_ids.reshape(-1), offsets) * x).sum(-1)


class GradientPenalty(Plain):
    """Takes a gradient inside of forward."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            v = u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.user(v).sum(), v)
        return self.mix(self.user(u) + slope, x)


class FunctorchGradient(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda r: self.user(r).sum()))(u)
        return self.mix(slope, x)


class BranchesOnGradMode(Plain):
    """Other code where gradients are on."""

    hoists = False
    caught = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if torch.is_grad_enabled() else h, x)


class BranchesOnRequiresGrad(Plain):
    hoists = False
    caught = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if h.requires_grad else h, x)


class BranchesOnTracing(Plain):
    """Other code while it is exported."""

    hoists = False
    caught = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if torch.compiler.is_compiling() else h, x)


class LabelSmoothedLoss(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor, x_label: Tensor) -> Tensor:
        logits = (torch.relu(self.a(u)) * x).sum(-1)
        return F.binary_cross_entropy_with_logits(logits, x_label)


class UserAuxiliaryLoss(Plain):
    """A mean over users is a mean over impressions: each user counts as often as it is seen."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return self.mix(h, x), (h**2).mean()


class OrthogonalityLoss(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.user(u)
        return self.mix(h, x), ((h.t() @ h) / h.shape[0] - torch.eye(4, dtype=h.dtype)).pow(2).sum()


class WeightDecayLoss(Plain):
    """A loss of the weights alone has no batch."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u), x), self.a.weight.pow(2).sum()
