"""capture: what is traced, what becomes a leaf, what is left to the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.capture import BATCH, Captured, capture, trace_batch
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import bind_inputs
from roo_rewrite.leaves import default_leaves
from roo_rewrite.purity import state, twin


def trace(model: nn.Module, *example: Tensor, leaves: tuple[str, ...] = ()) -> Captured:
    names = ["u", "x"][: len(example)]
    inputs = bind_inputs(model.forward, example, {}, roo.FeatureSpec(names[:1], names[1:]))
    atoms, statics = inputs.flatten(example, {}, Provenance.IMPRESSION)
    return capture(model, inputs, atoms, statics, leaves)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.function = function

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.function(self, u, x)


def sizes(captured: Captured) -> list[Any]:
    return [captured.expr(s) for n in captured.graph.nodes if n.op == "placeholder" for s in n.meta["val"].shape]


def test_the_batch_is_one_symbol_on_both_sides() -> None:
    assert sizes(trace(Function(lambda m, u, x: m.a(u) + x), torch.randn(3, 4), torch.randn(3, 4))) == [BATCH, 4] * 2


def test_the_length_of_a_batch_is_its_size() -> None:
    found = trace(Function(lambda m, u, x: u.view(len(u), 2, 2) + len(x) * len([u, x])), *[torch.randn(3, 4)] * 2)
    assert [str(found.expr(s)) for n in found.graph.nodes if n.name == "view" for s in n.meta["val"].shape] == list(
        "B22"
    )
    assert len(torch.randn(3, 4)) == 3
    assert found.accepts(7)


def test_the_batch_of_the_trace_divides_no_size() -> None:
    model = nn.Linear(61 * 67, 71)
    batch = trace_batch(model, [torch.randn(3, 61 * 67)])
    assert batch > 60
    assert all(s % batch for s in (61 * 67, 71))


@pytest.mark.parametrize(
    ("branch", "accepted", "refused"),
    [
        (lambda n: n > 5, [6, 7, 100], [2, 5]),
        (lambda n: n >= 2, [2, 3, 100], []),
        (lambda n: n == 7, [2, 6, 8], [7]),
    ],
)
def test_branches_on_the_batch_size_are_kept(branch: Any, accepted: list[int], refused: list[int]) -> None:
    found = trace(Function(lambda m, u, x: u * 2 if branch(u.shape[0]) else u), torch.randn(3, 4), torch.randn(3, 4))
    assert [found.accepts(n) for n in accepted] == [True] * len(accepted)
    for _ in range(2):  # the second time from memory
        assert [found.accepts(n) for n in refused] == [False] * len(refused)


class Picky(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if float(h.detach().sum()) > 1e9 else h


class WithPicky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4), Picky())

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.tower(u) * x


def test_what_cannot_be_traced_is_a_leaf_with_a_note() -> None:
    captured = trace(WithPicky(), torch.randn(3, 4), torch.randn(3, 4))
    assert captured.leaves == ("tower.1",)
    assert [s.path for s in captured.sites] == ["tower.1"]
    assert "'tower.1' is kept as an opaque leaf" in captured.notes[0]


def test_leaves_asked_for_are_called_as_they_are() -> None:
    captured = trace(WithPicky(), torch.randn(3, 4), torch.randn(3, 4), leaves=("tower",))
    assert [s.path for s in captured.sites] == ["tower"]
    assert not any(n.target is torch.ops.aten.linear.default for n in captured.graph.nodes)


def test_modules_with_backward_hooks_are_leaves() -> None:
    model = WithPicky()
    model.tower[0].register_full_backward_hook(lambda m, i, o: None)
    assert default_leaves(model) == ["tower.0"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, u, x: u * 2 if u.sum() > 0 else u, "cannot be traced"),
        (lambda m, u, x: (setattr(m, "n", getattr(m, "n", 0) + 1), u)[1], "keeps state in 'n'"),
        (lambda m, u, x: torch.manual_seed(3) and u * 1, "manual_seed"),
        (lambda m, u, x: [u, object()], "returns a object"),
        (lambda m, u, x: u[100] + x, "fails on"),
    ],
)
def test_what_is_left_to_the_original(function: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        trace(Function(function), torch.randn(3, 4), torch.randn(3, 4))


def test_sides_of_other_sizes_and_empty_examples_are_refused() -> None:
    plain = Function(lambda m, u, x: m.a(u) + x)
    with pytest.raises(CaptureError, match="impression-level"):
        trace(plain, torch.randn(1, 4), torch.randn(3, 4))
    with pytest.raises(CaptureError, match="no rows"):
        trace(plain, torch.randn(0, 4), torch.randn(0, 4))


def test_a_twin_shares_parameters_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.notes = {"seen": [1]}  # type: ignore[assignment]
    copied: Any = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters()))
    assert all(a is not b for a, b in zip(model.buffers(), copied.buffers()))
    before = state(model)
    copied.notes["seen"].append(2)
    assert state(model) == before
    assert state(copied) != before


@pytest.mark.parametrize("training", [False, True])
def test_data_of_a_tensor_is_traced_without_its_gradient(training: bool) -> None:
    function = Function(lambda m, u, x: (m.a(u) * u.data.gt(0) + m.a(x).data).masked_fill(x.data > 1, 0.0))
    function.train(training)
    spec = roo.FeatureSpec(["u"], ["x"])
    rewritten = roo.rewrite(function, (torch.randn(5, 4), torch.randn(5, 4)), spec=spec, check=True)
    assert rewritten._whole_program().emitted is not None
    roo.verify(function, rewritten, batches=4)
