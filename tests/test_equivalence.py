"""verify sees what is wrong: a rule, the broadcast, a gradient, each broken on purpose."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
import roo_rewrite.pipeline
from roo_rewrite.emit import Emitted
from roo_rewrite.facts import Rows
from roo_rewrite.rules import registry
from roo_rewrite.trial import Trial

SPEC = roo.FeatureSpec(request=["u"], impression=["x"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(u)) * torch.cat([x, x * x], 1)).squeeze(-1)


class Ranked(Model):
    """A running sum over the batch: a rule must keep it where it is."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return super().forward(torch.cumsum(u, 0), x)


def example(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 4, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


Break = Callable[..., Any]


def wrong_rows(whole: Break, model: Any, *inputs: Tensor) -> Any:
    """Every impression gets the value of the request on the other end."""
    *atoms, counts = inputs
    return whole(model, atoms[0].flip(0), *atoms[1:], counts)


def wrong_value(whole: Break, model: Any, *inputs: Tensor) -> Any:
    (out,) = whole(model, *inputs)
    return (out * (1 + 1e-6),)


def wrong_last_row(whole: Break, model: Any, *inputs: Tensor) -> Any:
    (out,) = whole(model, *inputs)
    late = torch.arange(len(out)) >= 2
    return (torch.where(late, out * 1.01, out),)


def wrong_gradient(whole: Break, model: Any, *inputs: Tensor) -> Any:
    (out,) = whole(model, *inputs)
    return (out + 0.1 * (out - out.detach()),)


def lost_gradient(whole: Break, model: Any, *inputs: Tensor) -> Any:
    return whole(model, inputs[0].detach(), *inputs[1:])


def wrong_shape(whole: Break, model: Any, *inputs: Tensor) -> Any:
    (out,) = whole(model, *inputs)
    return (out[:, None],)


def wrong_dtype(whole: Break, model: Any, *inputs: Tensor) -> Any:
    (out,) = whole(model, *inputs)
    return (out.float(),)


def fails(whole: Break, model: Any, *inputs: Tensor) -> Any:
    raise RuntimeError("broken")


BREAKS = [wrong_rows, wrong_value, wrong_last_row, wrong_gradient, lost_gradient, wrong_shape, wrong_dtype, fails]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Break], Any]:
    """A rewritten model whose program is broken, and whose trial was not held."""

    def make(fault: Break, kind: type[Model] = Model) -> tuple[nn.Module, Any]:
        emit = roo_rewrite.pipeline.emit

        def faulty(graph: Any) -> Emitted:
            good = emit(graph)
            return dataclasses.replace(good, whole=lambda model, *inputs: fault(good.whole, model, *inputs))

        monkeypatch.setattr(roo_rewrite.pipeline, "emit", faulty)
        monkeypatch.setattr(Trial, "mismatch", lambda self, example: None)
        torch.manual_seed(0)
        model = kind()
        return model, roo.rewrite(model, example(), spec=SPEC)

    return make


def test_a_good_model_passes() -> None:
    model = Model()
    roo.verify(model, roo.rewrite(model, example(), spec=SPEC, check=True))


@pytest.mark.parametrize("fault", BREAKS)
def test_a_fault_is_found(fault: Break, broken: Callable[[Break], Any]) -> None:
    model, rewritten = broken(fault)
    with pytest.raises(roo.EquivalenceError) as caught:
        roo.verify(model, rewritten, batches=8)
    assert caught.value.where
    assert caught.value.num_impressions is not None


@pytest.mark.parametrize(
    ("fault", "smallest"), [(wrong_last_row, 3), (wrong_value, 2), (wrong_gradient, 2), (wrong_rows, 2)]
)
def test_the_failing_batch_is_the_smallest(fault: Break, smallest: int, broken: Callable[[Break], Any]) -> None:
    model, rewritten = broken(fault)
    with pytest.raises(roo.EquivalenceError) as caught:
        roo.verify(model, rewritten, batches=8)
    assert sum(caught.value.num_impressions or []) == smallest
    assert f"num_impressions = {caught.value.num_impressions}" in str(caught.value)


@pytest.mark.parametrize("fault", BREAKS)
def test_the_trial_keeps_a_broken_program_from_being_used(fault: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = roo_rewrite.pipeline.emit

    def faulty(graph: Any) -> Emitted:
        good = emit(graph)
        return dataclasses.replace(good, whole=lambda model, *inputs: fault(good.whole, model, *inputs))

    monkeypatch.setattr(roo_rewrite.pipeline, "emit", faulty)
    model = Model().double()
    inputs = example(dtype=torch.float64)
    with pytest.raises(roo.EquivalenceError):
        roo.rewrite(model, inputs, spec=SPEC, check=True)
    rewritten = roo.rewrite(model, inputs, spec=SPEC)
    assert "failed its check" in str(rewritten.report)
    roo.verify(model, rewritten, batches=4)


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = registry.find("aten.cumsum.default")
    assert rule is not None
    lying = dataclasses.replace(rule, function=lambda call: Rows(0))
    monkeypatch.setitem(registry._REGISTRY.rules, "aten.cumsum.default", lying)
    model = Ranked()
    with pytest.raises(roo.EquivalenceError, match="hoist changed the result"):
        roo.rewrite(model, example(), spec=SPEC, fanout=64, check=True)
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=64)
    roo.verify(model, rewritten, batches=4)
    monkeypatch.setattr(Trial, "mismatch", lambda self, example: None)
    with pytest.raises(roo.EquivalenceError):
        roo.verify(model, roo.rewrite(model, example(), spec=SPEC, fanout=64), batches=4)


