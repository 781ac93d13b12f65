"""repeated_rows: entries written with repeated row numbers, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from passes.normalize import normalize


class Rated(nn.Module):
    """An autoencoder over a user's row of the rating matrix, made from the user's history."""

    way = staticmethod(lambda rows, times: rows.repeat_interleave(times))

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.item = nn.Linear(40, 32), nn.Embedding(40, 32)

    def forward(self, history: Tensor, rating: Tensor, item: Tensor) -> Tensor:
        rows = self.way(torch.arange(len(history)), history.shape[1])
        matrix = torch.zeros(1).repeat(len(history), 40)
        matrix.index_put_((rows, history.flatten()), rating.flatten())
        return (torch.tanh(self.encoder(matrix)) * self.item(item)).sum(1)


class Expanded(Rated):
    way = staticmethod(lambda rows, times: rows.unsqueeze(1).expand(-1, times).reshape(-1))


class Added(Rated):
    def forward(self, history: Tensor, rating: Tensor, item: Tensor) -> Tensor:
        rows = torch.arange(len(history)).repeat_interleave(5, dim=0)
        matrix = torch.zeros(len(history), 40).index_put((rows, history.view(-1)), rating.view(-1), accumulate=True)
        return (self.encoder(matrix) * self.item(item)).sum(1) + matrix[rows, history.view(-1)].view(-1, 5).sum(1)


class One(Rated):
    def forward(self, history: Tensor, rating: Tensor, item: Tensor) -> Tensor:
        rows = torch.arange(len(history)).repeat_interleave(5)
        matrix = torch.zeros(len(history), 40)
        matrix[rows, history.flatten()] = 1.0
        return (self.encoder(matrix) * self.item(item)).sum(1) + rating.sum(1)


class OtherRows(Rated):
    """Negative: the numbers are those of other rows."""

    way = staticmethod(lambda rows, times: rows.flip(0).repeat_interleave(times))


class WithoutRows(Rated):
    """Negative: the numbers come in another order than the history."""

    way = staticmethod(lambda rows, times: rows.repeat(times))


def rewritten(model: nn.Module) -> roo.RequestModel:
    example = (torch.randint(0, 40, (7, 5)), torch.rand(7, 5), torch.randint(0, 40, (7,)))
    spec = roo.FeatureSpec(["history", "rating"], ["item"])
    found = roo.rewrite(model, example, spec=spec, fanout=16, check=True)
    roo.verify(model, found)
    return found


@pytest.mark.parametrize("kind", [Rated, Expanded, Added, One])
def test_a_rating_matrix_is_made_once_per_request(kind: type[Rated]) -> None:
    found = rewritten(kind())
    assert any(n.op == "index_put" and n.runs == "request" for n in found.report.nodes), str(found.report)


@pytest.mark.parametrize("kind", [OtherRows, WithoutRows])
def test_other_numbers_stay_where_they_are(kind: type[Rated]) -> None:
    found = rewritten(kind())
    assert not any(n.op == "index_put" and n.runs == "request" for n in found.report.nodes), str(found.report)


def test_before_and_after(captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    trace, _ = captured(
        lambda m, u, x: torch.zeros_like(x).index_put(
            (torch.arange(len(u)).repeat_interleave(4), u.long().flatten()), u.flatten()
        )
    )
    normalize(trace)
    text = printed(trace.graph)
    assert "unsqueeze(arange, 1)" in text
    assert "index_put(zeros_like, [unsqueeze_default, reshape_default], reshape_default_1)" in text
