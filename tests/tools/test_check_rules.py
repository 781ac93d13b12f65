"""The checker of rules finds rules that are wrong or missing, and nothing else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils import _pytree as pytree

from roo_rewrite.facts import Batching, Rows
from roo_rewrite.rules.registry import Rule, find
from tools import check_rules
from tools.check_rules import Finding, check, isolated, main, overload, placements, trials, uncovered


def trials_of(op: torch._ops.OpOverload, *args: object) -> list[check_rules.law.Trial]:
    leaves, tree = pytree.tree_flatten((args, {}))
    return list(trials(op, leaves, tree, limit=20))


def finding(rule: Rule | None, op: torch._ops.OpOverload, *args: object, reason: str = "") -> Finding:
    found = Finding()
    for trial in trials_of(op, *args):
        check(rule, trial, found, reason)
    return found


X = torch.arange(15, dtype=torch.float64).reshape(5, 3) % 7


def test_a_right_rule_is_confirmed() -> None:
    found = finding(find("aten.softmax.int"), torch.ops.aten.softmax.int, X, 1)
    assert found.held
    assert not found.wrong
    assert not found.missing


def test_a_wrong_rule_is_found() -> None:
    def over_the_batch(call: object) -> Batching:
        return Rows(0)

    wrong = Rule("aten.softmax.int", over_the_batch, ())
    assert finding(wrong, torch.ops.aten.softmax.int, X, 0).wrong


def test_a_missing_rule_is_found() -> None:
    assert finding(None, torch.ops.aten.relu.default, X).missing


def test_an_op_with_a_reason_is_not_missing() -> None:
    found = finding(None, torch.ops.aten.relu.default, X, reason="never")
    assert not found.missing
    assert set(found.declined) == {"never"}


def test_an_op_that_mixes_rows_is_not_missing() -> None:
    assert finding(None, torch.ops.aten.cumsum.default, X[:, :1] + 1, 0).missing == []


def test_an_op_that_crashes_is_named() -> None:
    def crash() -> Finding:
        os.kill(os.getpid(), signal.SIGKILL)
        return Finding()

    assert isolated(crash).crashed


def test_an_error_in_a_child_stays_there() -> None:
    def fail() -> Finding:
        raise ValueError("in the child")

    assert isolated(fail).crashed


def test_work_in_a_child_comes_back() -> None:
    assert isolated(lambda: Finding(held=3)).held == 3


def test_the_batch_is_tried_in_every_dim() -> None:
    both = [[str(w) for w in where if w is not None] for where in placements([X, X.T.contiguous()], limit=20)]
    assert ["Rows(0)", "Rows(1)"] in both
    assert ["Rows(0)", "Rows(0)"] not in both


def test_overloads_are_resolved_as_torch_does() -> None:
    assert overload("softmax", (X, 1), {}) is torch.ops.aten.softmax.int
    assert overload("relu_", (X,), {}) is None
    assert overload("no_such_op", (X,), {}) is None


def test_uncovered_ops_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "ops.txt"
    path.write_text(" 3  aten.add_.Tensor\n 2  aten.__and__.Tensor\n 1  aten.nonesuch.default\n 9  <built-in add>\n")
    assert uncovered(check_rules.listed(path)) == ["aten.nonesuch.default"]


def test_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("expecttest")
    result = CliRunner().invoke(main, ["--only", "log_softmax", "--per-op", "3", "--json"])
    assert result.exit_code == 0, result.output
    ops = json.loads(result.output)["ops"]
    assert ops["aten.log_softmax.int"]["held"] > 0
    assert ops["aten.log_softmax.int"]["wrong"] == []
