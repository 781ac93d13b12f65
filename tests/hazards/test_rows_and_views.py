"""Picks, shifts and views: some renumber rows, most only look as if they did."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hazard_parts import Plain
from torch import Tensor, nn


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class FirstRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h - h[0], x)


class LastRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h + h[-1:], x)


class DropsFirstRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u)[1:], x[1:])


class ShiftedRows(Plain):
    """Each row with the row before it."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(torch.cat([h[:1], h[:-1]]), x)


class RolledRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).roll(1, 0), x)


class RolledFlat(Plain):
    """roll without a dim runs over row ends."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).roll(1), x)


class FlippedRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).flip(0), x)


class FlippedFeatures(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).flip(1), x)


class EverySecondRow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.b(x).sum(-1) + h[::2].sum()


class HalvedBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        first, second = self.user(u).chunk(2)
        return self.b(x).sum(-1) + first.sum() - second.sum()


class UnboundRows(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        rows = self.user(u).unbind(0)
        return self.mix(torch.stack(rows), x)


class LoopOverRows(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self.mix(self.user(u[i]), x[i]) for i in range(u.shape[0])])


class LoopOverLen(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self.mix(self.user(u[i]), x[i]) for i in range(len(u))])


class IteratesTensor(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self.mix(self.user(a), b) for a, b in zip(u, x)])


class RowNumberAsValue(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h + torch.arange(h.shape[0])[:, None], x)


class RowNumberParity(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h, x) * (torch.arange(h.shape[0]) % 2)


class RowPick(nn.Module):
    """arange(B) that only picks rows is harmless."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        last = self.a(u_seq)[torch.arange(u_seq.shape[0]), u_len - 1]
        return (last * x).sum(-1)


class WrongRowPick(nn.Module):
    """arange(B) reversed picks another's row."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        rows = torch.arange(u_seq.shape[0]).flip(0)
        return (self.a(u_seq)[rows, u_len - 1] * x).sum(-1)


class PermutedRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u)[torch.arange(u.shape[0] - 1, -1, -1)], x)


class RowIdsFromData(Plain):
    """The ids of another feature pick rows of the batch."""

    hoists = True

    def forward(self, u: Tensor, x_one: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h[x_one.argsort()], x)


class GatherOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h.gather(0, h.argsort(0)), x)


class TransposedView(Plain):
    """view(-1, B) after a transpose mixes rows."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h.reshape(4, -1).t(), x)


class FoldedFeatures(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u).view(-1, 2, 2).transpose(1, 2).reshape(-1, 4), x)


class FoldedIntoBatch(Plain):
    """[B * 2, 2] and back is harmless."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).view(-1, 2)
        return self.mix((h / (h.norm(dim=1, keepdim=True) + 1)).view(-1, 4), x)


class FoldedPairsOfRows(Plain):
    """[B * 4 / 8, 8] would need an even batch: two rows in one."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([self.user(u), self.user(u)], 0).view(-1, 8)
        return self.b(x).sum(-1) + h.softmax(-1).sum()


class FlattenEverything(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).flatten().softmax(0).view(-1, 4)
        return self.mix(h, x)


class StackedTwice(Plain):
    """cat of the batch with itself, then taken apart."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([self.user(u), self.b(x)], 0)
        h, v = torch.tanh(both).chunk(2, 0)
        return (h * v).sum(-1)


class StackedFront(Plain):
    """stack at dim 0 moves the batch to dim 1."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = torch.stack([self.user(u), self.a(u)], 0)
        return self.mix(h.softmax(0).sum(0), x)


