"""In-place operations: on inputs, intermediates, views and under no_grad."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hazard_parts import Plain
from torch import Tensor, nn


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class WritesIntermediate(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u)
        h += 1
        h.mul_(2).relu_()
        return self.mix(h, x)


class WritesInputCopy(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        v = u.clone()
        v[:, 0] = 0
        v[:, 1] += v[:, 0] + 1
        return self.mix(self.user(v), x)


class ReturnsFilled(Plain):
    """A constant written over an output takes its gradient away, which is not that of the others."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = x.clone()
        v.fill_(0.5)
        return v, self.mix(self.user(u), x)


class WritesInput(nn.Module):
    """Integer inputs may be written into; the caller's tensor is not what is compared."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        ids = u_ids.clone()
        ids[ids == 3] = 0
        ids.clamp_(max=4)
        return (self.e(ids).sum(1) * x).sum(-1)


class WritesRequestInput(nn.Module):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        u_id.remainder_(4)
        return (self.e(u_id) * x).sum(-1)


class WritesOneRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        h[:1] = 0
        return self.mix(h, x)


class WritesRowsOfBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        out = torch.zeros(u.shape[0], 4, dtype=u.dtype)
        out[1:] = h[:-1]
        return self.mix(out, x)


class FillsBuffer(Plain):
    """Columns written into a fresh tensor, one side after the other."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        out = u.new_empty(u.shape[0], 8)
        out[:, :4] = self.user(u)
        out[:, 4:] = self.b(x)
        return out.prod(-1)


class MasksByIndex(Plain):
    hoists = True

    def forward(self, u: Tensor, u_flag: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).clone()
        h[u_flag] = -1
        return self.mix(h, x)


class MasksByImpression(Plain):
    hoists = True

    def forward(self, u: Tensor, x_flag: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).clone()
        h[x_flag] = -1
        return self.mix(h, x)


class WritesAfterRead(Plain):
    """The value before the write is used as well."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u)
        before = h * 1
        view = h[:, :2]
        h.add_(1)
        return self.mix(before, x) + view.sum(-1)


class WritesThroughView(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        h.view(-1, 2, 2)[:, 0].mul_(3)
        return self.mix(h, x)


class WritesThroughTranspose(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        h.t()[0] = 5
        return self.mix(h, x)


class WritesThroughSplit(Plain):
    """torch refuses it where gradients are on."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        first, second = h.chunk(2, 1)
        first.mul_(second)
        return self.mix(h, x)


class WritesUserFromItem(Plain):
    """An impression value written into a request value."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u) * 1
        h.add_(self.b(x))
        return h.sum(-1)


class WritesUserColumnFromItem(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u) * 1
        h[:, 0] = self.b(x)[:, 0]
        return h.sum(-1)


class WritesUnderNoGrad(Plain):
    """The value changes, the gradient does not."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        with torch.no_grad():
            h.clamp_(-0.2, 0.2)
        return self.mix(h, x)


class WritesData(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        h.data.mul_(3)
        return self.mix(h, x)


class WritesDetached(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        h.detach()[:, 0] = 7
        return self.mix(h, x)


class Detached(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).detach(), x)


class NoGradTower(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.user(u)
        return self.mix(h, x)


class NoGradInside(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        with torch.no_grad():
            scale = 1 / (h.norm(dim=1, keepdim=True) + 1)
        return self.mix(h * scale, x)


class GradInsideNoGrad(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.user(u)
            with torch.enable_grad():
                v = self.b(x)
        return (h * v).sum(-1)


class DecoratedNoGrad(Plain):
    hoists = True

    @torch.no_grad()
    def frozen(self, u: Tensor) -> Tensor:
        return self.a(u).sigmoid()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.frozen(u), x)


class StraightThrough(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        soft = torch.sigmoid(self.a(u))
        hard = (soft > 0.5).to(soft.dtype)
        return self.mix(hard.detach() - soft.detach() + soft, x)


class InplaceRelu(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.LeakyReLU(0.1, True))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.net(u) * x).sum(-1)


class InplaceActivationOfView(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        F.relu(h[:, 1:3], inplace=True)
        return self.mix(h, x)


class MaskedFillInplace(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)

    def forward(self, u_seq: Tensor, u_mask: Tensor, x: Tensor) -> Tensor:
        scores = self.a(torch.tanh(u_seq)).squeeze(-1)
        scores.masked_fill_(~u_mask, -1e9)
        return (scores.softmax(-1).unsqueeze(-1) * u_seq).sum(1).mul(x).sum(-1)


class AccumulatesInto(nn.Module):
    """A running sum over time, kept in place."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros_like(u_seq[:, 0])
        for t in range(u_seq.shape[1]):
            total += torch.tanh(self.a(u_seq[:, t]))
        return (total * x).sum(-1)


class ScattersIntoRow(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        bag = torch.zeros(u_ids.shape[0], 6, dtype=x.dtype).scatter_add_(
            1, u_ids, torch.ones_like(u_ids, dtype=x.dtype)
        )
        return (torch.tanh(self.a(bag)) * x).sum(-1)


class ScattersOverRows(nn.Module):
    """Rows added into the slots of a table."""

    hoists = False

    def forward(self, u_id: Tensor, u: Tensor, x: Tensor) -> Tensor:
        table = torch.zeros(6, 4, dtype=u.dtype)
        table.index_add_(0, u_id, u)
        return (table[u_id] * x).sum(-1)


class SwapsInPlace(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * 1
        first = h[:, 0].clone()
        h[:, 0] = h[:, 1]
        h[:, 1] = first
        return self.mix(h, x)


class OutArgument(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        out = torch.empty_like(x)
        torch.mul(x.detach(), 2, out=out)
        return self.mix(h, out)


class PadsInPlace(nn.Module):
    """Right-aligned histories by an in-place copy row by row would be a loop; here by index_put_."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        h = self.a(u_seq)
        h[torch.arange(u_seq.shape[0]), u_len - 1] = 0
        return (h.sum(1) * x).sum(-1)
