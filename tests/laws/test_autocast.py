"""Models in an autocast region of their own: split, and as near to a float64 truth as they were.

linear(cat[E a, c], W) under autocast  =  E linear(a', Wa') + linear(c', Wc')        ' cast to bfloat16
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.equivalence import verify

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def head(m: Any, left: Tensor, right: Tensor) -> Tensor:
    return m.out(F.relu(m.mix(torch.cat([left, right], 1))))


def kept(m: Any, u: Tensor, h: Tensor, x: Tensor) -> Tensor:
    mask = u[:, 0] > 0
    out = torch.zeros(len(u), 16, dtype=m.u(u).dtype)
    out[mask] = m.u(u[mask])
    return head(m, out, m.x(x))


def disabled_inside(m: Any, u: Tensor, h: Tensor, x: Tensor) -> Tensor:
    a = m.u(u)
    with torch.autocast("cpu", enabled=False):
        c = m.mix(torch.cat([a.to(x.dtype), m.x(x)], 1))
    return m.out(F.relu(c))


def attended(m: Any, u: Tensor, h: Tensor, x: Tensor) -> Tensor:
    keys, q = m.u(h), m.x(x)[:, None]
    return head(m, (torch.softmax(q @ keys.mT / 4, -1) @ keys)[:, 0], q[:, 0])


def squares(m: Any, u: Tensor, h: Tensor, x: Tensor) -> Tensor:
    f = torch.stack([m.u(u), m.u(u * 2), m.x(x), m.x(x + 1)], 1)
    return (f.sum(1) ** 2 - (f**2).sum(1)).sum(1)


# name: what the region does, in which mode, whether a linear map in it is split.
MODELS: dict[str, tuple[Forward, bool, bool]] = {
    "a concatenation": (lambda m, u, h, x: head(m, m.u(u), m.x(x)), False, True),
    "after a batch norm": (lambda m, u, h, x: m.out(m.mix(m.norm(torch.cat([m.u(u), m.x(x)], 1)))), True, True),
    "rows that a mask keeps": (kept, False, True),
    "a region that is off": (disabled_inside, True, True),
    "a square of a sum": (squares, False, False),
    "attention": (attended, True, False),
    "a recurrent net, in another dtype": (lambda m, u, h, x: head(m, m.gru(h)[1][0], m.x(x)), False, True),
    "a layer norm, exact in float32 alone": (
        lambda m, u, h, x: m.out(m.mix(F.layer_norm(torch.cat([m.u(u), m.x(x)], 1), [32]))),
        True,
        False,
    ),
}


class Model(nn.Module):
    """`forward` in a region, where `on`."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.u, self.x, self.mix, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 64), nn.Linear(64, 1)
        self.norm, self.gru = nn.BatchNorm1d(32), nn.GRU(8, 16, batch_first=True)
        self.body, self.on = forward, True

    def forward(self, u: Tensor, h: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            return self.body(self, u, h, x).float() if self.on else self.body(self, u, h, x)


@pytest.mark.parametrize("name", MODELS)
def test_split_and_no_less_exact(name: str) -> None:
    function, training, splits = MODELS[name]
    torch.manual_seed(0)
    model = Model(function).train(training)
    u, h, counts = torch.randn(12, 8), torch.randn(12, 5, 8), torch.tensor([4, 0, 3, 10, 1, 0, 6, 5, 5, 2, 9, 7])
    x = torch.randn(int(counts.sum()), 8)
    spec = roo.FeatureSpec(request=["u", "h"], impression=["x"])
    rewritten = roo.rewrite(model, (u, h, x[:12]), spec=spec, fanout=10, check=True)
    assert any(d.taken for d in rewritten.report.splits) is splits
    verify(model, rewritten, batches=3)

    expanded = [t.repeat_interleave(counts, 0) for t in (u, h)]
    exact = copy.deepcopy(model).double()
    exact.on = False
    truth = exact(*(t.double() for t in (*expanded, x)))
    was = (copy.deepcopy(model)(*expanded, x) - truth).square().mean().sqrt()
    found = rewritten(u, h, x, num_impressions=counts)
    assert (found - truth).square().mean().sqrt() <= 2 * was


def test_what_is_not_split_is_equal_in_every_bit() -> None:
    torch.manual_seed(0)
    for name in ("a square of a sum", "attention"):
        model = Model(MODELS[name][0]).eval()
        u, h, x, counts = torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(32, 8), torch.full((4,), 8)
        spec = roo.FeatureSpec(request=["u", "h"], impression=["x"])
        rewritten = roo.rewrite(model, (u, h, x[:4]), spec=spec, fanout=8, split="never")
        found = rewritten(u, h, x, num_impressions=counts)
        assert torch.equal(found, model(u.repeat_interleave(8, 0), h.repeat_interleave(8, 0), x)), name
