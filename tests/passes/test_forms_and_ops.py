"""Every op that has something to say about forms, on every form: what it declines is carried out, and all is equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.annotate import Policy, annotate
from passes.normalize import normalize
from passes.split import split

Function = Callable[..., Any]


def both(u: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """[B, 4, 6] in two parts."""
    return torch.cat([u.narrow(dim, 0, 2), x.narrow(dim, 2, x.shape[dim] - 2)], dim)


FORMS: dict[str, Function] = {
    "parts in parts": lambda u, x: torch.cat([both(u, x, 2)[:, :2], x[:, 2:]], 1),
    "a sum": lambda u, x: u + x,
    "an outer product": lambda u, x: (u[:, :, :2].unsqueeze(3) * x[:, :, None, :3]).flatten(2),
}


def ones(*sizes: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(sizes).numel()).view(sizes)


OPS: dict[str, Function] = {
    "sums": lambda h: (h.sum(1), h.mean(2), h.sum((1, 2)), h.var(2), torch.var_mean(h, 1), h.prod(1)),
    "extremes": lambda h: (h.amax(1), h.amin(2), h.logsumexp(2), h.logsumexp((1, 2)), (h > 0).any(2)),
    "norms": lambda h: (F.layer_norm(h, (6,)), F.batch_norm(h, ones(4), ones(4) + 2), h.softmax(2)),
    "products": lambda h: (F.linear(h, ones(3, 6), ones(3)), ones(3, 4) @ h, h @ ones(6), h @ h.transpose(1, 2)),
    "windows": lambda h: (F.conv1d(h, ones(3, 4, 3), padding=1), torch.tensordot(h, ones(3, 6), ([2], [1]))),
    "added": lambda h: (torch.addmm(ones(3), h[:, 0], ones(6, 3)), torch.baddbmm(ones(4, 4), h, h.mT, alpha=2)),
    "attended": lambda h: F.scaled_dot_product_attention(h, h, h),
    "recurrent": lambda h: torch.rnn_tanh(
        h, h.new_zeros(1, h.shape[0], 3), [ones(3, 6), ones(3, 3)], False, 1, 0.0, False, False, True
    )[0],
    "views": lambda h: (h.flatten(1), h.view(-1, 2, 2, 6), h.unflatten(2, (3, 2)), h.reshape(-1, 8, 3)),
    "entries": lambda h: (h[:, -1], h[:, 1:3], h.flip(2), h.roll(1, 2), h[:, [0, 2], [1, 5]], F.pad(h, (1, 2))),
    "one entry": lambda h: (h[:, :, :1].gather(2, torch.zeros(1, 1, 1).long().expand(h.shape[0], 4, 2)),),
    "written": lambda h: (h.select_scatter(h[:, 0] * 2, 1, 2), h.slice_scatter(h[:, :, :2], 2, 1, 5, 2)),
    "masked": lambda h: (h.masked_fill(torch.tensor([True, False] * 3), -1e9).softmax(2), h.masked_fill(h > 0, 1.0)),
    "numbers": lambda h: (h * 3, h / 4, -h, 2 - h, h**2, torch.maximum((h * 9).long(), (h > 0).long())),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_an_op_on_a_form(captured: Function, same: Function, form: str) -> None:
    trace, inputs = captured(lambda m, u, x: [op(FORMS[form](u, x)) for op in OPS.values()], u=(4, 6), x=(4, 6))
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    before = trace.graph
    split(trace, 16.0, "always")
    same(trace, before, trace.graph)
