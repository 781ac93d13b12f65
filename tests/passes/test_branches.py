"""`if mask.any():` one trace for both ways, where going in changes nothing on a batch that stays out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roo_rewrite as roo
from passes.branches import settled
from roo_rewrite.capture import Captured
from roo_rewrite.inputs import Inputs

Made = Callable[..., tuple[Captured, Inputs]]


def _written_rows(m: Any, u: Tensor, x: Tensor) -> Tensor:
    masked = u > 0
    none = masked.all(dim=1)
    if none.any():
        masked = masked.clone()
        masked[none, 0] = False
    return x.masked_fill(masked, 2.0)


def _not_numbers(m: Any, u: Tensor, x: Tensor) -> Tensor:
    shares = F.softmax(u.masked_fill(u < 0, float("-inf")), 1)
    if torch.isnan(shares).any():
        shares = torch.where(torch.isnan(shares), 0.0, shares)
    return shares * x @ m.w


def _unless_all(m: Any, u: Tensor, x: Tensor) -> Tensor:
    kept = u > 0
    if not kept.all():
        x = x.masked_fill(~kept, 0.0)
    return x


def _twice(m: Any, u: Tensor, x: Tensor) -> Tensor:
    none = (u > 0).all(1)
    if none.any().item():
        x = torch.where(none.unsqueeze(1), torch.zeros_like(x), x)
    y = F.dropout(x @ m.w, 0.5, m.training)
    if torch.any(none):
        y = y.masked_fill(none.view(-1, 1), 1.0)
    if (x < 0).any():
        y = y.masked_fill(x < 0, 3.0)
    return y


@pytest.mark.parametrize(
    ("function", "training"),
    [(_written_rows, False), (_not_numbers, False), (_unless_all, False), (_twice, False), (_twice, True)],
)
def test_going_in_changes_nothing(captured: Made, function: Callable[..., Any], training: bool) -> None:
    found, _ = captured(function, training)
    outputs = len(found.graph.output_node().args[0])  # type: ignore[arg-type]
    count = len(found.branches)
    assert count
    assert settled(found)
    assert len(found.graph.output_node().args[0]) == outputs - count == 1  # type: ignore[arg-type]


def _other_rows(m: Any, u: Tensor, x: Tensor) -> Tensor:
    return x + 1 if (u > 0).all(1).any() else x


def _other_mask(m: Any, u: Tensor, x: Tensor) -> Tensor:
    if (u > 0).any():
        x = x.masked_fill(u < 0, 0.0)
    return x


def _or_another(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u > 0
    if rows.any():
        x = x.masked_fill(torch.logical_or(rows, x < 0), 0.0)
    return x


def _and_another(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u > 0
    if not rows.all():
        x = torch.where(torch.logical_and(rows, x < 0), x, torch.zeros_like(x))
    return x


def _two_ways(m: Any, u: Tensor, x: Tensor) -> Tensor:
    none = (u > 0).all(1)
    if none.any():
        x = x.masked_fill(none.view(-1, 1), 0.0)
    else:
        x = x * 2
    return x


def _remembered(m: Any, u: Tensor, x: Tensor) -> Tensor:
    below, above = (u < 0).all(1, keepdim=True), (u > 0).all(1, keepdim=True)
    either = False
    if below.any():
        x, either = x.masked_fill(below, 0.0), True
    if above.any():
        x, either = x.masked_fill(above, 0.0), True
    return x if either else x + 1


def _looked_up(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u[:, :1] > 0
    if rows.any():
        x = torch.where(rows, x.gather(1, x.long() + 9), x)
    return x


def _learned(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u[:, :1] > 0
    if rows.any():
        x = torch.where(rows, m.w[0], x)
    return x


def _learned_itself(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u[:, :1] > 0
    if rows.any():
        x = torch.where(rows, m.norm.weight, x)
    return x


def _two_masks(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = (u > 0).all(1)
    x = x.clone()
    if rows.any():
        x[rows, m.m > 0] = 0.0
    return x


def _divided(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u[:, :1] > 0
    if rows.any():
        x = torch.where(rows, 1 / x, x)
    return x


def _drawn(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = u > 0
    if rows.any():
        x = torch.where(rows, torch.rand_like(x), x)
    return x + torch.rand_like(x)


def _many_values(m: Any, u: Tensor, x: Tensor) -> Tensor:
    rows = (u > 0).all(1)
    x = x.clone()
    if rows.any():
        x[rows] = u[rows]
    return x


def _laid_out_anew(m: Any, u: Tensor, x: Tensor) -> Tensor:
    none = (u > 0).all(1)
    y = (u.unsqueeze(2) * x.unsqueeze(1)).transpose(1, 2)
    if none.any():
        y = y.masked_fill(none.view(-1, 1, 1), 0.0)
    return F.dropout(y, 0.5, True)


def _early(m: Any, u: Tensor, x: Tensor) -> Any:
    rows = u > 0
    if not rows.any():
        return x, x
    return x.masked_fill(rows, 0.0)


@pytest.mark.parametrize(
    "function",
    [
        _other_rows,
        _other_mask,
        _or_another,
        _and_another,
        _two_ways,
        _remembered,
        _looked_up,
        _learned,
        _learned_itself,
        _two_masks,
        _divided,
        _drawn,
        _many_values,
        _laid_out_anew,
        _early,
    ],
)
def test_what_may_change_something_is_declined(captured: Made, function: Callable[..., Any]) -> None:
    try:
        found, _ = captured(function)
    except roo.RooError:
        return
    assert not found.branches or not settled(found)


class Attends(nn.Module):
    """Attention over histories, those of padding alone mended."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.item = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(16, 1)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        padded = history == 0
        none = padded.all(dim=1)
        if none.any():
            padded = padded.clone()
            padded[none, 0] = False
        vectors = self.history(history)
        seen, _ = self.attention(vectors, vectors, vectors, key_padding_mask=padded, need_weights=False)
        if none.any():
            seen = seen.masked_fill(none.view(-1, 1, 1), 0.0)
        return self.out(torch.cat([seen.mean(1), self.item(item)], 1))


@pytest.mark.parametrize("full", [False, True])
def test_attention_runs_once_per_request(full: bool) -> None:
    """Also where the example holds no row of padding alone."""
    history = torch.tensor([[1, 2, 0], [3, 4, 5] if full else [0, 0, 0], [3, 4, 5], [1, 0, 0]])
    model = Attends().eval()
    spec = roo.FeatureSpec(["history"], ["item"])
    rewritten = roo.rewrite(model, (history, torch.arange(4)), spec=spec, fanout=10, check=True)
    roo.verify(model, rewritten, batches=4)
    program = rewritten._whole_program()
    assert program.plan is not None
    moved = {str(node.target) for node in program.plan.request}
    assert "aten.scaled_dot_product_attention.default" in moved
    for rows in ([0, 0, 0], [1, 2, 3]):
        given = torch.tensor([rows, [4, 0, 0]])
        scores = rewritten(given, torch.arange(5), num_impressions=torch.tensor([3, 2]))
        torch.testing.assert_close(scores, model(given[[0, 0, 0, 1, 1]], torch.arange(5)))
