"""The minimum cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fixtures
import roo_rewrite as roo
from fixtures import deepctr
from passes.annotate import Policy, annotate
from passes.partition import partition


@pytest.mark.parametrize("fanout", [1, 2.5, 10, 64])
def test_every_request_input_runs_per_request_whatever_the_prices(fanout: float) -> None:
    f = deepctr.load("IFM")
    args, kwargs = f.example(rows=8)
    model = roo.rewrite(f.model, args, kwargs, spec=f.spec, fanout=fanout, check=True)
    plan = model._whole_program().plan
    inputs = [n for n in plan.request if n.op == "placeholder"]
    assert len(inputs) == sum(a.provenance is roo.facts.Provenance.REQUEST for a in model._inputs.atoms)


def test_a_larger_fanout_moves_no_less() -> None:
    f = fixtures.load_small("late_stage")
    args, kwargs = f.example(rows=8)
    moved = []
    for fanout in (1, 4, 64):
        model = roo.rewrite(f.model, args, kwargs, spec=f.spec, fanout=fanout, split="never")
        moved.append(len(model._whole_program().plan.request))
    assert moved == sorted(moved)
    assert moved[0] < moved[-1]


def test_a_model_of_one_side_has_nothing_to_cut() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    rewritten = roo.rewrite(model, (torch.randn(5, 3),), spec=roo.FeatureSpec(impression=["input"]))
    assert not rewritten._whole_program().plan.request
    assert str(rewritten._whole_program().plan) == "per request: nothing\ncrossing: nothing"


def test_a_plan_names_what_runs_per_request_and_what_crosses(captured: Callable[..., Any]) -> None:
    trace, inputs = captured(lambda m, u, x: u.exp() + x)
    annotate(trace, inputs, trace.model, Policy())
    assert str(partition(trace, 10.0)) == "per request: atoms_0, exp\ncrossing: exp"
