"""Ways that a trace could take unseen: exceptions a model catches, Functions called through a kept `apply`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from hazard_parts import Plain
from torch import Tensor, nn

import roo_rewrite as roo

SPEC = roo.FeatureSpec(request=["u"], impression=["x"])
COUNTS = torch.tensor([2, 0, 3])


def rewritten(model: nn.Module) -> Any:
    torch.manual_seed(1)
    example = (torch.rand(7, 4, dtype=torch.float64), torch.rand(7, 4, dtype=torch.float64))
    return roo.rewrite(model, example, spec=SPEC, fanout=64)


def equal_at(model: nn.Module, made: Any, scale: float) -> None:
    """Scores and gradients on inputs as large as `scale`, far from the example."""
    torch.manual_seed(2)
    u, x = scale * torch.rand(3, 4, dtype=torch.float64), scale * torch.rand(5, 4, dtype=torch.float64)
    found, expected = made(u, x, num_impressions=COUNTS), model(u.repeat_interleave(COUNTS, 0), x)
    torch.testing.assert_close(found, expected)
    sides = [torch.autograd.grad(scale * out.sum(), list(model.parameters())) for out in (found, expected)]
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b)


class Tried(Plain):
    """Whether any entry is large cannot be told while tracing; the model catches that it cannot."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        try:
            large = bool((x > 3).any())
        except Exception:
            large = False
        return self.mix(self.user(u), x) * (5 if large else 1)


class TriedItem(Plain):
    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        y = self.mix(self.user(u), x)
        try:
            if int((x > 3).sum().item()) > 2:
                return y * 7
        except RuntimeError:
            pass
        return y


class Suppressed(Plain):
    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        with contextlib.suppress(Exception):
            if x.max() > 3:
                h = h * 5
        return self.mix(h, x)


class InHelper(Plain):
    """Caught two calls up."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x) * self.scale(x)

    def scale(self, x: Tensor) -> float:
        try:
            return self.largest(x)
        except RuntimeError:
            return 1.0

    def largest(self, x: Tensor) -> float:
        return 2.0 if x.max() > 3 else 1.0


@pytest.mark.parametrize("kind", [Tried, TriedItem, Suppressed, InHelper], ids=lambda k: k.__name__)
def test_what_only_a_trace_raises_is_no_way_to_go(kind: type) -> None:
    model = kind().double()
    made = rewritten(model)
    assert made.report.fallback
    assert "only tracing it raises" in made.report.notes[0]
    assert "test_caught.py" in made.report.notes[0]
    for scale in (1.0, 100.0):
        equal_at(model, made, scale)


class CatchesItsOwn(Plain):
    """An exception that a run meets too tells nothing."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        try:
            scale = self.settings["scale"]
        except AttributeError:
            scale = 2.0
        return self.mix(self.user(u), x) * scale


class Guards(Plain):
    """A handler that nothing reaches."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        try:
            return self.mix(self.user(u), x)
        finally:
            pass


@pytest.mark.parametrize("kind", [CatchesItsOwn, Guards], ids=lambda k: k.__name__)
def test_handlers_alone_keep_nothing_from_being_hoisted(kind: type) -> None:
    model = kind().double()
    made = rewritten(model)
    assert not made.report.fallback, made.report.notes
    equal_at(model, made, 1.0)


def test_a_debugger_stays_attached() -> None:
    seen: list[str] = []

    def tracer(frame: Any, event: str, arg: Any) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        rewritten(Guards().double())
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


class Clip(torch.autograd.Function):
    """Not a linear backward: clipping a request's sum is not the sum of its clipped gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-5, 5)


class Double(torch.autograd.Function):
    """Row-wise, and with a backward that is not its forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


clip, double = Clip.apply, Double.apply


class KeptInModule(Plain):
    def user(self, u: Tensor) -> Tensor:
        return clip(super().user(u))


class KeptInAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.clip = Clip.apply

    def user(self, u: Tensor) -> Tensor:
        return self.clip(super().user(u))


class KeptRowWise(Plain):
    def user(self, u: Tensor) -> Tensor:
        return double(super().user(u))


@pytest.mark.parametrize("kind", [KeptInModule, KeptInAttribute, KeptRowWise], ids=lambda k: k.__name__)
def test_a_function_called_through_a_kept_apply_keeps_its_backward(kind: type) -> None:
    model = kind().double()
    made = rewritten(model)
    assert not made.report.fallback, made.report.notes
    for scale in (0.1, 1.0, 100.0):
        equal_at(model, made, scale)
    leaf = next(n for n in made.report.nodes if "leaf" in n.op)
    assert leaf.runs == ("request" if kind is KeptRowWise else "impression")


KEPT = """
import functools

def sizes(shape):
    return (shape[0], shape[1] // 2, 2)

kept = functools.lru_cache(sizes)

def _apply_recipe(x):
    try:
        found = kept(tuple(x.shape))
    except TypeError:
        found = sizes(x.shape)
    return x.reshape(found)
"""


def defined(module: str) -> Any:
    """What `KEPT` defines, as a module of this name would."""
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(KEPT, f"{module}.py", "exec"), scope)
    return scope["_apply_recipe"]


REARRANGE = {name: defined(name) for name in ("einops.einops", "mine")}


class Kept(Plain):
    """A reshape worked out once for each shape; a shape with a symbol has no hash."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(REARRANGE[self.module](self.user(u)).flatten(1), x)


@pytest.mark.parametrize(("module", "known"), [("einops.einops", True), ("mine", False)])
def test_a_cache_gone_past_is_no_other_way_where_it_is_known(module: str, known: bool) -> None:
    model = Kept(module).double()
    made = rewritten(model)
    assert made.report.fallback != known, made.report.notes
    equal_at(model, made, 1.0)
