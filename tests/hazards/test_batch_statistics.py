"""Statistics, softmaxes, orders and picks over the batch: they know other rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hazard_parts import Plain
from torch import Tensor, nn


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class MeanOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h.mean(0), x)


class MeanKeepdim(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h.mean(dim=0, keepdim=True), x)


class StdOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h / (h.std(0, unbiased=False) + 1), x)


class VarMeanOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        var, mean = torch.var_mean(h, 0, unbiased=False)
        return self.mix((h - mean) * (var + 1).rsqrt(), x)


class MeanOfEverything(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h / (1 + h.abs().mean()), x)


class MaxOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h.max(), x)


class AmaxOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h.amax(0), x)


class NormOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.normalize(self.user(u), dim=0), x)


class FrobeniusNorm(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h / (h.norm() + 1), x)


class RowNorm(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(F.normalize(self.user(u), dim=-1), x)


class BatchSoftmax(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.softmax(self.user(u), 0), x)


class DefaultSoftmax(Plain):
    """softmax without a dim takes dim 0 of a vector."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.user(u).sum(-1).softmax(0) * x.sum(-1)


class LogSumExpOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - torch.logsumexp(h, 0), x)


class InBatchNegatives(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        scores = self.user(u) @ self.b(x).t()
        return scores.diagonal() - torch.logsumexp(scores, 1)


class InBatchCrossEntropy(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        scores = self.user(u) @ self.b(x).t()
        return F.cross_entropy(scores, torch.arange(scores.shape[0]))


class UserGram(Plain):
    """Every user against every user of the batch."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return (h @ h.t()).sum(1) * x.sum(-1)


class AttendsAcrossBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(F.scaled_dot_product_attention(h[None], h[None], h[None])[0], x)


class TransformerOverBatch(nn.Module):
    """batch_first=False on [B, T, D]: the batch is taken for the sequence."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=False)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        h, _ = self.attention(u_seq, u_seq, u_seq)
        return h.sum((1, 2)) * x.sum(-1)


class RnnOverBatch(nn.Module):
    """A GRU that takes the batch for time."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        h, _ = self.rnn(u_seq)
        return h.sum((1, 2)) * x.sum(-1)


class CumsumOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).cumsum(0), x)


class CumsumOverFeatures(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).cumsum(1), x)


class DiffOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(torch.diff(h, dim=0, prepend=h[:1]), x)


class SortOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).sort(0).values, x)


class ArgsortOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u).sum(-1) + x.sum(-1)
        return h[h.argsort()]


class RankOfUser(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).sum(-1)
        return (h[:, None] > h[None, :]).double().sum(1) + self.b(x).sum(-1)


class SortInRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).sort(1).values, x)


class TopkInRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.user(u).topk(2, -1).values.sum(-1) + self.b(x).sum(-1)


class TopkOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        best = self.user(u).topk(1, 0).values
        return self.mix(best.expand(u.shape[0], -1), x)


class MedianOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h.median(0).values, x)


class QuantileOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - torch.quantile(h, 0.5, dim=0), x)


class UniqueUsers(nn.Module):
    """How many different users are in the batch."""

    hoists = False

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return x.sum(-1) * torch.unique(u_id).shape[0]


class UniqueInverse(nn.Module):
    """Looks each distinct user up once, as frugal code does."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        ids, where = torch.unique(u_id, return_inverse=True)
        return (self.table(ids)[where] * x).sum(-1)


class NonzeroRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        rows = (h.sum(-1) > 0.5).nonzero().squeeze(1)
        return self.b(x).sum(-1).index_add(0, rows, h[rows].sum(-1))


class MaskedRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        kept = h[h.sum(-1) > 0.5]
        return self.b(x).sum(-1) + kept.sum()


class MaskedSelectMean(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.b(x).sum(-1) + torch.masked_select(h, h > 0.1).sum()


class BatchMaxLength(nn.Module):
    """Divides by the longest history of the batch."""

    hoists = False

    def forward(self, u_len: Tensor, x: Tensor) -> Tensor:
        return x.sum(-1) * u_len / u_len.max()


class BatchMaxLengthItem(nn.Module):
    hoists = False

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        longest = int(u_len.max())
        return u_seq[:, :longest].sum((1, 2)) / longest + x.sum(-1)


class MaskFromBatchMax(nn.Module):
    hoists = False

    def forward(self, u_len: Tensor, x: Tensor) -> Tensor:
        positions = torch.arange(int(u_len.max()))
        return (positions[None, :] < u_len[:, None]).double().mean(1) * x.sum(-1)


class MaskFromOwnLength(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        mask = torch.arange(u_seq.shape[1])[None, :] < u_len[:, None]
        pooled = (self.a(u_seq) * mask[..., None]).sum(1) / u_len[:, None]
        return (pooled * x).sum(-1)


class GroupedMean(nn.Module):
    """The mean over rows with the same id, by scatter."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        h = self.table(u_id)
        sums = torch.zeros(6, 4, dtype=h.dtype).index_add(0, u_id, h * x)
        number = torch.bincount(u_id, minlength=6).clamp(min=1).to(h.dtype)
        return (sums / number[:, None])[u_id].sum(-1)


class FrequencyInBatch(nn.Module):
    """How often the user occurs in the batch."""

    hoists = False

    def forward(self, u_id: Tensor, x: Tensor) -> Tensor:
        return torch.bincount(u_id, minlength=6)[u_id] * x.sum(-1)


class InstanceNormOverBatch(nn.Module):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (F.instance_norm(u.t()[None])[0].t() * x).sum(-1)


class LayerNormOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).t()
        return self.mix(((h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1)).t(), x)


class DistanceToCentre(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return torch.cdist(h, h.mean(0, keepdim=True)).squeeze(1) + self.b(x).sum(-1)


class ConvolutionOverBatch(nn.Module):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.conv(u.t()[None])[0].t() * x).sum(-1)


class PoolingOverBatch(nn.Module):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (F.avg_pool1d(u.t()[None], 3, 1, 1)[0].t() * x).sum(-1)


class EinsumOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return torch.einsum("bi,cj->ij", h, h).sum() * self.b(x).sum(-1)


class Covariance(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h @ (h.t() @ h), x)


class FourierOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.fft.fft(self.user(u), dim=0).real, x)
