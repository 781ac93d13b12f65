"""Grouped batches and rewritten models: the scores and the training of the original."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import roo_rewrite as roo
from roo_rewrite.data import group
from roo_rewrite.features import FeatureSpec

SPEC = FeatureSpec(["user", "hist", "hist_lengths"], ["item"], jagged={"hist": "hist_lengths"})
IDS = [4, 1, 4, 2, 1, 4, 9, 2]


class Model(nn.Module):
    """A pooled history, a user and an item side."""

    def __init__(self) -> None:
        super().__init__()
        self.events = nn.Embedding(20, 3)
        self.mix = nn.Linear(3 + 2 + 4, 5)
        self.out = nn.Linear(5, 1)

    def forward(
        self, user: torch.Tensor, hist: torch.Tensor, hist_lengths: torch.Tensor, item: torch.Tensor
    ) -> torch.Tensor:
        """Scores, one per row."""
        starts = hist_lengths.cumsum(0) - hist_lengths
        pooled = functional.embedding_bag(hist, self.events.weight, starts, mode="sum")
        return self.out(torch.relu(self.mix(torch.cat([pooled, user, item], 1)))).squeeze(1)


def call(seed: int, ids: list[int]) -> dict[str, torch.Tensor]:
    """An impression-level call for these request ids."""
    torch.manual_seed(seed)
    users = torch.rand(10, 2, dtype=torch.float64)
    lengths = torch.tensor([r % 3 + 1 for r in ids])
    hist = torch.cat([torch.arange(r, r + n) for r, n in zip(ids, lengths.tolist())])
    item = torch.rand(len(ids), 4, dtype=torch.float64)
    return {"user": users[ids], "hist": hist, "hist_lengths": lengths, "item": item}


@pytest.fixture
def models():
    torch.manual_seed(0)
    original = Model().double()
    return original, roo.rewrite(copy.deepcopy(original), kwargs=call(0, IDS), spec=SPEC, fanout=4)


def test_scores_come_back_in_the_callers_order(models):
    original, rewritten = models
    impressions = call(1, IDS)
    batch = group(impressions, IDS, SPEC, model=original)
    torch.testing.assert_close(batch.restore(batch.score(rewritten)), original(**impressions), rtol=1e-12, atol=1e-12)
    part = batch[[1, 3]]
    rows = [i for i, r in enumerate(IDS) if r in (1, 9)]
    torch.testing.assert_close(
        part.restore(part.score(rewritten)), original(**impressions)[rows], rtol=1e-12, atol=1e-12
    )


def test_training_on_requests_reaches_the_same_weights(models):
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in models]
    for seed in range(5):
        impressions = call(seed, IDS)
        target = torch.arange(len(IDS)).double() % 2
        batch = group(impressions, IDS, SPEC, labels=target)
        losses = [
            functional.binary_cross_entropy_with_logits(models[0](**impressions), target),
            functional.binary_cross_entropy_with_logits(batch.score(models[1]), batch.labels),
        ]
        for optimizer, loss in zip(optimizers, losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        theirs = dict(models[1].named_parameters())
        for name, mine in models[0].named_parameters():
            torch.testing.assert_close(theirs[name], mine, rtol=1e-9, atol=1e-11)


def test_the_training_loop_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    loop = importlib.import_module("train_loop")
    lines = loop.table("recflow", tmp_path, impressions=600, rows=200, steps=2)
    assert float(lines[0].split("at most ")[1].split()[0]) < 1e-12
    assert len(lines) == 4
