"""The report says what one mask would gain: as much as the model that has it saves."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roo_rewrite as roo


class Encoder(nn.Module):
    """Two layers of attention over history and target. mask: None, or what each row sees.

    "by hand" ends in rows that are weighted alike for all: weights of an attention's size, which no mask is for.
    """

    def __init__(self, spelling: str, mask: Tensor | None):
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.mask = spelling, mask
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.weights = nn.Parameter(torch.randn(9, 9)) if spelling == "by hand" else None

    def forward(self, user_history: Tensor, item: Tensor) -> Tensor:
        h = torch.cat([user_history, item.unsqueeze(1)], 1)
        for layer in self.layers:
            q = layer(h)
            if self.spelling == "fused":
                h = q + F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask)
            else:
                scores = q @ q.transpose(1, 2)
                scores = scores if self.mask is None else scores.masked_fill(~self.mask, float("-inf"))
                h = q + scores.softmax(-1) @ q
        if self.weights is not None:
            h = self.weights.softmax(-1) @ h
        return h[:, -1].sum(1)


CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
APART = torch.ones(9, 9, dtype=torch.bool)
APART[:8, 8] = False


def report(spelling: str, mask: Tensor | None, **options: Any) -> roo.RequestModel:
    spec = roo.FeatureSpec(request=["user_*"], impression=["item"])
    args = (torch.randn(5, 8, 8), torch.randn(5, 8))
    return roo.rewrite(Encoder(spelling, mask), args, spec=spec, fanout=64, **options)


@pytest.mark.parametrize("spelling", ["fused", "by hand"])
def test_the_figure_is_that_of_the_model_with_the_mask(spelling: str) -> None:
    (note,) = report(spelling, None, check=True).report.notes
    then, now = (float(n.replace(",", "")) for n in re.findall(r"([\d,]+) FLOPs|now ([\d,]+)", note) for n in n if n)
    assert now == pytest.approx(report(spelling, None).report.rewritten.flops, rel=0.01)
    assert then == pytest.approx(report(spelling, APART).report.rewritten.flops, abs=0.51)
    assert then < 0.5 * now


@pytest.mark.parametrize("mask", [CAUSAL, APART])
@pytest.mark.parametrize("spelling", ["fused", "by hand"])
def test_a_mask_that_is_there_gains_nothing_more(spelling: str, mask: Tensor) -> None:
    assert not report(spelling, mask).report.notes


def test_rows_that_would_see_nothing_are_not_proposed() -> None:
    mask = torch.eye(9, dtype=torch.bool).flip(0)
    mask[1:, :] = True
    assert not report("fused", mask).report.notes  # row 0 sees the target alone
