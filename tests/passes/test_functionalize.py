"""functionalize: in-place ops become values, or are marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from passes.functionalize import functionalize
from passes.normalize import normalize
from roo_rewrite.facts import EFFECT


def fills(m: Any, u: Any, x: Any) -> Any:
    y = u * 2
    y[:, 0] = 0.5
    return y + x


def chained(m: Any, u: Any, x: Any) -> Any:
    y = u * 2
    y.t()[1].add_(1)
    return y + x


def seen_through_a_view(m: Any, u: Any, x: Any) -> Any:
    y = u * 2
    view = y[:, :2]
    y.add_(1)
    return view.sum(1) + x.sum(1)


def copied(m: Any, u: Any, x: Any) -> Any:
    y = u * 2
    y.copy_(x[:, :1])
    return y + 1


def split(m: Any, u: Any, x: Any) -> Any:
    y = u.detach() * 2
    first, _ = y.split([1, 3], 1)
    first.mul_(3)
    return y + x


def split_by_rows(m: Any, u: Any, x: Any) -> Any:
    y = m.w.detach() * 2
    _, last = y.split(3)
    last.add_(2)
    return u @ y + x


def squeezed(m: Any, u: Any, x: Any) -> Any:
    y = (u * 2).unsqueeze(2)
    scores = y.squeeze(2)
    scores.masked_fill_(u > 0, -1.0)
    return y.sum(2) + scores


def frequencies(m: Any, u: Any, x: Any) -> Any:
    y = torch.fft.rfft(u, dim=1)
    y[:, 1:] = y[:, :2] * 2
    y[:, -1] = 0.5
    return torch.fft.irfft(y.conj(), n=4, dim=1) + x


def _assigned(y: Any, x: Any) -> Any:
    y[:] = x
    return y


CASES: dict[str, tuple[Callable[..., Any], str]] = {
    "select": (fills, "select_scatter("),
    "all of it": (lambda m, u, x: _assigned(u * 2, x), "clone_default = clone(x)\nreturn [clone_default]"),
    "transpose and select": (chained, "select_scatter(t, add_tensor, 0, 1)"),
    "squeeze": (squeezed, "reshape_as("),
    "a view of what was written": (seen_through_a_view, "slice(add_"),
    "copy_": (copied, "clone(expand_as_default)"),
    "complex numbers": (frequencies, "view_as_complex(select_scatter"),
    "a part of rows": (split_by_rows, "slice_scatter(mul, add_tensor, 0, 3, 4)"),
    "a part of a split": (split, "slice_scatter(mul, mul_tensor, 1, 0, 1)"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_write_is_left_and_the_value_is_the_same(
    name: str, captured: Callable[..., Any], printed: Callable[..., str]
) -> None:
    function, expected = CASES[name]
    trace, _ = captured(function)
    functionalize(trace.graph)
    text = printed(trace.graph)
    assert expected in text
    assert not any(EFFECT in n.meta for n in trace.graph.nodes)
    assert not any("_(" in line for line in text.splitlines())


def marked(graph: torch.fx.Graph) -> set[str]:
    return {n.name for n in graph.nodes if EFFECT in n.meta}


def test_a_write_into_a_buffer_is_an_effect(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: (m.m.add_(u.sum(0).detach()), u + x)[1])
    functionalize(trace.graph)
    assert {"m", "add_"} <= marked(trace.graph)


def test_a_write_past_autograd_is_an_effect(captured: Callable[..., Any]) -> None:
    def function(m: Any, u: Any, x: Any) -> Any:
        h = u @ m.w
        with torch.no_grad():
            h.clamp_(0, 1)
        return h + x

    trace, _ = captured(function)
    normalize(trace)
    assert any(name.startswith("clamp_") for name in marked(trace.graph))
    assert any(name.startswith("matmul") for name in marked(trace.graph))


def test_a_write_into_an_input_goes_into_a_copy(captured: Callable[..., Any], printed: Callable[..., str]) -> None:
    trace, _ = captured(lambda m, u, x: (u.detach().mul_(2), u + x)[1])
    normalize(trace)
    assert "clone(u)" in printed(trace.graph)
    assert not any(EFFECT in n.meta for n in trace.graph.nodes if n.op == "placeholder")


def test_statistics_of_two_norms_keep_their_order(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: m.norm(x) + m.norm(u), training=True)
    normalize(trace)
    assert {"batch_norm", "batch_norm_1"} <= marked(trace.graph)


def test_statistics_of_one_norm_are_no_effect(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: m.norm(u) + x, training=True)
    normalize(trace)
    assert "batch_norm" not in marked(trace.graph)


def test_a_module_made_in_forward_is_filled_without_a_write(captured: Callable[..., Any]) -> None:
    trace, _ = captured(lambda m, u, x: torch.nn.LayerNorm(4)(u) + x)
    normalize(trace)
    assert not marked(trace.graph)


def test_a_write_through_detach_leaves_the_gradient(captured: Callable[..., Any]) -> None:
    """The values of y are new, its gradient is the old one: no value says that."""

    def function(m: Any, u: Any, x: Any) -> Any:
        y = u @ m.w
        y.detach().mul_(2)
        return y + x

    trace, _ = captured(function)
    normalize(trace)
    assert any(name.startswith("mul_") for name in marked(trace.graph))


CASTS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "to a device": (lambda y: y.to(torch.device("cpu")), True),
    "to a device and dtype": (lambda y: y.to(torch.device("cpu"), torch.float32), True),
    "to what another is": (lambda y: y.to(y + 1), True),
    "as another": (lambda y: y.type_as(y + 1), True),
    "asked for a copy": (lambda y: y.to(torch.device("cpu"), torch.float32, copy=True), False),
    "to another dtype": (lambda y: y.to(torch.device("cpu"), torch.float64), False),
    "as one of another dtype": (lambda y: y.type_as(y.double()), False),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_its_operand_where_it_has_nothing_to_do(name: str, captured: Callable[..., Any]) -> None:
    cast, alias = CASTS[name]

    def function(m: Any, u: Any, x: Any) -> Any:
        y = u * 2
        cast(y).mul_(3)
        return y + x

    trace, _ = captured(function)
    functionalize(trace.graph)
    assert not any(EFFECT in n.meta for n in trace.graph.nodes)
    u, x = torch.randn(2, 3, 4)
    names = [n.name for n in trace.graph.nodes if n.op == "placeholder"]
    (found,) = torch.fx.Interpreter(torch.fx.GraphModule({}, trace.graph)).run(*[u, x][: len(names)])
    assert torch.equal(found, (6 if alias else 2) * u + x)
