"""What constant masks pick: the graph after, what stays, and masks that are changed later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from passes.constants import evaluate
from passes.normalize import normalize
from roo_rewrite.capture import Captured
from roo_rewrite.equivalence import draw_counts
from roo_rewrite.legality import normalized

MASK = torch.triu(torch.ones(4, 4), 1).bool()
Function = Callable[..., Any]


def squares(u: Tensor, x: Tensor) -> Tensor:
    return u.unsqueeze(1) * x.unsqueeze(2)


def triangle(t: Tensor) -> Tensor:
    return torch.triu(torch.ones(4, 4, device=t.device), 1).bool()


PICKED = {
    "masked_select": lambda m, u, x: torch.masked_select(squares(u, x), triangle(x)).view(-1, 6),
    "of an expanded mask": lambda m, u, x: squares(u, x).masked_select(triangle(x).expand(len(u), 4, 4)).view(-1, 6),
    "of an operand that is expanded": lambda m, u, x: u.unsqueeze(1).masked_select(triangle(x)).view(-1, 6),
    "of the last dim": lambda m, u, x: (u * x).masked_select(m.m < 1).view(-1, 4),
    "two that meet": lambda m, u, x: (
        torch.masked_select(squares(u, x), triangle(x)) * squares(x, u).exp().masked_select(triangle(x).unsqueeze(0))
    ).view(-1, 6),
    "kept flat": lambda m, u, x: torch.masked_select(squares(u, x), triangle(x)).exp(),
    "index by a mask": lambda m, u, x: squares(u, x)[:, triangle(x)],
    "index by a mask and a slice": lambda m, u, x: squares(u, x)[:, :, m.m < 1],
    "nonzero": lambda m, u, x: squares(u, x)[:, triangle(x).nonzero()[:, 0]],
    "nonzero as a tuple": lambda m, u, x: squares(u, x)[:, *triangle(x).nonzero(as_tuple=True)],
    "nothing is picked": lambda m, u, x: torch.masked_select(squares(u, x), m.m > 1).view(len(u), 0).sum(1),
}
DYNAMIC = ("aten.masked_select.default", "aten.nonzero.default", "aten.nonzero_numpy.default")


def dynamic(trace: Captured) -> list[str]:
    """The ops whose result has a size known at run time only."""
    masks = [n for n in trace.graph.nodes if str(n.target) == "aten.index.Tensor"]
    bools = [n.name for n in masks if any(i is not None and i.meta["val"].dtype == torch.bool for i in n.args[1])]
    return bools + [n.name for n in trace.graph.nodes if str(n.target) in DYNAMIC]


@pytest.mark.parametrize(("entries", "known"), [(1 << 22, True), ((1 << 22) + 1, False)])
def test_large_values_are_not_held(captured: Function, entries: int, known: bool) -> None:
    trace, _ = captured(lambda m, u, x: x * torch.ones(entries, dtype=torch.bool).any())
    (ones,) = trace.graph.find_nodes(op="call_function", target=torch.ops.aten.ones.default)
    assert (evaluate(trace, ones) is not None) is known


@pytest.mark.parametrize("name", PICKED)
def test_picks_by_constants_have_a_known_size(captured: Callable[..., Any], name: str) -> None:
    trace, _ = captured(PICKED[name])
    assert dynamic(trace)
    normalize(trace)
    normalized(trace.graph)
    assert not dynamic(trace)
    values = [n.meta["val"] for n in trace.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert all(s.node.has_hint() for v in values for s in v.shape if isinstance(s, torch.SymInt))


def test_a_flattened_pick_is_one_row_each(captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    trace, _ = captured(lambda m, u, x: torch.masked_select(squares(u, x), triangle(x)).view(-1, 6) + 1)
    normalize(trace)
    assert printed(trace.graph).splitlines()[-3:] == [
        "index_select_default = index_select(reshape_default, 1, _roo_constant_0)",
        "add = add(index_select_default, 1)",
        "return [add]",
    ]


LEFT = {
    "a mask of the batch": lambda m, u, x: torch.masked_select(squares(u, x), u.unsqueeze(1) > 0).sum(),
    "rows of the batch": lambda m, u, x: u[(x[:, 0] > 0).nonzero().squeeze(1)].sum(),
    "a mask of a weight": lambda m, u, x: torch.masked_select(squares(u, x), m.w > 0).sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_masks_stay(captured: Callable[..., Any], name: str) -> None:
    trace, _ = captured(LEFT[name])
    normalize(trace)
    assert dynamic(trace)


class Pairs(nn.Module):
    """Products of fields, upper triangle, by a mask that is a parameter or a buffer."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        if parameter:
            self.mask = nn.Parameter(MASK.clone(), requires_grad=False)
        else:
            self.register_buffer("mask", MASK.clone())
        self.top = nn.Linear(6, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        fields = torch.stack([u, u * u, x, x + 1], 1)
        products = torch.bmm(fields, fields.transpose(1, 2))
        return self.top(torch.masked_select(products, self.mask).view(-1, 6))


@pytest.mark.parametrize("parameter", [False, True])
def test_a_pick_is_split_and_follows_its_mask(parameter: bool) -> None:
    model = Pairs(parameter).double()
    example = tuple(torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    rewritten = roo.rewrite(model, example, spec=roo.FeatureSpec(["u"], ["x"]), check=True)
    roo.verify(model, rewritten, batches=4)
    assert not rewritten._whole_program().notes
    with torch.no_grad():
        model.mask.copy_(MASK.T)
    counts = torch.tensor(draw_counts(torch.Generator().manual_seed(1), 5))
    u, x = torch.randn(len(counts), 4).double(), torch.randn(int(counts.sum()), 4).double()
    want = model(u.repeat_interleave(counts, 0), x)
    torch.testing.assert_close(rewritten(u, x, num_impressions=counts), want)