class SeqFirst(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        out, _ = self.rnn(u_seq.transpose(0, 1))
        return (out[-1] * x).sum(-1)


class SeqFirstAttention(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        seq = u_seq.permute(1, 0, 2)
        out, _ = self.attention(seq, seq, seq, need_weights=False)
        return (out.mean(0) * x).sum(-1)


class TargetAttention(nn.Module):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(4, 4)
        self.v = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_mask: Tensor, x: Tensor) -> Tensor:
        scores = (self.k(u_seq) @ x[:, :, None]).squeeze(-1).masked_fill(~u_mask, float("-inf"))
        return (torch.nan_to_num(scores.softmax(-1))[:, None] @ self.v(u_seq)).squeeze(1).sum(-1)


class FullyMasked(nn.Module):
    """A row with nothing to attend to is NaN in both."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(4, 4)

    def forward(self, u_seq: Tensor, u_mask: Tensor, x: Tensor) -> Tensor:
        scores = self.k(u_seq).sum(-1).masked_fill(~u_mask, float("-inf"))
        return (scores.softmax(-1)[:, None] @ u_seq).squeeze(1).sum(-1) + x.sum(-1)


class HistoryAndTarget(nn.Module):
    """Non-causal attention over history and target: the history sees the target."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        tokens = torch.tanh(torch.cat([self.e(u_ids), self.e(x_id)[:, None]], 1))
        out, _ = self.attention(tokens, tokens, tokens)
        return out.sum((1, 2))


class CausalHistoryAndTarget(nn.Module):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        tokens = torch.cat([self.e(u_ids), self.e(x_id)[:, None]], 1)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).sum((1, 2, 3))


class TargetBeforeHistory(nn.Module):
    """Causal, but the target comes first: the history sees it."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        tokens = torch.cat([self.e(x_id)[:, None], torch.tanh(self.e(u_ids))], 1)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).sum((1, 2, 3))


class SharedIdVector(nn.Module):
    """History and target ids in one flat vector, looked up once."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 4)

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        flat = torch.cat([u_ids.reshape(-1), x_id])
        rows = self.e(flat)
        history = rows[: u_ids.numel()].view(*u_ids.shape, 4)
        return (history.sum(1) * rows[u_ids.numel() :]).sum(-1)


class StridedWindow(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).contiguous()
        return self.mix(torch.as_strided(h, (h.shape[0], 4), (4, 1)), x)


class Unfolded(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.user(u).unfold(1, 2, 1).sum((1, 2)) + self.b(x).sum(-1)


class UnfoldedRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = F.pad(self.user(u), (0, 0, 1, 0))
        return self.mix(h.unfold(0, 2, 1).sum(-1), x)


class PaddedRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = F.pad(self.user(u), (0, 0, 0, 1))
        return self.mix(h[:-1], x) + h.sum()


class OuterOfTwoUsers(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return torch.einsum("bi,bj->bij", h, self.a(u)).flatten(1).sum(1) * self.b(x).sum(-1)


class Diagonal(Plain):
    """The diagonal of a [B, B] product is row-wise, but not by any one op."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return torch.diagonal(h @ h.t()) + self.b(x).sum(-1)


class TrilOverBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.tril(self.user(u)), x)


class RepeatedBatch(Plain):
    """repeat along the batch, averaged back: harmless in value."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).repeat(3, 1)
        return self.mix(h.view(3, -1, 4).mean(0), x)


class InterleavedBatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = torch.repeat_interleave(self.user(u), 3, 0)
        return self.mix(torch.tanh(h).view(-1, 3, 4).mean(1), x)


class RepeatedWrongly(Plain):
    """repeat and then interleaved view: rows of different users meet."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).repeat(3, 1)
        return self.mix(h.view(-1, 3, 4).mean(1), x)


class MeshOfRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u).sum(-1)
        first, second = torch.meshgrid(h, h, indexing="ij")
        return (first * second).mean(1) + self.b(x).sum(-1)


class Bmm(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h, v = self.user(u), self.b(x)
        fields = torch.stack([h, self.a(u), v], 1)
        return torch.bmm(fields, fields.transpose(1, 2)).triu(1).sum((1, 2))


class BmmOverBatch(Plain):
    """The batch as the inner dims of a bmm."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)[None]
        return torch.bmm(h, h.transpose(1, 2))[0].sum(1) + self.b(x).sum(-1)
