"""Jagged values that a forward makes itself: lengths it computes, offsets that are sums over the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

pytest.importorskip("fbgemm_gpu")
ops = torch.ops.fbgemm
ROWS, STEPS, WIDTH = 7, 5, 4


class Model(nn.Module):
    """`pool` of a user's history, beside the item."""

    def __init__(self, pool: Callable[[Model, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.b = nn.Linear(WIDTH, WIDTH)
        self.pool = pool

    def forward(self, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        return (self.pool(self, history, lengths, item) * self.b(item)).sum(1)


def offsets_of(lengths: Tensor) -> Tensor:
    return ops.asynchronous_complete_cumsum(lengths)  # type: ignore[no-any-return]


def encoder(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    """Without the padding, and back."""
    values, again = ops.dense_to_jagged(history, [offsets_of(lengths)])
    return ops.jagged_to_padded_dense(m.a(values) * values, again, [STEPS], 0.0).sum(1)  # type: ignore[no-any-return]


def computed_lengths(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    counted = (history[..., 0] > 0).sum(1)
    values, _ = ops.dense_to_jagged(history, [offsets_of(counted)])
    return torch.segment_reduce(m.a(values), "sum", lengths=counted, unsafe=True)


def crossing(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    """The jagged values of a request, and where they end, meet what differs from one impression to the next."""
    offsets = offsets_of(lengths)
    values, _ = ops.dense_to_jagged(m.a(m.a(history)), [offsets])
    items = m.b(item)[:, None].expand(-1, STEPS, WIDTH)
    mixed, _ = ops.jagged_dense_elementwise_add_jagged_output(m.a(values), [offsets], items)
    return ops.jagged_to_padded_dense(torch.tanh(mixed), [offsets], [STEPS], 0.0).sum(1)  # type: ignore[no-any-return]


def repeated(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    values = m.a(torch.repeat_interleave(history[:, 0], lengths, 0))
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


@pytest.mark.parametrize("pool", [encoder, computed_lengths, crossing, repeated], ids=lambda f: f.__name__)
def test_runs_once_per_request(pool: Any, rewritten_and_verified: Any) -> None:
    made = rewrite(pool, rewritten_and_verified)
    assert "aten.tanh" in moved(made), str(made.report)


def other_lengths(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    """The values are cut at other places than they were put together."""
    values, _ = ops.dense_to_jagged(history, [offsets_of(lengths)])
    return ops.jagged_to_padded_dense(m.a(values), [offsets_of(lengths.flip(0))], [STEPS], 0.0).sum(1)  # type: ignore[no-any-return]


def offsets_as_values(m: Model, history: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    """Where a row begins tells of the rows before it."""
    return m.a(history[:, 0] * torch.cumsum(lengths, 0)[:, None])


@pytest.mark.parametrize(
    ("pool", "op"), [(other_lengths, "fbgemm.jagged_to_padded_dense"), (offsets_as_values, "aten.tanh")]
)
def test_stays_with_the_impressions(pool: Any, op: str, rewritten_and_verified: Any) -> None:
    made = rewrite(pool, rewritten_and_verified)
    assert op not in moved(made), str(made.report)


def rewrite(pool: Any, rewritten_and_verified: Any) -> roo.RequestModel:
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(ROWS, STEPS, WIDTH, generator=generator)
    lengths = torch.randint(1, STEPS + 1, (ROWS,), generator=generator)
    item = torch.randn(ROWS, WIDTH, generator=generator)
    spec = roo.FeatureSpec(request=["history", "lengths"], impression=["item"])
    made: roo.RequestModel = rewritten_and_verified(Model(pool).eval(), (history, lengths, item), spec=spec, fanout=64)
    return made


def moved(made: roo.RequestModel) -> str:
    plan = made._whole_program().plan
    assert plan is not None
    return " ".join(str(n.target) for n in plan.request)
