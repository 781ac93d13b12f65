"""Random numbers: as many, in the same order, for every impression. Training statistics: by impressions."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hazard_parts import Plain
from torch import Tensor, nn

MODES = (False, True)


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class Dropout(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.drop(self.user(u)), x)


class DropoutTwice(Dropout):
    """Two masks drawn in turn, one on each side."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        v = self.drop(self.b(x))
        h = self.drop(self.user(u))
        return (h * v).sum(-1)


class DropoutOfTransposed(nn.Module):
    """Drawn over columns that lie in memory row by row."""

    hoists = True
    options = {"split": "always"}

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(torch.cat([u, x], 1)).view(-1, 2, 4).transpose(1, 2)
        return F.dropout(h, 0.5, self.training)


class DropoutInEval(Plain):
    """Functional dropout that forgets the mode."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.dropout(self.user(u), 0.5), x)


class AlphaDropout(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.alpha_dropout(self.user(u), 0.5, self.training), x)


class FeatureDropout(nn.Module):
    hoists = False

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (F.dropout1d(u_seq, 0.5, self.training).sum(1) * x).sum(-1)


class NoiseOnUser(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h + torch.randn_like(h), x)


class NoisePerFeature(Plain):
    """Noise without a batch is drawn between two that have one."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        first = torch.rand_like(x)
        second = torch.rand(4, dtype=x.dtype)
        third = torch.rand(x.shape[0], 4, dtype=x.dtype)
        return self.mix(self.user(u) * second, x + first * third)


class SampleOfATable(Plain):
    """A sample for every id, whoever asks: with its first draw the user's part moves, drawn once a call."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def sampled(self) -> Tensor:
        return F.gumbel_softmax(self.table, 0.5)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(self.sampled()[u_id]), F.dropout(x, 0.5, self.training))


class SampleAfterDropout(SampleOfATable):
    """A sample of no row behind a draw of every impression: both stay in order."""

    hoists = True

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        noisy = F.dropout(x, 0.5)
        return self.mix(self.user(self.table[u_id]) * self.sampled().sum(0), noisy)


class TwoSamples(SampleOfATable):
    """The second sample may not overtake the first, which stays where the item asks for it."""

    hoists = True

    def forward(self, u_id: Tensor, x_id: Tensor) -> Tensor:  # type: ignore[override]
        item = self.sampled()[x_id]
        return self.mix(self.user(self.sampled()[u_id]), item + torch.rand_like(item))


class UnusedNoise(Plain):
    """A draw nobody reads moves the generator on."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        torch.rand(3)
        return self.mix(self.user(u), x + torch.rand_like(x))


