"""normalize: one way to say each thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from passes.normalize import normalize
from roo_rewrite.facts import AUTOCAST
from roo_rewrite.legality import IllegalGraph, normalized


def no_grad(m: Any, u: Any, x: Any) -> Any:
    with torch.no_grad():
        h = torch.relu(u)
    return h + x


CASES = {
    "no_grad becomes a detach": (
        no_grad,
        "detach_default = detach(u)\nrelu_1 = relu(detach_default)\nadd = add(relu_1, x)",
    ),
    "a slice of everything is dropped": (lambda m, u, x: u[:] + x, "add = add(u, x)"),
    "a slice of some stays": (lambda m, u, x: u[:, 1:] + x[:, 1:], "slice_2 = slice(u, 1, 1, 9223372036854775807)"),
    "dropout that is off is dropped": (lambda m, u, x: F.dropout(u, 0.5, False) + x, "add = add(u, x)"),
    "dropout that is on stays": (lambda m, u, x: F.dropout(u, 0.5, True) + x, "dropout = dropout(u, 0.5, True)"),
    "squeeze names its dims": (
        lambda m, u, x: u.unsqueeze(1).squeeze() + x,
        "squeeze_dims = squeeze(unsqueeze, [1])",
    ),
    "squeeze of a dim that is not 1 is dropped": (lambda m, u, x: u.squeeze(0) + x, "add = add(u, x)"),
    "a part without entries is left out": (
        lambda m, u, x: torch.cat([x[:, :0], u], 1) * x,
        "cat = cat([u], 1)",
    ),
    "a part that is empty and gives the dtype stays": (
        lambda m, u, x: torch.cat([x[:, :0].double(), u], 1) * x,
        "cat = cat([to, u], 1)",
    ),
    "an input moved to where it is": (
        lambda m, u, x: u.to(dtype=torch.float32, device="cpu") + x.to("cpu"),
        "add = add(u, x)",
    ),
    "an input copied": (
        lambda m, u, x: u.to(device="cpu", copy=True) + x,
        "add = add(to, x)",
    ),
    "an input cast": (
        lambda m, u, x: u.to("cpu", torch.float64) + x,
        "to = to.device(u, getattr_1, torch.float64)",
    ),
    "a view is a reshape": (lambda m, u, x: u.view(-1, 2, 2) + 1, "reshape_default = reshape(u, [-1, 2, 2])"),
    "a view to its own shape is dropped": (lambda m, u, x: u.view(-1, 4) + x, "add = add(u, x)"),
    "a matrix times one column is a linear map": (
        lambda m, u, x: m.w @ x.unsqueeze(2),
        "squeeze_dims = squeeze(unsqueeze, [2])\nlinear_default = linear(squeeze_dims, w)\n"
        "unsqueeze_default = unsqueeze(linear_default, 2)",
    ),
    "a matrix times several columns stays": (
        lambda m, u, x: m.w @ torch.stack([u, x], 2),
        "matmul = matmul(w, stack)",
    ),
    "rows times a matrix stay": (lambda m, u, x: (u + x) @ m.w[:, :1], "matmul = matmul(add, slice_1)"),
    "entries taken without a dim are taken from a vector": (
        lambda m, u, x: torch.take_along_dim(m.w, (u > x).long()),
        "reshape_default = reshape(w, [-1])\nreshape_default_1 = reshape(to, [-1])\n"
        "index_select_default = index_select(reshape_default, 0, reshape_default_1)",
    ),
    "a view as another is one of numbers": (
        lambda m, u, x: u.view_as(x.reshape(-1, 2, 2)) + 1,
        "reshape_default = reshape(u, [-1, 2, 2])\nadd = add(reshape_default, 1)",
    ),
    "a view of two unknown sizes stays": (
        lambda m, u, x: (u @ u.t()).view_as(x @ x.t()).sum(1, keepdim=True) + u,
        "view_as = view_as(matmul, matmul_1)",
    ),
    "an expand as another keeps the batch": (
        lambda m, u, x: u[:, :1].expand_as(x) + 1,
        "expand_default = expand(slice_2, [-1, 4])",
    ),
    "an expand of a row to the batch stays": (lambda m, u, x: m.w[:1].expand_as(x) + u, "expand_as(slice_1, x)"),
    "a cast as another": (lambda m, u, x: (u > 0).type_as(x) + 1, "to_dtype = to.dtype(gt, torch.float32)"),
    "a cast as another of the same dtype": (lambda m, u, x: (u * 2).type_as(x) + 1, "add = add(mul, 1)"),
    "a draw nobody reads stays": (lambda m, u, x: (torch.rand(3), u + x)[1], "rand = rand([3])"),
}


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str, captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    function, expected = CASES[name]
    trace, _ = captured(function)
    normalize(trace)
    normalized(trace.graph)
    assert expected in printed(trace.graph)


def test_what_autocast_leaves_out_is_not_cast(captured: Callable[..., Any]) -> None:
    def function(m: Any, u: Any, x: Any) -> Any:
        with torch.no_grad():
            y = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            h = u @ m.w
            with torch.no_grad():
                h = h @ m.w
            with torch.autocast("cpu", enabled=False):
                h = h.float().tanh()
            with torch.autocast("cuda", enabled=False):  # of another device: the region around it goes on
                h = h @ m.w
        return h + y

    trace, _ = captured(function)
    normalize(trace)
    took = {n.target: {a.meta["val"].dtype for a in n.all_input_nodes} for n in trace.graph.nodes}
    assert took[torch.ops.aten.matmul.default] == {torch.bfloat16}
    assert took[torch.ops.aten.tanh.default] == took[torch.ops.aten.sin.default] == {torch.float32}
    assert [n.target for n in trace.graph.nodes].count(torch.ops.aten.matmul.default) == 3
    assert not any(AUTOCAST in n.meta for n in trace.graph.nodes)


@pytest.mark.parametrize(("device", "enabled"), [("cpu", False), ("cuda", False)])
def test_autocast_that_does_nothing_is_dropped(captured: Callable[..., Any], device: str, enabled: bool) -> None:
    def function(m: Any, u: Any, x: Any) -> Any:
        with torch.autocast(device, enabled=enabled):
            return u @ m.w + x

    trace, _ = captured(function)
    normalize(trace)
    assert not any(AUTOCAST in n.meta for n in trace.graph.nodes)


def test_autocast_turned_off_inside_of_the_callers_stays(captured: Callable[..., Any]) -> None:
    def function(m: Any, u: Any, x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return u @ m.w + x

    with torch.autocast("cpu", torch.bfloat16):
        trace, _ = captured(function)
        normalize(trace)
    assert any(AUTOCAST in n.meta for n in trace.graph.nodes)


def test_values_are_made_where_the_inputs_are(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: u + torch.zeros(len(x), 4, device=x.device) + torch.ones(4, device="cpu"))
    normalize(trace)
    given = [a for n in trace.graph.nodes for a in (*n.args, *n.kwargs.values())]
    assert not any(isinstance(a, torch.device) for a in given)
    assert sum(isinstance(a, torch.fx.Node) and a.target is getattr for a in given) == 2


def test_a_graph_that_still_writes_is_illegal(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: (u * 1).add_(x))
    with pytest.raises(IllegalGraph, match="writes"):
        normalized(trace.graph)
