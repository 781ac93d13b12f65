"""The one law of rules, over every rule and every case: op(x[idx]) == op(x)[idx]."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import CrossRow, Replicated, Rows, parts
from roo_rewrite.rules import law
from roo_rewrite.rules.registry import Case, Rule, case, registered
from tools import check_rules

BATCH = 7
ROWS = st.lists(st.integers(0, BATCH - 1), max_size=9)
EDGES = ([], [3], [0, 0, 6], [6, 5, 4, 3, 2, 1, 0], [2, 2, 5, 1])

# Ops that torch itself warns of, in some case or on some rows.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


OPS = sorted(op for op in registered() if find_spec("fbgemm_gpu") or not op.startswith("fbgemm."))


def _rows(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long)


def _edges(a_case: Case) -> list[torch.Tensor]:
    return [_rows(r) for r in EDGES if r or a_case.empty]


def violation(rule: Rule, a_case: Case, rows: torch.Tensor, batch: int = BATCH) -> str:
    """How the rule breaks the law on these rows of this case; the empty string where it does not."""
    trial = law.trial(rule.op, a_case, batch)
    try:
        batching = law.predict(rule, trial)
    except NotRowWise as e:
        return f"{rule.op} declines {a_case.shapes}: {e}"
    return law.broken(trial, batching, rows)


def test_every_rule_has_a_case() -> None:
    assert [op for op, rule in registered().items() if not rule.cases] == []


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS)
@example(rows=[])
@example(rows=[3])
@example(rows=[0, 0, 6, 5])
def test_gather_law(op: str, rows: list[int]) -> None:
    rule = registered()[op]
    for a_case in rule.cases:
        if not a_case.declines and (rows or a_case.empty):
            assert violation(rule, a_case, _rows(rows)) == ""


@pytest.mark.parametrize("op", [op for op in OPS if any(c.declines for c in registered()[op].cases)])
def test_a_rule_declines_only_what_breaks_the_law(op: str) -> None:
    rule = registered()[op]
    for a_case in rule.cases:
        if a_case.declines:
            trial = law.trial(op, a_case, BATCH)
            with pytest.raises(NotRowWise):
                law.predict(rule, trial)
            assert not all(law.row_wise(trial, _edges(a_case))), f"{op} declines {a_case.shapes} for nothing"


@pytest.mark.parametrize("op", OPS)
def test_the_trace_does_not_matter(op: str) -> None:
    rule = registered()[op]
    for a_case in rule.cases:
        if not a_case.declines:
            found = {law.predict(rule, law.trial(op, a_case, batch)) for batch in (BATCH, 11, 13)}
            assert len(found) == 1


def cubes(op: str, a_case: Case) -> Iterator[law.Trial]:
    """The case with every dim as long as the batch, and the batch in any dim of any of its tensors, or none."""
    shapes = [re.sub(r"\S+", str(BATCH), s.split(":")[-1]) for s in a_case.shapes]
    kinds = [s.rpartition(":")[0] for s in a_case.shapes]
    plain = law.trial(op, replace(a_case, shapes=tuple(f"{k}:{s}" for k, s in zip(kinds, shapes))), BATCH)
    places = [[Replicated(), *(Rows(dim) for dim in range(d.value.ndim))] for d in plain.drawn]
    for chosen in islice(product(*places), 1, 40):
        yield replace(plain, drawn=tuple(replace(d, batching=b) for d, b in zip(plain.drawn, chosen)))


@pytest.mark.parametrize("op", [op for op in OPS if not registered()[op].sizes and "empty" not in op])
def test_no_place_of_the_batch_fools_a_rule(op: str) -> None:
    rule = registered()[op]
    for a_case in {c.shapes: c for c in rule.cases}.values():
        if not a_case.shapes or {"#", "R"} & set("".join(a_case.shapes)) or set(a_case.shapes) & set(law.JAGGED):
            continue
        for trial in cubes(op, a_case):
            try:
                verdict = law.predict(rule, trial)
            except (NotRowWise, RuntimeError, IndexError, ValueError):
                continue
            for rows in ([3], [6, 5, 0, 0, 1, 2, 2, 4]):
                found = law.broken(trial, verdict, _rows(rows))
                assert not found or "cannot be run" in found


@pytest.mark.parametrize("op", OPS)
def test_constants_stay_constants(op: str) -> None:
    rule = registered()[op]
    for a_case in rule.cases:
        trial = law.trial(op, a_case, BATCH)
        if not a_case.declines and trial.drawn and all(type(d.batching) is Rows for d in trial.drawn):
            alike = tuple(replace(d, batching=Replicated()) for d in trial.drawn)
            constant = replace(trial, drawn=alike, build=lambda n, *tensors, build=a_case.call: build(int(n), *tensors))
            assert {p for p in parts(law.predict(rule, constant)) if not isinstance(p, CrossRow)} == {Replicated()}


def test_ops_of_public_models_have_a_rule_or_a_reason() -> None:
    names = check_rules.listed(Path(__file__).with_name("public_ops.txt"))
    assert len(names) > 100
    assert check_rules.uncovered(names) == []


def _wrong(op: str, answer: Rows | Replicated, *cases: Case) -> Rule:
    return Rule(op, lambda call: answer, cases)


@pytest.mark.parametrize(
    "rule",
    [
        _wrong("aten.softmax.int", Rows(0), case("B 3", call=lambda n, x: (x, 0))),
        _wrong("aten.t.default", Rows(0), case("B 3")),
        _wrong("aten.sum.default", Replicated(), case("B 3")),
        _wrong("aten.cumsum.default", Rows(0), case("B 3", call=lambda n, x: (x, 0))),
        _wrong("aten.view.default", Rows(1, inner=3), case("2 B 3", call=lambda n, x: (x, [2, n * 3][::-1]))),
        _wrong("aten.cat.default", Rows(0, inner=2), case("B 3", "B 3", call=lambda n, x, y: ([x, y], 0))),
        _wrong("aten.div.Scalar", Rows(0), case("B 3", call=lambda n, x: (x, int(n)))),
    ],
    ids=lambda rule: rule.op,
)
def test_a_wrong_rule_is_found(rule: Rule) -> None:
    assert any(violation(rule, rule.cases[0], rows) for rows in _edges(rule.cases[0]))


def test_a_needless_decline_is_found() -> None:
    trial = law.trial("aten.relu.default", case("B 3"))
    assert law.row_wise(trial, _edges(case())) == [[Rows(0)]]


def test_a_value_that_is_the_same_for_all_rows_is_replicated() -> None:
    trial = law.trial("aten.new_zeros.default", case("B 3", call=lambda n, x: (x, [4])))
    assert law.row_wise(trial, _edges(case())) == [[Replicated()]]
