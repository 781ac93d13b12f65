"""The fuzzer: what it records is what export traces, its programs come out equal, its faults shrink."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import roo_rewrite as roo
import roo_rewrite.pipeline
from roo_rewrite.capture import Captured, capture
from roo_rewrite.inputs import bind_inputs
from tools.fuzz import __main__ as command
from tools.fuzz import runner
from tools.fuzz.drawer import STEPS, Drawer, Step
from tools.fuzz.model import trace
from tools.fuzz.recorder import F64, Recorder, Size, UnusableError, val
from tools.fuzz.rule_cases import choices, fitted, tokens


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(61, torch.Generator().manual_seed(0))


def test_most_rules_take_part() -> None:
    assert len({op for op, _ in choices()}) > 400
    assert len(STEPS) > 45


@pytest.mark.parametrize("shape", ["B 3", "i:B*2 3", "2 B 3", "b:B", "p:3*B 2", "u:B 2 3"])
def test_an_operand_has_the_shape_its_case_asks_for(recorder: Recorder, shape: str) -> None:
    prefix, dims = tokens(shape)
    made = val(fitted(Drawer(recorder, frozenset()), recorder.input("a", (4,), F64), shape))
    assert made.shape == tuple(eval(t, {"B": Size(1)}) for t in dims)
    assert made.dtype is {"i": torch.int64, "b": torch.bool}.get(prefix, F64)


def _written(captured: Captured) -> list[Any]:
    """Ops and their sizes in terms of the batch, without what only checks or measures."""
    out = []
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.op == "call_function" and "assert" not in str(node.target):
            out.append((str(node.target), [str(captured.expr(s)) for s in value.shape], value.dtype))
    return out


@pytest.mark.parametrize("seed", [3, 10])
def test_a_recorded_graph_is_what_export_traces(seed: int) -> None:
    made = runner.case(runner.drawn_steps(seed, 8), seed)
    inputs = bind_inputs(made.model.forward, made.example, {}, made.spec)
    atoms, statics = inputs.flatten(made.example, {}, roo_rewrite.pipeline.Provenance.IMPRESSION)
    assert _written(trace(made.model)) == _written(capture(made.model, inputs, atoms, statics, []))


def test_a_step_that_holds_for_some_batches_only_is_taken_back(recorder: Recorder) -> None:
    x = recorder.input("a", (4,), F64)
    before = recorder.mark()
    with pytest.raises(UnusableError, match="shape"):
        recorder("view.default", recorder("add.Tensor", x, 1.0), [13, -1])
    with pytest.raises(UnusableError, match="only looks like the batch"):
        recorder.weight(61, 2)
    recorder.undo(before)
    assert [n.name for n in recorder.graph.nodes] == ["a"]


# All but the first two once ended in an error: a sum over a dim that is no list, a convolution over cuts of impressions
# alone, scores of an attention as wide as the batch, entries taken by indices that a late expand had left
# without strides, transposed impressions beside even requests, a list of results of what is expanded, a mask of scores
# times the batch's size, entries of a vector over the batch; the last, a median of what is expanded, had no value.
@pytest.mark.parametrize(
    ("seed", "length"),
    [
        (0, 5),
        (1, 5),
        *((n, 12) for n in (9501118, 9501174, 9501740, 1001632, 1005730, 1007254, 1008622, 5002894, 5001382)),
    ],
)
def test_a_drawn_program_comes_out_equal(seed: int, length: int) -> None:
    steps = runner.drawn_steps(seed, length)
    assert runner.run(steps, seed, "always").kind == "equal"
    assert steps == runner.drawn_steps(seed, length)


def test_parts_as_wide_together_as_the_batch_is_long_are_fewer(recorder: Recorder) -> None:
    drawer = Drawer(recorder, frozenset())
    drawer.pool += [recorder.input(name, (width,), F64) for name, width in [("a", 31), ("b", 30)]]
    made = runner._side_by_side(drawer, drawer.pool[-2:])
    assert val(made).shape == (Size(1), 30)


def test_shrinking_leaves_what_the_fault_needs() -> None:
    steps = tuple(Step("added", i) for i in range(6))
    assert runner.shrunk(steps, lambda s: steps[3] in s) == (steps[3],)
    assert "aten.add.Tensor" in runner.listing(runner.case((steps[3],), 1, 0))


def test_a_fault_is_printed_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(made: runner.Case, *rest: Any) -> runner.Outcome:
        return runner.Outcome(
            "wrong" if any("add" in str(n.target) for n in made.model.graph.nodes) else "equal", "off"
        )

    monkeypatch.setattr(runner, "outcome", outcome)
    monkeypatch.setattr(runner, "drawn_steps", lambda *_: tuple(Step("added", i) for i in range(4)))
    monkeypatch.setattr(command, "drawn_steps", runner.drawn_steps)
    monkeypatch.setattr(command, "outcome", outcome)
    result = CliRunner().invoke(command.main, ["--count", "1", "--export", "0"])
    assert result.exit_code == 1, result.output
    assert "seed 0 --split always: ['added']" in result.output
    assert "1 graphs: 1 always: wrong" in result.output


def test_a_broken_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = roo_rewrite.pipeline.passes.lower.lower

    def faulty(graph: Any) -> None:
        lower(graph)
        for node in graph.nodes:
            if node.target is torch.ops.aten.cat.default:
                node.args = (list(reversed(node.args[0])), *node.args[1:])

    monkeypatch.setattr(roo_rewrite.pipeline.passes.lower, "lower", faulty)
    chance = random.Random(0)
    steps = tuple(Step("dense", chance.randrange(1000)) for _ in range(3))
    assert runner.run(steps, 1, "never").kind == "wrong"


def test_a_crash_of_a_pass_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise IndexError("off the end")

    monkeypatch.setattr(roo_rewrite.pipeline.passes.split, "split", crash)
    found = runner.run((Step("dense", 1),), 1, "always")
    assert (found.kind, found.why) == ("wrong", "IndexError: off the end")


def test_what_is_refused_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise roo.CaptureError("no trace")

    monkeypatch.setattr(runner, "trace", refuse)
    assert runner.run((Step("dense", 1),), 1, "always").kind == "original"
