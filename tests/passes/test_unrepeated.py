"""unrepeated, fills: what is shaped after a row, and repeated for every row, has nothing of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from passes.normalize import normalize

aten = torch.ops.aten


def mask_of_one_row(m: Any, u: Tensor, x: Tensor) -> Tensor:
    banned = torch.cumsum(torch.ones_like(u[0]), 0)[None].repeat(len(u), 1)
    return u.masked_fill(banned == 2, -1.0) + x


def expanded(m: Any, u: Tensor, x: Tensor) -> Tensor:
    return u * (m.w[0] + 1).expand(u.shape[0], 4) + x


def tiled_twice(m: Any, u: Tensor, x: Tensor) -> Tensor:
    return torch.cat([u, u]) * m.w[:1].repeat(2 * u.shape[0], 1) + torch.cat([x, x])


def mapped(m: Any, u: Tensor, x: Tensor) -> Tensor:
    gate = nn.functional.linear(nn.functional.linear(torch.full_like(u, 0.5), m.w, m.w[0]).tanh(), m.w)
    return u * gate.sigmoid() * m.w[:1].expand(u.shape[0], 4) + x


def test_a_linear_map_of_one_number_runs_once(captured: Callable[..., Any]) -> None:
    trace, _ = captured(mapped)
    normalize(trace)
    trace.graph.eliminate_dead_code()
    maps = [n for n in trace.graph.nodes if n.target is aten.linear.default]
    assert [tuple(n.meta["val"].shape) for n in maps] == [(1, 4), (1, 4)]


def whole(m: Any, u: Tensor, x: Tensor) -> Tensor:
    query = nn.functional.linear(nn.functional.embedding(torch.arange(4).expand(len(u), 4), m.w), m.w).tanh()
    return torch.cat([nn.functional.linear(torch.ones_like(u), m.w), x], 1).cumsum(0)[:, :4] @ query


def test_a_map_that_is_read_whole_is_repeated_in_name(captured: Callable[..., Any]) -> None:
    trace, _ = captured(whole)
    normalize(trace)
    maps = [n for n in trace.graph.nodes if n.target in (aten.linear.default, aten.embedding.default)]
    assert [tuple(n.meta["val"].shape) for n in maps] == [(4, 4), (4, 4), (1, 4)]


KEPT: dict[str, Callable[..., Tensor]] = {
    "by the occurrences": lambda m, u, x: nn.functional.embedding(
        torch.arange(4).expand(len(u), 4), m.w, scale_grad_by_freq=True
    ),
    "an output": lambda m, u, x: nn.functional.linear(m.w[:1].expand_as(u), m.w),
    "weights of the batch": lambda m, u, x: nn.functional.linear(m.w[:1].expand(len(u), 4), u),
}


@pytest.mark.parametrize("name", KEPT)
def test_another_map_stays(name: str, captured: Callable[..., Any]) -> None:
    trace, _ = captured(KEPT[name])
    normalize(trace)
    assert trace.graph.output_node().args[0][0].target in (aten.linear.default, aten.embedding.default)


FALLS = {"a mask of one row": mask_of_one_row, "a weight": expanded, "for two blocks of rows": tiled_twice}
STAYS: dict[str, Callable[..., Tensor]] = {
    "alone gives the shape": lambda m, u, x: (m.w[:1].repeat(u.shape[0], 1) + 1) @ m.w + u + x,
    "of more than one row": lambda m, u, x: torch.cat([u, u]) * m.w[:2].repeat(u.shape[0], 1) + torch.cat([x, x]),
    "of the batch": lambda m, u, x: (u[:, None].repeat(1, 3, 1) * x[:, None]).sum(1),
    "a number": lambda m, u, x: u * m.w.sum().expand(u.shape[0], 4) + x,
}


def repeats_read(graph: torch.fx.Graph) -> int:
    """How many pointwise products, sums and masks read a repeated value."""
    reading = (aten.mul.Tensor, aten.masked_fill.Scalar, aten.mul_.Tensor)
    repeats = (aten.repeat.default, aten.expand.default)
    return sum(n.target in reading and any(i.target in repeats for i in n.all_input_nodes) for n in graph.nodes)


@pytest.mark.parametrize("name", FALLS)
def test_a_value_repeated_for_every_row_is_left_to_broadcast(name: str, captured: Callable[..., Any]) -> None:
    trace, _ = captured(FALLS[name])
    normalize(trace)
    assert not repeats_read(trace.graph)
    assert not any(n.target is aten.select.int and n.args[0].op == "placeholder" for n in trace.graph.nodes)


@pytest.mark.parametrize("name", STAYS)
def test_another_repeat_stays(name: str, captured: Callable[..., Any]) -> None:
    trace, _ = captured(STAYS[name])
    normalize(trace)
    assert any(n.target in (aten.repeat.default, aten.expand.default) for n in trace.graph.nodes)


FILLED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "ones_like": (lambda u: torch.ones_like(u[0]), True),
    "zeros_like, cast": (lambda u: torch.zeros_like(u[0], dtype=torch.int64), True),
    "full_like": (lambda u: torch.full_like(u[:1], 3.0), True),
    "new_ones": (lambda u: u.new_ones(4), True),
    "new_full": (lambda u: u.new_full((1, 4), 2.0), True),
    "of every row": (lambda u: torch.ones_like(u), False),
    "filled with a size": (lambda u: torch.full_like(u[0], u.shape[0]), False),
    "not filled": (lambda u: torch.rand_like(u[0]), False),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_value_of_one_number_reads_nothing(name: str, captured: Callable[..., Any]) -> None:
    fill, plain = FILLED[name]
    trace, _ = captured(lambda m, u, x: u + x + fill(u))
    normalize(trace)
    made = {aten.ones.default, aten.zeros.default, aten.full.default}
    assert any(n.target in made for n in trace.graph.nodes) is plain


class HeadsBeforeTheBatch(nn.Module):
    """Attention over a history, heads stacked in front of the batch, its causal mask shaped after the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.items = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, hist: Tensor, item: Tensor) -> Tensor:
        q, k, v = (torch.cat(f(hist).chunk(2, 2)) for f in (self.q, self.k, self.v))
        scores = q @ k.mT
        seen = torch.tril(torch.ones_like(scores[0]))[None].repeat(len(scores), 1, 1)
        weights = scores.masked_fill(seen == 0, -torch.inf).softmax(-1)
        weights *= torch.sign(hist.abs().sum(-1)).repeat(2, 1).unsqueeze(-1).repeat(1, 1, hist.size(1))
        history = torch.cat((weights @ v).chunk(2), 2)
        return (history[:, -1] * self.items(item)).sum(-1)


def test_attention_with_such_a_mask_runs_once_per_request() -> None:
    torch.manual_seed(0)
    model, example = HeadsBeforeTheBatch().eval(), (torch.randn(6, 3, 4), torch.randn(6, 4))
    spec = roo.FeatureSpec(request=["hist"], impression=["item"])
    found = roo.rewrite(model, example, spec=spec, fanout=10, check=True)
    roo.verify(model, found, batches=5)
    plan = found._whole_program().plan
    assert sum(n.target is aten.linear.default for n in plan.request) == 3
