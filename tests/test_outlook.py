"""A model changed after it was rewritten: the rewritten one follows, or it was never affected."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

F64 = torch.float64
SPEC = roo.FeatureSpec(request=["u"], impression=["x"])
COUNTS = torch.tensor([2, 0, 3])


class Settings:
    def __init__(self) -> None:
        self.scale = 1.0
        self.nested = {"scale": [1.0]}


class Model(nn.Module):
    """Reads settings from wherever a model may keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
        self.out = nn.Linear(8, 1)
        self.settings, self.scales, self.named = Settings(), [1.0], {"a": 1.0}
        self.tensor, self.tensors = torch.ones(4, dtype=F64), [torch.ones(1, dtype=F64)]
        self.array, self.act = np.ones(1), torch.tanh
        kept = [1.0]
        self.call, self.kept, self.books = (lambda v: v * kept[0]), kept, {"steps": 0}
        self.more: list[float] = []
        self.pad, self.weights = nn.ConstantPad1d((0, 0), 0.0), nn.Parameter(torch.ones(3))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.out(torch.cat([self.pad(self.tower(u)), x * self.tensor], -1)).squeeze(-1)
        h = h * len(self.weights) * getattr(self, "late", 1.0) * (2.0 if self.weights.requires_grad else 1.0)
        h = self.act(h) * self.settings.scale * self.settings.nested["scale"][0] * self.scales[0] * self.named["a"]
        h = h + sum(self.more)
        h = self.call(h * self.tensors[0] * float(self.array[0])) * getattr(self, "extra", 1.0)
        return h.to(self.weights.dtype)


class Doubled(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * 2


def rewritten(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)


def agree(model: nn.Module, made: Any) -> None:
    torch.manual_seed(2)
    u, x = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    torch.testing.assert_close(made(u, x, num_impressions=COUNTS), model(u.repeat_interleave(COUNTS, 0), x))


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        for part in owner.split(".") if owner else ():
            model = getattr(model, part)
        setattr(model, name, value)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an object": _set("settings.scale", 2.0),
    "a list in a dict of an object": lambda m: m.settings.nested["scale"].__setitem__(0, 3.0),
    "a list": lambda m: m.scales.__setitem__(0, 2.0),
    "a list without an entry": lambda m: m.more.append(1.0),
    "a dict": lambda m: m.named.update(a=2.0),
    "another tensor": _set("tensor", torch.full((4,), 2.0, dtype=F64)),
    "a tensor in place": lambda m: m.tensor.mul_(2),
    "a tensor in a list": lambda m: m.tensors[0].mul_(2),
    "an array": lambda m: m.array.__imul__(2),
    "a function": _set("act", torch.sigmoid),
    "what a function closes over": lambda m: m.kept.__setitem__(0, 2.0),
    "an attribute that was missing": _set("extra", 2.0),
    "a submodule": _set("out", nn.Linear(8, 1).double()),
    "a submodule of another class": _set("out", nn.Sequential(nn.Linear(8, 1).double(), nn.Tanh())),
    "a nested submodule": lambda m: m.tower.__setitem__(1, nn.Tanh()),
    "one submodule more": lambda m: m.tower.append(nn.Tanh()),
    "a hook": lambda m: m.out.register_forward_hook(lambda _m, _i, o: o * 2),
    "a hook before": lambda m: m.tower.register_forward_pre_hook(lambda _m, i: (i[0] * 2,)),
    "a hook of the root": lambda m: m.register_forward_hook(lambda _m, _i, o: o * 2),
    "a hook on gradients": lambda m: m.tower.register_full_backward_pre_hook(lambda _m, grad: (grad[0] * 2,)),
    "a bias that was None": _set("tower.0.bias", nn.Parameter(torch.ones(4, dtype=F64))),
    "the class of a submodule": _set("tower.0.__class__", Doubled),
    "a tensor past its version": lambda m: m.tensor.data.mul_(2),
    "a buffer by a name that was missing": lambda m: m.register_buffer("late", torch.full((), 2.0, dtype=F64)),
    "a setting of torch's own module": _set("pad.padding", (1, -1)),
    "how long a parameter is": _set("weights.data", torch.ones(5, dtype=F64)),
    "whether a parameter trains": lambda m: m.weights.requires_grad_(False),
    "the dtype of a parameter": lambda m: _set("weights.data", m.weights.data.float())(m),
    "a forward": lambda m: _set("out.forward", lambda z: z.sum(-1, keepdim=True))(m),
}