@pytest.mark.parametrize(
    ("name", "word"), [("normalize", "normalize"), ("hoist", "hoist"), ("lower", "lower"), ("split", "split")]
)
def test_check_names_the_pass_at_fault(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten
    swapped = {aten.tanh.default: aten.sin.default, aten.tanh_.default: aten.sin_.default}
    module = getattr(roo_rewrite.pipeline.passes, name)
    good = getattr(module, name)

    def faulty(first: Any, *rest: Any) -> Any:
        made = good(first, *rest)
        graph = made if name == "hoist" else getattr(first, "graph", first)
        tanh = next(n for n in graph.nodes if n.target in swapped)
        tanh.target = swapped[tanh.target]
        return made

    monkeypatch.setattr(module, name, faulty)
    with pytest.raises(roo.EquivalenceError, match=f"{word} changed the result"):
        roo.rewrite(Model(), example(), spec=SPEC, check=True)


class ReadsKept(Model):
    """Reads again what it has just kept; and what it keeps is another tensor after every call."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.last = self.a(u)
        return super().forward(u, x) + self.last.sum(1)


class Caches(Model):
    last: Tensor | None = None

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.last = self.last if self.last is not None else torch.ones(8)
        return super().forward(u, x) + (self.last * self.a(u)).sum(1)


@pytest.mark.parametrize(("kind", "built_again"), [(ReadsKept, False), (Caches, True)])
def test_what_forward_keeps_and_reads_again_is_no_change(kind: type[Model], built_again: bool) -> None:
    model = kind()
    model(*example())
    rewritten = roo.rewrite(model, example(), spec=SPEC)
    before = rewritten._whole_program()
    u, x = example()
    model(u, x)
    if built_again:
        model.last = torch.zeros(8)  # type: ignore[attr-defined]
    got = rewritten(u, x, num_impressions=torch.ones(6, dtype=torch.long))
    torch.testing.assert_close(got, model(u, x))
    assert (rewritten._whole_program() is not before) == built_again


class Detached(Model):
    """A part without gradients is a graph of its own in the trace."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.a(u)).mean(1)
        return super().forward(u, x) * gate


def test_check_takes_a_model_with_no_grad_inside() -> None:
    model = Detached()
    rewritten = roo.rewrite(model, example(), spec=SPEC, check=True)
    assert not rewritten._whole_program().notes
    roo.verify(model, rewritten, batches=3)


def test_another_model_is_found() -> None:
    model, other = Model(), Model()
    with pytest.raises(roo.EquivalenceError):
        roo.verify(other, roo.rewrite(model, example(), spec=SPEC), batches=3)


@pytest.mark.parametrize("training", [False, True])
def test_models_are_left_alone(training: bool) -> None:
    model = nn.Sequential()
    model = Model().train(training)
    rewritten = roo.rewrite(model, example(), spec=SPEC)
    before = copy.deepcopy(model.state_dict())
    roo.verify(model, rewritten, batches=3)
    assert model.training is rewritten.training is training
    for key, value in model.state_dict().items():
        assert value.dtype is before[key].dtype
        assert torch.equal(value, before[key])


class Kept(Model):
    """Keeps an intermediate for inspection."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.last = self.a(u)
        return super().forward(u, x)


def test_results_of_earlier_calls_do_not_matter() -> None:
    model = Kept()
    model(*example())  # torch copies no tensor with a history
    rewritten = roo.rewrite(model, example(), spec=SPEC, check=True)
    model(*example())
    roo.verify(model, rewritten, batches=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_is_verified_too(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    roo.verify(model, roo.rewrite(model, example(dtype=dtype), spec=SPEC), batches=4)


class NoBackward(Model):
    """The sum overwrites what ReLU keeps for its backward; an input is changed in place."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        x *= 0.5
        out = torch.relu(self.a(u))
        out += torch.cat([x, x * x], 1)
        return self.b(out).squeeze(-1)


def test_values_are_compared_where_the_original_has_no_backward() -> None:
    model = NoBackward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(*example()).sum().backward()
    roo.verify(model, roo.rewrite(model, example(), spec=SPEC, check=True), batches=8)


def test_a_wrong_value_is_found_where_the_original_has_no_backward(broken: Callable[[Break], Any]) -> None:
    model, rewritten = broken(wrong_value, NoBackward)
    with pytest.raises(roo.EquivalenceError, match="output 0 is off"):
        roo.verify(model, rewritten, batches=8)


class LongOnly(Model):
    """Runs where some request has a flag set, and on no batch without."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        torch._assert_async((u[:, 0] > 5).any())
        return super().forward(u, x)


def test_a_batch_that_the_original_cannot_run_says_nothing() -> None:
    model, (u, x) = LongOnly(), example(rows=40)
    u[3, 0] = 6.0
    rewritten = roo.rewrite(model, (u, x), spec=SPEC)
    assert rewritten._whole_program().emitted is not None
    counts = torch.full((40,), 2)
    want = model(u.repeat_interleave(2, 0), x.repeat(2, 1))
    torch.testing.assert_close(rewritten(u, x.repeat(2, 1), num_impressions=counts), want)
