"""The casts of autocast written out give, op by op, every bit that torch gives under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.autocast_casts import _Sample
from passes.normalize import normalize
from roo_rewrite.emit import runnable
from roo_rewrite.facts import AUTOCAST

Function = Callable[[Any, Tensor, Tensor], Any]
aten = torch.ops.aten


def in_region(function: Function, dtype: torch.dtype = torch.bfloat16) -> Function:
    def forward(m: Any, u: Tensor, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return function(m, u, x)

    return forward


def low(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


OPS: dict[str, Function] = {
    "a linear map": lambda m, u, x: F.linear(u, m.w, m.m),
    "products": lambda m, u, x: (u @ m.w, torch.bmm(u[:, None], x[:, :, None]), torch.mm(u, m.w), u @ m.m),
    "a batched product added": lambda m, u, x: torch.baddbmm(x[:, :, None], u[:, :, None], x[:, :1, None]),
    "einsum": lambda m, u, x: (torch.einsum("bi,ij,bj->b", u, m.w, x), torch.einsum("bi,bj->bij", u, x)),
    "windows": lambda m, u, x: F.conv1d(u[:, None], m.w[:, None], padding=1),
    "prelu": lambda m, u, x: F.prelu(low(u), m.m),
    "attention": lambda m, u, x: F.scaled_dot_product_attention(*[torch.stack([u, x], 1)[:, None]] * 3),
    "a norm of either dtype": lambda m, u, x: (F.layer_norm(u, [4], m.m), F.layer_norm(low(u), [4], m.m)),
    "a batch norm": lambda m, u, x: m.norm(u @ m.w),
    "softmax, pointwise": lambda m, u, x: ((u @ m.w).softmax(1), low(u).sigmoid().exp(), low(u) * x),
    "concatenations of two dtypes": lambda m, u, x: (torch.cat([low(u), x], 1), torch.stack([x, low(u)])),
    "concatenations of one": lambda m, u, x: (torch.cat([low(u), low(x)], 1), torch.cat([u, x])),
    "in float32": lambda m, u, x: (low(u).prod(1), F.mse_loss(low(u), low(x)), torch.cdist(low(u), low(x))),
    "sums": lambda m, u, x: (low(u).sum(1), low(u).mean(1), low(u).cumsum(1), torch.linalg.vector_norm(low(u), dim=1)),
    "rows of a table": lambda m, u, x: F.embedding((u > 0).long(), m.w) @ m.w,
    "losses": lambda m, u, x: F.binary_cross_entropy_with_logits(low(u), low(x).sigmoid(), reduction="none"),
    "written into": lambda m, u, x: (u @ m.w).add_(1.0).mul_(2.0).clamp_(min=0.0),
    "sizes, truths": lambda m, u, x: (low(u) / len(u), (u > x).long(), torch.where(u > x, u, x), u.argmax(1)),
    "under no_grad": lambda m, u, x: torch.no_grad()(lambda: u @ m.w)() @ m.w,
    "a region that is off": lambda m, u, x: torch.autocast("cpu", enabled=False)(lambda h: h.float() @ m.w)(u @ m.w),
    "another dtype inside": lambda m, u, x: in_region(lambda m, u, x: u @ u.mT, torch.float16)(m, u @ m.w, x) @ x,
}


@pytest.mark.parametrize("name", OPS)
def test_every_bit_is_torchs(name: str, captured: Callable[..., Any]) -> None:
    function = in_region(OPS[name])
    trace, _ = captured(function)
    normalize(trace)
    assert not any(AUTOCAST in n.meta for n in trace.graph.nodes)
    u, x = torch.randn(2, 5, 4)
    torch.nn.init.normal_(trace.model.w)
    torch.nn.init.normal_(trace.model.m)
    trace.model.eval()
    with torch.no_grad():
        wanted = function(trace.model, u, x)
        found = runnable(trace.graph, "p")(trace.model, u, x)
    for got, want in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


def test_a_parameter_is_cast_once_in_a_region(captured: Callable[..., Any]) -> None:
    def twice(m: Any, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(u, m.w), m.w)

    inner = in_region(twice)
    trace, _ = captured(lambda m, u, x: in_region(inner)(m, u, x) + inner(m, x, u))
    normalize(trace)
    assert len([n for n in trace.graph.nodes if n.target is aten.to.dtype and n.args[0].op == "get_attr"]) == 2


@torch.library.custom_op("roo_tests::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


@product.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


UNTOLD: dict[str, tuple[Function, Any]] = {
    "a recurrent net casts its products alone": (
        lambda m, u, x: torch.gru(u[:, None], x[None], [m.w.repeat(3, 1)] * 2, False, 1, 0.0, False, False, True)[0],
        aten.gru.input,
    ),
    "an op that is not ATen's": (lambda m, u, x: product(u, m.w), torch.ops.roo_tests.product.default),
    "integers that no sample takes": (
        lambda m, u, x: (u > 0).long() // ((x > 0).long() + 1),
        aten.floor_divide.default,
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_is_not_told_keeps_its_mark(name: str, captured: Callable[..., Any]) -> None:
    function, target = UNTOLD[name]
    with torch.no_grad():
        trace, _ = captured(in_region(function))
    normalize(trace)
    assert next(n.target for n in trace.graph.nodes if AUTOCAST in n.meta) is target


def test_under_the_callers_autocast_marks_stay(captured: Callable[..., Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        trace, _ = captured(in_region(lambda m, u, x: u @ m.w, torch.float16))
        normalize(trace)
    assert any(AUTOCAST in n.meta for n in trace.graph.nodes)


def test_doubles_are_not_cast(captured: Callable[..., Any]) -> None:
    trace, _ = captured(in_region(lambda m, u, x: u.double() @ m.w.double()))
    normalize(trace)
    assert [n.args[1] for n in trace.graph.nodes if n.target is aten.to.dtype] == [torch.float64] * 2


def test_samples_are_shares_whole_numbers_and_truths() -> None:
    """Whole numbers that are all 0 would be lengths without a step."""
    for dtype in (torch.int64, torch.bool):
        assert set(_Sample(torch.zeros(60, dtype=dtype)).tensor().tolist()) == {0, 1}
    assert len(set(_Sample(torch.zeros(60)).tensor().tolist()) - {0.0, 1.0}) > 1