@pytest.mark.parametrize("part", range(3))
def test_the_rewritten_model_follows(part: int) -> None:
    torch.manual_seed(0)
    model = Model().double().eval()
    made = rewritten(model)
    for what in list(CHANGES)[part::3]:
        before = made._built
        CHANGES[what](model)
        agree(model, made)
        assert made._built == before + 1, what
        assert not made.report.fallback, what


def test_copies_follow_their_own_model() -> None:
    model = Model().double().eval()
    made = rewritten(model)
    other = copy.deepcopy(made)
    other.settings.scale = 3.0
    agree(other._original, other)
    agree(model, made)
    model.scales[0] = 5.0
    agree(model, made)
    agree(other._original, other)


class Pickled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.out = nn.Linear(4, 4), nn.Linear(8, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.tower(u), x], -1))


def test_a_submodule_set_on_the_rewritten_model_is_the_originals_too() -> None:
    model = Pickled().double().eval()
    made = rewritten(model)
    made.out = nn.Sequential(nn.Linear(8, 1).double(), nn.Tanh())
    assert model.out is made.out
    agree(model, made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        agree(model, other)
    made.train()
    agree(model, made)


def test_books_that_forward_does_not_read_cost_nothing() -> None:
    model = Model().double().eval()
    made = rewritten(model)
    for step in range(3):
        model.books["steps"] = step
        model.seen_elsewhere = step
        agree(model, made)
    assert made._built == 1


def test_programs_of_one_process_are_not_those_of_several(tmp_path: Path) -> None:
    """A SyncBatchNorm is a plain batch norm until there are processes to sync with."""
    model = Pickled().double().eval()
    made = rewritten(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        agree(model, made)
        assert made._built == 2
    finally:
        torch.distributed.destroy_process_group()
    agree(model, made)
    assert made._built == 2


def test_a_setting_in_a_plain_argument_is_followed() -> None:
    class Scaled(Pickled):
        def forward(self, u: Tensor, x: Tensor, settings: Settings) -> Tensor:  # type: ignore[override]
            return super().forward(u, x) * settings.scale

    model, settings = Scaled().double().eval(), Settings()
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64), settings), spec=SPEC)
    u, x = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    for settings.scale in (1.0, 4.0):
        want = model(u.repeat_interleave(COUNTS, 0), x, settings)
        torch.testing.assert_close(made(u, x, settings, num_impressions=COUNTS), want)


@dataclass(frozen=True)
class Divisor:
    by: float = field(compare=False)


def test_plain_arguments_that_are_equal_may_differ() -> None:
    class Divided(Pickled):
        def forward(self, u: Tensor, x: Tensor, divisor: Divisor) -> Tensor:  # type: ignore[override]
            return super().forward(u, x) / divisor.by

    model = Divided().double().eval()
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64), Divisor(1.0)), spec=SPEC)
    u, x = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    for by in (4.0, 0.0, -0.0, 4.0):
        want = model(u.repeat_interleave(COUNTS, 0), x, Divisor(by))
        found = made(u, x, Divisor(by), num_impressions=COUNTS)
        assert torch.equal(found.signbit(), want.signbit())
        torch.testing.assert_close(found, want)
    assert made._built == 4


def test_programs_do_not_share_their_constants() -> None:
    """A program built anew, and one for other shapes built after it, have each their own."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("order", torch.arange(4))

        def forward(self, u: Tensor, x: Tensor) -> Tensor:
            steps = torch.arange(1, u.shape[1] + 1, dtype=F64)
            return (self.a((u * steps[:, None]).sum(1))[:, self.order] * x).sum(-1)

    model = Masked().double()
    made = roo.rewrite(model, (torch.randn(6, 3, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)
    lengths = [3, 5]
    for turn in range(3):
        for length in lengths:
            u, x = torch.randn(3, length, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
            torch.testing.assert_close(made(u, x, num_impressions=COUNTS), model(u.repeat_interleave(COUNTS, 0), x))
        model.order.copy_(model.order.flip(0))
        lengths = [3, 5, 7 + turn]
