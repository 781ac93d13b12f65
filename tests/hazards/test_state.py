"""Forwards that remember: attributes, caches, buffers, hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hazard_parts import Plain
from torch import Tensor, nn

MODES = (False, True)


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class KeepsIntermediate(Plain):
    """An intermediate kept for inspection changes nothing."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.last = self.user(u)
        return self.mix(self.last, x)


class CountsCalls(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.mix(self.user(u), x) * (2 if self.calls > 3 else 1)


class CountsInList(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.mix(self.user(u), x) * len(self.seen)


class CountsInDict(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.state = {"step": 0}

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.state["step"] += 1
        return self.mix(self.user(u), x) * self.state["step"]


class CountsInObject(Plain):
    hoists = False

    class Meter:
        def __init__(self) -> None:
            self.total = 0

    def __init__(self) -> None:
        super().__init__()
        self.meter = self.Meter()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.meter.total += 1
        return self.mix(self.user(u), x) * self.meter.total


class CachesResult(Plain):
    """The first call's user tower is used for ever."""

    hoists = False
    refused = True

    def __init__(self) -> None:
        super().__init__()
        self.cached: Tensor | None = None

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.user(u).detach().sum(0)
        return self.mix(self.user(u), x) + self.cached.sum()


class CachesMask(nn.Module):
    """A mask made once for each length is the same whatever the call."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.mask: Tensor | None = None

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != u_seq.shape[1]:
            self.mask = torch.tril(torch.ones(u_seq.shape[1], u_seq.shape[1], dtype=u_seq.dtype))
        return ((self.mask @ self.a(u_seq)).sum(1) * x).sum(-1)


class PreviousBatch(Plain):
    """Mixes in the mean of the batch before."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.zeros(4, dtype=torch.float64)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u) + self.before
        self.before = h.detach().sum(0)
        return self.mix(h, x)


class MovingAverage(Plain):
    """A buffer updated from the mean over the batch."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.sum(0), alpha=0.1)
        return self.mix(h, x)


class MovingAverageUsed(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        y = h - self.mean
        self.mean.copy_(0.9 * self.mean + 0.1 * h.detach().sum(0))
        return self.mix(y + self.mean, x)


class BufferReassigned(Plain):
    """`self.mean = ...` instead of an in-place update."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().sum(0)
        return self.mix(h - self.mean, x)


class StepBuffer(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.step += 1
        return self.mix(self.user(u), x) * self.step


class StepOfUser(Plain):
    """The request part reads a counter that is then moved on."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.ones((), dtype=torch.float64))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        before = self.user(u) * self.step
        self.step.mul_(2)
        after = self.user(u) * self.step
        return self.mix(before + after, x)


class SharedBuffer(Plain):
    """One buffer under two names."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        buffer = torch.ones(4, dtype=torch.float64)
        self.register_buffer("one", buffer)
        self.register_buffer("two", buffer)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.one.add_(1)
        return self.mix(self.user(u) * self.two, x)


class QueueOfNegatives(Plain):
    """A memory bank written a batch at a time."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(8, 4))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        scores = self.mix(h, x) - torch.logsumexp(h @ self.bank.t(), 1)
        rows = min(2, x.shape[0])
        with torch.no_grad():
            self.bank[:rows] = self.b(x)[:rows]
        return scores


class TensorAttribute(Plain):
    """A plain tensor, not a buffer, that is only read."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((4,), 3.0, dtype=torch.float64)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * self.scale, x)


class TensorAttributeWritten(Plain):
    """A plain tensor, not a buffer, that counts."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.zeros((), dtype=torch.float64)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.step += 1
        return self.mix(self.user(u), x) * self.step


class ModuleSwitch(Plain):
    """Turns its own mode over."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.drop.eval()
        return self.mix(self.drop(self.user(u)), x)


_SEEN: list[int] = []


class CountsInGlobal(Plain):
    """State outside of every module: values agree only if the original runs as often."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x) * _global_scale(self)


def _global_scale(module: nn.Module) -> int:
    del _SEEN[:]
    _SEEN.append(1)
    return len(_SEEN)


class ForwardHook(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(_double)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x)


class ForwardPreHookCentres(Plain):
    """A hook that mixes rows."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_pre_hook(_centred)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x)


class RootHook(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_double)


class BackwardHook(Plain):
    """A full backward hook that changes the gradient."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.a.register_full_backward_hook(_scaled)


class BackwardPreHook(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.a.register_full_backward_pre_hook(_clipped)


class TensorHook(Plain):
    """A gradient hook on an intermediate."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        if h.requires_grad:
            h.register_hook(lambda g: g * 3)
        return self.mix(h, x)


class TensorHookInSubmodule(Plain):
    hoists = True

    class Reverse(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            if h.requires_grad:
                h.register_hook(lambda g: g.clamp(-0.1, 0.1))
            return h * 1.0

    def __init__(self) -> None:
        super().__init__()
        self.reverse = self.Reverse()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.reverse(self.user(u)), x)


def _double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def _centred(module: nn.Module, args: Any) -> Any:
    return (args[0] - args[0].sum(0),)


def _scaled(module: nn.Module, grads: Any, outs: Any) -> Any:
    return tuple(None if g is None else g * 3 for g in grads)


def _clipped(module: nn.Module, outs: Any) -> Any:
    return tuple(g.clamp(-0.1, 0.1) for g in outs)


class SpectralNorm(Plain):
    """Power iteration moves buffers at each training call."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(self.a)

    modes = (False,)


class SpectralNormTraining(SpectralNorm):
    hoists = False
    modes = (True,)


class WeightNorm(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(self.a)


class OldWeightNorm(Plain):
    """The hook that sets `weight` as a plain attribute."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and in use
            self.a = nn.utils.weight_norm(self.a)


class Orthogonal(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.orthogonal(self.a)


class TiedLayers(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.b = self.a


class TiedWeights(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class FrozenUser(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a.weight.requires_grad_(False)


class ParameterListModel(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.d = nn.ParameterDict({"k": torch.randn(4)})

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        for w in self.ws:
            h = h @ w
        return self.mix(h + self.d["k"], x)
