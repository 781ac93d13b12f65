"""Attention over cat[E h, t] along the sequence: the history sees itself once per request, where a mask lets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from law_parts import Model, parameter
from torch import Tensor, nn

aten = torch.ops.aten
LOW = {"inf": float("-inf"), "finite": -1e9}


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def layer(m: Model, h: Tensor, how: str, low: float) -> Tensor:
    """One block of self-attention and feed-forward, its mask spelled in one of many ways."""
    q, k, v = F.linear(F.layer_norm(h, (4,)), m.qkv).chunk(3, -1)
    n = h.shape[1]
    if how == "is_causal":
        return h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if how == "fused":
        return h + F.scaled_dot_product_attention(q, k, v, attn_mask=m.seen)
    if how == "fused floats":
        return h + F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(n, n).to(h).masked_fill(~m.seen, low))
    scores = q @ k.transpose(1, 2) / 2
    if how == "computed":
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), low)
    elif how == "added":
        scores = scores + torch.zeros(n, n).to(h).masked_fill(~m.seen, low)
    else:
        scores = scores.masked_fill(~m.seen, low)
    return h + (scores.softmax(-1) @ v).relu()


HOW = ["is_causal", "fused", "fused floats", "computed", "added", "filled"]


@settings(derandomize=True, max_examples=4, deadline=None)
@given(st.sampled_from(HOW), st.sampled_from(sorted(LOW)), st.integers(2, 3), st.integers(1, 2), st.integers(1, 2))
def test_the_history_runs_once_per_request(law: Any, how: str, low: str, length: int, targets: int, depth: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        for _ in range(depth):
            h = layer(m, h, how, LOW[low])
        return h[:, -1]

    model = Model(run, qkv=parameter(12, 4), seen=causal(length + targets))
    found = law(model, u=(length, 4), x=(targets, 4))
    linears = depth * 2 * 4 * 12 * (3 * length + 12 * targets)
    n = length + targets
    scores = depth * 2 * 2 * 4 * (3 * length * length + 12 * targets * n)
    if depth == 1:
        assert found.flops()[1] <= linears + scores
    assert {aten.softmax.int, aten.scaled_dot_product_attention.default} & set(found.moved()) or depth == 1


def attend(h: Tensor, mask: Tensor, low: float) -> Tensor:
    return (h @ h.transpose(1, 2)).masked_fill(mask, low).softmax(-1) @ h


DECLINED = {
    "no mask": lambda m, h: (h @ h.transpose(1, 2)).softmax(-1) @ h,
    "too weak": lambda m, h: attend(h, ~m.seen, -10.0),
    "a row sees nothing": lambda m, h: attend(h, ~m.seen.tril(-1), -1e9),
    "history sees the target": lambda m, h: attend(h, ~m.seen.t(), -1e9),
    "two masks leave nothing": lambda m, h: (
        ((h @ h.transpose(1, 2)).masked_fill(m.a, -1e9).masked_fill(~m.seen, -1e9)).softmax(-1) @ h
    ),
}


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_declines_without_a_mask_that_separates(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return DECLINED[name](m, torch.cat([u, x], 1))

    closed = torch.zeros(4, 4, dtype=torch.bool)
    closed[0, 0] = True  # with the causal mask, row 0 sees nothing
    found = law(Model(run, seen=causal(4), a=closed), u=(3, 4), x=(1, 4))
    assert aten.softmax.int not in found.moved()


@pytest.mark.parametrize("fused", [True, False])
def test_padding_on_top_of_a_causal_mask(law: Any, fused: bool) -> None:
    def run(m: Model, u: Tensor, u_seen: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        seen = torch.cat([u_seen, torch.ones_like(u_seen[:, :1])], 1).unsqueeze(1)
        if fused:
            return F.scaled_dot_product_attention(h, h, h, attn_mask=seen & m.seen)
        scores = (h @ h.transpose(1, 2)).masked_fill(~seen, -1e9)
        return scores.masked_fill(~m.seen, -1e9).softmax(-1) @ h

    law(Model(run, seen=causal(4)), u=(3, 4), u_seen=lambda n: torch.rand(n, 3) < 0.4, x=(1, 4))


def test_multi_head_attention(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        return m.attention(h, h, h, attn_mask=~m.seen)[0]

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    law(Model(run, attention=attention, seen=causal(4)), u=(3, 4), x=(1, 4))


MASKS = {
    "both banned": lambda m, pad: pad | m.later,
    "both seen": lambda m, pad: ~(~pad & ~m.later),
    "but for itself": lambda m, pad: (pad & ~torch.eye(4, dtype=torch.bool).expand_as(pad)) | m.later,
    "as numbers": lambda m, pad: ((1 - pad.to(m.low)) * (1 - m.later.to(m.low))) == 0,
    "chosen": lambda m, pad: torch.where(m.later, torch.ones_like(pad), pad),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("both banned", "layers"),
        ("both seen", "fused"),
        ("but for itself", "added"),
        ("both banned", "added"),
        ("as numbers", "filled"),
        ("chosen", "fused"),
    ],
)
def test_padding_and_order_in_one_mask(law: Any, name: str, how: str) -> None:
    """Known above the diagonal for every batch, though the rest is known at run time only."""

    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        pad = torch.cat([u_pad, torch.zeros(x.shape[0], 1, dtype=torch.bool)], 1)
        mask = MASKS[name](m, pad.unsqueeze(1).expand(-1, 4, -1))
        if how == "fused":
            return F.scaled_dot_product_attention(h, h, h, attn_mask=~mask)
        if how == "layers":
            mask = mask.unsqueeze(1).repeat(1, 2, 1, 1).flatten(0, 1)
            return m.second(*[m.first(h, h, h, attn_mask=mask)[0]] * 3, attn_mask=mask)[0]
        scores = h @ h.transpose(1, 2)
        if how == "filled":
            return scores.masked_fill(mask, float("-inf")).softmax(-1) @ h
        return (scores + mask.to(h) * -1e30).softmax(-1) @ h

    attention = [nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2)]
    model = Model(run, later=~causal(4), low=torch.zeros(()), first=attention[0], second=attention[1])
    pad = torch.tensor([[False, True, False], [False, False, True], [False, False, False]])
    found = law(model, u=(3, 4), u_pad=lambda n: pad[torch.randint(3, (n,))], x=(1, 4))
    ops = {aten.softmax.int, aten.scaled_dot_product_attention.default}
    assert ops & set(found.moved()) or (how == "added" and name != "but for itself")


UNSURE = {
    "no order": lambda m, pad: pad,
    "either": lambda m, pad: pad & m.later,
    "not known": lambda m, pad: torch.where(pad, m.later, ~m.later),
    "weak numbers": lambda m, pad: pad.to(m.low) * m.later.to(m.low) * 0.5 == 0.5,
}


@pytest.mark.parametrize("name", sorted(UNSURE))
def test_declines_a_mask_that_may_let_the_target_through(law: Any, name: str) -> None:
    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        pad = torch.cat([u_pad, torch.zeros(x.shape[0], 1, dtype=torch.bool)], 1).unsqueeze(1)
        scores = (h @ h.transpose(1, 2)).masked_fill(UNSURE[name](m, pad), float("-inf"))
        return scores.softmax(-1) @ h

    model = Model(run, later=~causal(4), low=torch.zeros(()))
    found = law(model, u=(3, 4), u_pad=lambda n: torch.rand(n, 3) < 0.4, x=(1, 4))
    assert aten.softmax.int not in found.moved()


def floats(mask: Tensor, number: float) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, number)


@pytest.mark.parametrize("how", ["fused", "added", "twice", "layer"])
def test_padding_added_to_order(law: Any, how: str) -> None:
    """A sum of two masks of numbers: what either bans is banned, as in nn.TransformerEncoderLayer."""

    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        pad = torch.cat([u_pad, torch.zeros_like(u_pad[:, :1])], 1)
        if how == "layer":
            return m.layer(h, src_mask=m.later, src_key_padding_mask=pad)
        mask = floats(m.later, LOW["inf"]) + floats(pad, LOW["inf"]).unsqueeze(1)
        if how == "fused":
            return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
        scores = h @ h.transpose(1, 2)
        scores = scores + mask if how == "added" else scores + 2 * (mask - floats(m.later, 3.0))
        return scores.softmax(-1) @ h

    encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    blind = how == "fused"  # elsewhere a row that sees nothing is not a number
    draw = (lambda n: torch.rand(n, 3) < 0.5) if blind else (lambda n: torch.rand(n, 3) * torch.arange(3) > 0.5)
    found = law(Model(run, later=~causal(4), layer=encoder), u=(3, 4), u_pad=draw, x=(1, 4))
    assert {aten.softmax.int, aten.scaled_dot_product_attention.default} & set(found.moved())


@pytest.mark.parametrize(("order", "padding"), [(-1e9, 1e9), (-1e9, -1e9), (-1.0, float("-inf"))])
def test_declines_a_sum_that_may_let_the_target_through(law: Any, order: float, padding: float) -> None:
    """What is low may be made up for; a row may see only what is low; or it is not low."""

    def run(m: Model, u: Tensor, u_pad: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        pad = torch.cat([u_pad & (padding < 0), u_pad[:, :1]], 1)  # scores are rounded where 1e9 is added
        masks = {"attn_mask": floats(m.later, order), "key_padding_mask": floats(pad, padding)}
        return m.attention(h, h, h, need_weights=False, **masks)[0]

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    found = law(
        Model(run, later=~causal(4), attention=attention), u=(3, 4), u_pad=lambda n: torch.rand(n, 3) < 0.4, x=(1, 4)
    )
    assert aten.scaled_dot_product_attention.default not in found.moved()


def test_low_numbers_that_are_no_mask(law: Any) -> None:
    """-2e8 added where no softmax follows is a number like any other."""
    law(Model(lambda m, u, x: (x + m.low) - m.low + u, low=torch.full((4,), -2e8)), u=(4,), x=(4,))


def test_a_mask_wider_than_what_it_masks(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.cat([u, x], 1).unsqueeze(1)
        return h.masked_fill(m.none, 1.0), h.masked_fill(~m.none, 1.0), x.unsqueeze(1) + m.low

    low = torch.full((1, 5, 4), -1e9)
    law(Model(run, none=torch.zeros(1, 5, 7, dtype=torch.bool), low=low), u=(3,), x=(4,))


def test_a_mask_that_changes_is_noticed(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=m.seen)

    found = law(Model(run, seen=causal(4)), u=(3, 4), x=(1, 4))
    found.original.seen.fill_(True)
    found.equal()
    found.original.seen = causal(4).t()
    found.equal()


@pytest.mark.parametrize("how", ["added", "filled", "fused"])
@pytest.mark.parametrize("low", sorted(LOW))
def test_rows_that_see_nothing_are_those_of_the_original(law: Any, how: str, low: str) -> None:
    """Under a strict causal mask the first row is not a number (or sees all that is banned), and so are gradients."""

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        strict = torch.ones(5, 5, dtype=torch.bool).triu(0)
        if how == "fused":
            return F.scaled_dot_product_attention(h, h, h, attn_mask=~strict)
        scores = h @ h.transpose(1, 2)
        mask = torch.zeros(5, 5).to(h).masked_fill(strict, LOW[low])
        scores = scores + mask if how == "added" else scores.masked_fill(strict, LOW[low])
        return scores.softmax(-1) @ h

    law(Model(run), u=(3, 4), x=(2, 4))
