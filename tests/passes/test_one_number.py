"""one_number: constants of many times the batch's size are one entry, where other operands have the shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

aten = torch.ops.aten
Low = Callable[[Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """Attention with the heads in front of the batch, or behind it; what `low` makes takes the place of padding."""

    def __init__(self, low: Low, front: bool) -> None:
        super().__init__()
        self.embedding, self.low, self.front = nn.Embedding(40, 8), low, front

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        h = self.embedding(history)
        heads = torch.cat(h.split(4, 2), 0) if self.front else h.view(-1, 5, 2, 4).transpose(1, 2).flatten(0, 1)
        pad = (history == 0).unsqueeze(1)
        pad = pad.repeat(2, 1, 1) if self.front else pad.repeat_interleave(2, 0)
        scores = heads @ heads.transpose(1, 2)
        out = torch.where(pad, self.low(scores, pad), scores).softmax(-1) @ heads
        out = torch.cat(out.chunk(2), 2) if self.front else out.view(-1, 2, 5, 4).transpose(1, 2).flatten(2)
        return (out.mean(1) * self.embedding(item)).sum(1)


def example() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 40, (9, 5), generator=draw), torch.randint(0, 40, (9,), generator=draw)


def moved(model: nn.Module) -> tuple[list[object], roo.RequestModel]:
    """The ops of the request part of a model that was checked."""
    spec = roo.FeatureSpec(request=["history"], impression=["item"])
    made = roo.rewrite(model.eval(), example(), spec=spec, fanout=10, check=True)
    plan = made._whole_program().plan
    assert plan is not None
    return [n.target for n in plan.request if n.op == "call_function"], made


LOWS: dict[str, Low] = {
    "scaled ones": lambda scores, pad: torch.ones(scores.shape) * (-(2**32) + 1),
    "ones alike": lambda scores, pad: torch.ones_like(scores) * -1e9,
    "full": lambda scores, pad: torch.full(scores.shape, -1e9),
    "full alike, cast": lambda scores, pad: torch.full_like(scores, -1e9, dtype=torch.float64).to(scores.dtype),
    "new": lambda scores, pad: scores.new_full(scores.shape, -1e9) + scores.new_zeros(scores.shape),
}


@pytest.mark.parametrize(("name", "front"), [*((name, True) for name in sorted(LOWS)), ("full", False)])
def test_the_history_attends_once_per_request(name: str, front: bool) -> None:
    ops, _ = moved(Heads(LOWS[name], front))
    assert aten.softmax.int in ops


def drawn(scores: Tensor, pad: Tensor) -> Tensor:
    return torch.zeros(scores.shape).bernoulli(0.5) - 1e9


def numbered(scores: Tensor, pad: Tensor) -> Tensor:
    return torch.ones(scores.shape) * torch.arange(len(scores)).view(-1, 1, 1)


@pytest.mark.parametrize("low", [drawn, numbered])
def test_declines_what_is_more_than_one_number(low: Low) -> None:
    spec = roo.FeatureSpec(request=["history"], impression=["item"])
    model = Heads(low, front=True).eval()
    made = roo.rewrite(model, example(), spec=spec, fanout=10)
    plan = made._whole_program().plan
    assert plan is None or aten.softmax.int not in [n.target for n in plan.request]


class Alone(nn.Module):
    """The constant gives the result its shape."""

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        low = torch.ones(2 * len(history), 3) * torch.tensor([1.0, 2.0, 3.0])
        return low.view(-1, 6) + history[:, :1] + item.unsqueeze(1)


def test_declines_where_the_constant_gives_the_shape() -> None:
    _, made = moved(Alone())
    history, item = example()
    got = made(history[:2], item[:5], num_impressions=torch.tensor([2, 3]))
    torch.testing.assert_close(got, made._original(history[:2].repeat_interleave(torch.tensor([2, 3]), 0), item[:5]))
