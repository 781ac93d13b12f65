"""Numbers of Python's or NumPy's generator: such a model is traced only where nothing it returns depends on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
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


def unread_numpy(m: Any, u: Tensor) -> Tensor:
    explore = np.random.rand() < 0.5
    return u * np.random.uniform(0, 1) if m.training and explore else u


def read_numpy(m: Any, u: Tensor) -> Tensor:
    return u * np.random.random()


def branch_numpy(m: Any, u: Tensor) -> Tensor:
    return u if np.random.rand() < 0.5 else u * 2


def many_of_numpy(m: Any, u: Tensor) -> Tensor:
    u * torch.from_numpy(np.random.rand(4)).float()
    return u


def unknown_of_numpy(m: Any, u: Tensor) -> Tensor:
    u * np.random.rand() * float(np.random.normal())
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


NOT_TRACED = [read, branch, width, written, noise, kept, unknown, more_than_known]
NOT_TRACED += [read_numpy, branch_numpy, many_of_numpy, unknown_of_numpy]


def rewritten(draw: Callable[[Any, Tensor], Tensor], training: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Drawing(draw).train(training)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    return model, roo.rewrite(model, (torch.randn(6, 4), torch.randn(6, 4)), spec=spec)


@pytest.mark.parametrize("draw", [in_training_only, unread, unread_numpy])
def test_what_nothing_reads_is_not_drawn(draw: Callable[[Any, Tensor], Tensor]) -> None:
    model, found = rewritten(draw)
    roo.verify(model, found, batches=3)
    program = found._whole_program()
    assert program.emitted is not None
    assert any(n.op == "call_function" and "linear" in str(n.target) for n in program.plan.request)
    before = random.getstate(), repr(np.random.get_state())
    found(torch.randn(2, 4), torch.randn(3, 4), num_impressions=torch.tensor([1, 2]))
    assert (random.getstate(), repr(np.random.get_state())) == before


@pytest.mark.parametrize("draw", NOT_TRACED)
def test_what_may_be_read_is_not_traced(draw: Callable[[Any, Tensor], Tensor]) -> None:
    _, found = rewritten(draw)
    assert found._whole_program().emitted is None


def test_the_mode_decides() -> None:
    model, found = rewritten(in_training_only, training=True)
    assert found._whole_program().emitted is None
    roo.verify(model, found, batches=3)


def test_tracing_leaves_the_generator_as_it_was() -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), repr(np.random.get_state())
    functions = random.random, random.randint, np.random.rand
    rewritten(unread)[1]._whole_program()
    rewritten(unread_numpy)[1]._whole_program()
    assert (random.getstate(), repr(np.random.get_state())) == before
    assert (random.random, random.randint, np.random.rand) == functions
