"""No size of a trace becomes a number by what a pass builds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from passes.annotate import Policy, annotate
from passes.build import Builder
from passes.normalize import normalize
from passes.split import split
from passes.traced import traced
from roo_rewrite.errors import NotRowWise

aten = torch.ops.aten


def fakes(*shapes: tuple[int, ...]) -> tuple[ShapeEnv, list[Any]]:
    """Values whose first size is one symbol, of another batch in each env."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    first = mode.from_tensor(torch.zeros(61, 4), symbolic_context=context)
    with mode:
        return env, [first, *(first.new_zeros(first.shape[0], *s, dtype=torch.int64) for s in shapes)]


def test_a_call_that_asks_for_a_size_is_refused_and_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    env, (values, index, full) = fakes((1,), (4,))
    before = list(env.guards), dict(env.replacements), dict(env.var_to_range)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # an answer must not be kept either
            with pytest.raises(NotRowWise, match=r"take_along_dim.* asks for the number"):
                traced(aten.take_along_dim.default, (values, index.expand(-1, 1), 1))
    assert (list(env.guards), dict(env.replacements), dict(env.var_to_range)) == before
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    for made in (traced(aten.gather.default, (values, 1, full)), traced(aten.mul.Tensor, (values, index))):
        assert made.shape[1] == 4
        assert made.shape[0].node.expr == values.shape[0].node.expr
        assert not made.shape[0].node.expr.is_number


def test_a_question_that_makes_no_size_a_number_is_answered() -> None:
    """torch chooses the kernel of a convolution by it."""
    _, (values,) = fakes()
    assert (values.shape[0] > 16).node.expr.free_symbols
    made = traced(lambda x: x if x.shape[0] > 16 else x.t(), (values,))
    assert made is values
    weight = values.new_zeros(2, 4, 1)
    assert traced(aten.conv1d.default, (values.unsqueeze(2), weight)).shape[1] == 2


def test_a_size_may_be_asked_for_again_afterwards() -> None:
    env, (values, index) = fakes((1,))
    with pytest.raises(NotRowWise):
        traced(aten.take_along_dim.default, (values, index, 1))
    assert int(values.shape[0]) == 61
    assert len(env.guards) == 1


def picked(m: Any, u: Tensor, x: Tensor) -> Tensor:
    """Entries of `u` by an index repeated in name only, beside what is split."""
    index = x[:, :1].expand(-1, 2).abs().mul(4).to(torch.int64).remainder(4)
    return torch.cat([torch.gather(u, 1, index), F.linear(torch.cat([u, x], 1), torch.cat([m.w, m.w], 1))], 1)


def test_such_an_op_is_left_whole_and_others_are_split(
    captured: Callable[..., Any], printed: Callable[..., str]
) -> None:
    trace, inputs = captured(picked)
    normalize(trace)
    node = next(n for n in trace.graph.nodes if n.target is aten.gather.default)
    node.target, node.args = aten.take_along_dim.default, (node.args[0], node.args[2], 1)  # export takes no such op
    annotate(trace, inputs, trace.model, Policy())
    split(trace, 16.0, "always")
    made = {n.target: n for n in trace.graph.nodes}
    pick = made[aten.take_along_dim.default]
    assert list(pick.args[1].meta["val"].shape[1:]) == [2]
    assert not any(n.meta["val"].shape[0].node.expr.is_number for n in (pick, *pick.args[:2]))
    assert printed(trace.graph).count("= linear(") == 2


def test_what_a_handler_cannot_build_is_left_whole(
    captured: Callable[..., Any], printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Builder.again

    def refuse(self: Builder, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is aten.linear.default:
            raise NotRowWise("asks for the batch")
        return again(self, target, *args, **kwargs)

    trace, inputs = captured(lambda m, u, x: F.linear(u + x, m.w))
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    monkeypatch.setattr(Builder, "again", refuse)
    split(trace, 16.0, "always")
    assert printed(trace.graph).splitlines() == [
        "add_tensor = add(u, x)",
        "linear = linear(add_tensor, w)",
        "return [linear]",
    ]
