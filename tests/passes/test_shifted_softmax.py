"""shifted_softmax: a softmax does not wait for the maximum of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roo_rewrite as roo
from passes.normalize import normalize

BANNED = torch.tensor([False, True, False, False, True])
FALLS = {
    "of everything": lambda s: (s - s.max()).softmax(-1),
    "torch.max, detached": lambda s: F.softmax(s - torch.max(s).detach(), dim=-1),
    "amax of everything": lambda s: F.log_softmax(s - s.amax(), dim=-1),
    "of each row": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "of each row, with its place": lambda s: (s - s.max(-1, keepdim=True)[0]).softmax(-1),
    "over batch and entries": lambda s: (s - s.amax((0, -1), keepdim=True)).softmax(-1),
    "masked first": lambda s: (lambda t: (t - t.max()).softmax(-1))(s.masked_fill(BANNED[: s.shape[-1]], -torch.inf)),
}
STAYS = {
    "of another value": lambda s: (s - (2 * s).max()).softmax(-1),
    "of each column": lambda s: (s - s.amax(0, keepdim=True)).softmax(-1),
    "without keepdim": lambda s: (s - s.amax(0)).softmax(-1),
    "added": lambda s: (s + s.max()).softmax(-1),
    "twice": lambda s: torch.sub(s, s.max(), alpha=2).softmax(-1),
    "a minimum": lambda s: (s - s.min()).softmax(-1),
    "the place of the maximum": lambda s: (s - s.max(-1, keepdim=True)[1]).softmax(-1),
    "an exponential": lambda s: (s - s.max()).exp(),
}


@pytest.mark.parametrize(("way", "falls"), [(w, True) for w in FALLS] + [(w, False) for w in STAYS])
def test_before_and_after(way: str, falls: bool, captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    trace, _ = captured(lambda m, u, x: {**FALLS, **STAYS}[way](u) + x)
    normalize(trace)
    assert ("softmax(u, -1)" in printed(trace.graph) or "softmax(masked_fill, -1)" in printed(trace.graph)) is falls


SOFTMAX = ("softmax", "log_softmax")


class Attention(nn.Module):
    """A user's history attends to itself; the scores lose the largest score of the batch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = {**FALLS, **STAYS}[way]
        self.q, self.k, self.item = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        weights = self.way(self.q(history) @ self.k(history).transpose(1, 2))
        return ((weights @ history).sum(1) * self.item(item)).sum(1)


@pytest.mark.parametrize("way", ["of everything", "over batch and entries", "masked first", "added", "a minimum"])
def test_attention_runs_once_per_request(way: str) -> None:
    torch.manual_seed(0)
    model = Attention(way)
    found = roo.rewrite(
        model, (torch.randn(7, 5, 4), torch.randn(7, 4)), spec=roo.FeatureSpec(["history"], ["item"]), check=True
    )
    roo.verify(model, found, batches=4)
    once = any(n.op.split(".")[0] in SOFTMAX and n.runs == "request" for n in found.report.nodes)
    assert once is (way in FALLS), str(found.report)
