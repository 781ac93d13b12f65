"""Numbers of Python's generator: a model that draws one is traced only where nothing it returns depends on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo


class Drawing(nn.Module):
    """A two-sided model; `draw` is called with what is known of the user, [B, 4], and returns it."""

    def __init__(self, draw: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.draw, self.bound, self.last = draw, 9, 0.0

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (torch.relu(self.a(self.draw(self, u))) * self.b(x)).sum(-1)


def in_training_only(m: Any, u: Tensor) -> Tensor:
    late = (u * 2 < random.randint(0, m.bound)) & (u > -random.uniform(1, 2))
    return u * late if m.training else u * 2


def unread(m: Any, u: Tensor) -> Tensor:
    u.abs() - random.random()
    return u


def read(m: Any, u: Tensor) -> Tensor:
    return u * random.random()


def branch(m: Any, u: Tensor) -> Tensor:
    return u if random.random() < 0.5 else u * 2


def width(m: Any, u: Tensor) -> Tensor:
    return u[:, : random.randint(1, 4)].sum(1, keepdim=True) + u


def written(m: Any, u: Tensor) -> Tensor:
    v = u * 2
    v[:, 0].fill_(random.random())
    return v


def noise(m: Any, u: Tensor) -> Tensor:
    torch.rand_like(u * random.random())
    return u


def kept(m: Any, u: Tensor) -> Tensor:
    out, m.last = u + m.last, random.random()
    return out


def unknown(m: Any, u: Tensor) -> Tensor:
    u + random.choice([1, 2])
    return u


def more_than_known(m: Any, u: Tensor) -> Tensor:
    u + random.random() + random.gauss(0, 1)
    return u


def rewritten(draw: Callable[[Any, Tensor], Tensor], training: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Drawing(draw).train(training)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    return model, roo.rewrite(model, (torch.randn(6, 4), torch.randn(6, 4)), spec=spec)


@pytest.mark.parametrize("draw", [in_training_only, unread])
def test_what_nothing_reads_is_not_drawn(draw: Callable[[Any, Tensor], Tensor]) -> None:
    model, found = rewritten(draw)
    roo.verify(model, found, batches=3)
    program = found._whole_program()
    assert program.emitted is not None
    assert any(n.op == "call_function" and "linear" in str(n.target) for n in program.plan.request)
    before = random.getstate()
    found(torch.randn(2, 4), torch.randn(3, 4), num_impressions=torch.tensor([1, 2]))
    assert random.getstate() == before


@pytest.mark.parametrize("draw", [read, branch, width, written, noise, kept, unknown, more_than_known])
def test_what_may_be_read_is_not_traced(draw: Callable[[Any, Tensor], Tensor]) -> None:
    _, found = rewritten(draw)
    assert found._whole_program().emitted is None


def test_the_mode_decides() -> None:
    model, found = rewritten(in_training_only, training=True)
    assert found._whole_program().emitted is None
    roo.verify(model, found, batches=3)


def test_tracing_leaves_the_generator_as_it_was() -> None:
    random.seed(5)
    before = random.getstate()
    functions = random.random, random.randint
    rewritten(unread)[1]._whole_program()
    assert random.getstate() == before
    assert (random.random, random.randint) == functions
