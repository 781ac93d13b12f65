"""The batch size as a number, in branches, and in constants and dims that happen to equal it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hazard_parts import Plain
from torch import Tensor, nn

import roo_rewrite as roo


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class ScaledByBatchSize(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * u.size(0), x)


class DividedByBatchSize(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) / u.shape[0], x)


class ScaledByNumel(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) / u.numel(), x)


class ScaledBySqrtBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * u.shape[0] ** 0.5, x)


class BatchSizeAsTensor(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * torch.tensor(u.shape[0], dtype=u.dtype), x)


class BatchSizeFilled(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * torch.full((4,), u.shape[0], dtype=u.dtype), x)


class Linspace(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * torch.linspace(0, 1, u.shape[0], dtype=u.dtype)[:, None], x)


class OnesOfBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        ones = torch.ones(u.shape[0], 1, dtype=u.dtype)
        return self.mix(torch.cat([self.user(u)[:, :3], ones], 1), x)


class InitialState(nn.Module):
    """zeros of the batch size as the first state of an RNN."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        state = torch.zeros(1, u_seq.shape[0], 4, dtype=u_seq.dtype)
        return (self.rnn(u_seq, state)[1][0] * x).sum(-1)


class EyeOfBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(torch.eye(u.shape[0], dtype=u.dtype) @ h, x)


class BranchOnOne(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        if u.shape[0] == 1:
            h = h * 100
        return self.mix(h, x)


class BranchOnZero(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(0)
        return self.mix(self.user(u), x)


class BranchOnFive(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if u.shape[0] > 5 else h, x)


class BranchOnBigBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if x.shape[0] >= 12 else h, x)


class BranchOnEven(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if x.shape[0] % 2 == 0 else h, x)


class BranchOnExactly(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * 2 if x.shape[0] == 6 else h, x)


class BranchOnFeatureSize(Plain):
    """Compares the batch with a feature dim."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h.t() if h.shape[0] == h.shape[1] else h, x)


class BroadcastByChance(Plain):
    """[4] meets [B]: only a batch of 4 or 1 would run."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return h.sum(-1) + self.b(x).sum(-1) if h.shape[0] != 4 else self.mix(h, x) + h[0]


class FeatureDimIsSeven(nn.Module):
    """As many features as the example has rows."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 7)

    def forward(self, u_wide: Tensor, x_wide: Tensor) -> Tensor:
        h = torch.relu(self.a(u_wide))
        return ((h - h.mean(1, keepdim=True)) * x_wide).sum(-1)


class ConstantOfExampleSize(nn.Module):
    """A parameter with one entry a row of the example: only that batch size runs."""

    hoists = False
    refused = True

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(7, 1))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * self.w * x).sum(-1)


class ConstantPerRowSliced(nn.Module):
    """A row bias for up to 64 rows, cut to the batch."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 1))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * self.w[: u.shape[0]] * x).sum(-1)


class PositionTable(nn.Module):
    """Positions of the sequence, not of the batch."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 4))
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        h = self.a(u_seq + self.w[: u_seq.shape[1]])
        return (torch.relu(h).sum(1) * x).sum(-1)


class SqueezeAll(nn.Module):
    """squeeze() also drops a batch of one."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.a(torch.relu(u)).squeeze() + x.sum(-1))


class SqueezeThenSoftmax(nn.Module):
    """What a batch of one changes is more than the shape."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u).unsqueeze(1).squeeze()
        return h.softmax(0 if h.ndim == 1 else 1) * x


class SqueezeBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).squeeze(0), x)


class ExplicitViewOfBatch(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        batch, length, width = u_seq.size()
        return (torch.relu(self.a(u_seq.reshape(batch, length * width))) * x).sum(-1)


class HalfOfBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        half = u.shape[0] // 2
        return torch.cat([self.mix(h, x)[:half] * 2, self.mix(h, x)[half:]])


class ItemInScale(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * (1.0 / (1.0 + float(h.abs().max().detach()))), x)


class ItemFromFirstRow(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x) * u[0, 0].item() if u.shape[0] else self.mix(self.user(u), x)


class BranchOnData(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        if h.sum() > 10:
            h = h * 2
        return self.mix(h, x)


class BranchOnAny(nn.Module):
    hoists = False

    def forward(self, u_flag: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return ((u * 2 if u_flag.any() else u) * x).sum(-1)


class SubmoduleBranchesOnData(Plain):
    """Data-dependent code inside a submodule: the rest is traced around it."""

    hoists = True

    class Gate(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * 2 if bool((h.sum() > 10).item()) else h

    def __init__(self) -> None:
        super().__init__()
        self.gate = self.Gate()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.gate(self.user(u)), x)


class LoopOverHistory(nn.Module):
    """A Python loop over time, unrolled."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        h = u_seq.new_zeros(u_seq.shape[0], 4)
        for t in range(u_seq.shape[1]):
            h = self.cell(u_seq[:, t], h)
        return (h * x).sum(-1)


class ChoosesByTensor(Plain):
    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.cond(x.sum() > 0, lambda h: h * 2, lambda h: h * 3, (self.user(u),)), x)


@torch.no_grad()
def test_a_trial_has_no_more_than_the_rewritten_model() -> None:
    """Bodies of a branch, say, that only the trace holds."""
    torch.manual_seed(0)
    model = ChoosesByTensor().eval()
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    rewritten = roo.rewrite(model, (torch.randn(6, 4), torch.randn(6, 4)), spec=spec, split="never")
    assert "whose bodies are not followed" in str(rewritten.report)
    u, x, counts = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([2, 0, 3])
    want = model(u.repeat_interleave(counts, 0), x)
    torch.testing.assert_close(rewritten(u, x, num_impressions=counts), want)