class InplaceNoise(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        noise = torch.empty_like(x).normal_()
        return self.mix(self.user(u), x + noise + torch.empty_like(x).uniform_(0, 1))


class Gumbel(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.gumbel_softmax(self.user(u), 0.5), x)


class Bernoulli(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h * torch.bernoulli(torch.sigmoid(h)), x)


class Multinomial(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = torch.softmax(self.user(u), -1)
        return h.gather(1, torch.multinomial(h, 1)).squeeze(1) * self.b(x).sum(-1)


class Reparametrised(Plain):
    """The latent of a variational autoencoder."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(torch.distributions.Normal(h, F.softplus(self.a(u))).rsample(), x)


class ShuffledRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u)[torch.randperm(u.shape[0])], x)


class RandomNegative(nn.Module):
    """An item of the batch, drawn at random, as a negative."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        other = torch.randint(max(x.shape[0], 1), (x.shape[0],))
        return (u * x).sum(-1) - (u * x[other]).sum(-1)


class PythonRandom(Plain):
    """A branch on Python's own generator."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * random.Random(3).random(), x) if self.training else self.mix(self.user(u), x)


class LayerDrop(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        if torch.rand(()) < 0.5:
            h = h * 2
        return self.mix(h, x)


class OwnGenerator(Plain):
    """A generator of its own, seeded at each call."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        noise = torch.rand(4, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
        return self.mix(self.user(u) * noise, x)


class SeedsInForward(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return self.mix(self.user(u), x + torch.rand_like(x))


class RandomizedRelu(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.rrelu(self.user(u) - 0.3, training=self.training), x)


class AttentionDropout(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        out, _ = self.attention(u_seq, u_seq, u_seq, need_weights=False)
        return (out.sum(1) * x).sum(-1)


class RnnDropout(nn.Module):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (self.rnn(u_seq)[0][:, -1] * x).sum(-1)


class TransformerUser(nn.Module):
    hoists = False
    caught = True  # in eval without gradients the original takes another kernel

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    modes = (True,)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (self.layer(u_seq).sum(1) * x).sum(-1)


class TransformerUserEval(TransformerUser):
    hoists = False
    modes = (False,)


class LeafDropout(Plain):
    """Random numbers inside of a module that cannot be traced."""

    hoists = True

    class Inner(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            if float(h.detach().sum()) > 1e9:
                return h
            return F.dropout(h, 0.5, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.inner(self.user(u)), x)


class UserBatchNorm(nn.Module):
    """Batch norm of a request value: weighted by impressions, running statistics included."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.norm(self.a(u))) * x).sum(-1)


class BatchNormNoStatistics(UserBatchNorm):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)


class BatchNormNoAffine(UserBatchNorm):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False, momentum=0.3)


class BatchNormCumulative(UserBatchNorm):
    """momentum=None: a plain average over all calls."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)


class BatchNormOfSequence(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.norm(self.a(u_seq))).sum(1) * x).sum(-1)


class BatchNormFolded(nn.Module):
    """Over [B * T, D]."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        h = self.norm(self.a(u_seq).view(-1, 4)).view_as(u_seq)
        return (torch.tanh(h).sum(1) * x).sum(-1)


class BatchNormShared(UserBatchNorm):
    """One batch norm on both sides: its statistics move twice, in order."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        v = self.norm(x)
        return (self.norm(self.a(u)) * v).sum(-1)


class BatchNormOfParameter(UserBatchNorm):
    """Its batch is rows of one parameter, as many as there are impressions."""

    hoists = True
    options = {"split": "always"}

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        rows = self.w.expand(u.shape[0], -1)
        return (self.a(u) * self.norm(rows + rows) * x).sum(-1)


class BatchNormOnBoth(UserBatchNorm):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.a(u)) * x).sum(-1)


class BatchNormReadAfter(UserBatchNorm):
    """The running mean is read after it moved."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        v = self.norm(x)
        h = torch.tanh(self.a(u)) - self.norm.running_mean
        return (h * v).sum(-1)


class BatchNormUnused(UserBatchNorm):
    """Called for its statistics alone."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.norm(self.a(u).detach())
        return (torch.tanh(self.a(u)) * x).sum(-1)


class BatchNormFrozen(UserBatchNorm):
    """One part of the model stays in eval."""

    hoists = True

    def train(self, mode: bool = True) -> BatchNormFrozen:
        super().train(mode)
        self.norm.eval()
        return self


class BatchNormUnderNoGrad(UserBatchNorm):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.norm(u)
        return (torch.tanh(self.a(h)) * x).sum(-1)


class BatchNormWide(nn.Module):
    """BatchNorm2d over [B, C, H, W]."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.norm(self.conv(u_seq[:, None]))).sum((1, 2)) * x).sum(-1)


class GroupAndInstanceNorm(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(1, 5)
        self.instance = nn.InstanceNorm1d(5)
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.instance(self.group(self.a(u_seq)))).sum(1) * x).sum(-1)


class TrackedInstanceNorm(nn.Module):
    """Its running statistics are means over the batch."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(5, track_running_stats=True)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return (self.norm(u_seq).sum(1) * x).sum(-1)
