"""The fixtures, split: in low precision no further from a float64 truth than twice the original; and at fan-out 1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixtures
import roo_rewrite as roo
from roo_rewrite.facts import Provenance

COUNTS = torch.tensor([17, 0, 9, 30, 1, 8])


def cast(call: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, call)


def outputs(out: Any) -> list[Tensor]:
    return [t.double() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def expanded(model: Any, call: Any) -> Any:
    """A request-level call at impression level."""
    args, kwargs = call
    atoms, statics = model._inputs.flatten(args, kwargs, Provenance.REQUEST)
    rows = [r for r, n in enumerate(COUNTS.tolist()) for _ in range(n)]
    every = model._inputs.select(atoms, torch.tensor(rows), (Provenance.REQUEST,))
    return model._inputs.unflatten(every, Provenance.IMPRESSION, statics)


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Root mean square over all outputs, each by its own scale."""
    parts = [((a - b) / b.abs().max().clamp_min(1e-6)).flatten() for a, b in zip(got, truth, strict=True)]
    return float(torch.cat(parts).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", fixtures.NAMES)
def test_error_is_at_most_twice_the_originals(name: str, dtype: torch.dtype) -> None:
    fixture = fixtures.load_small(name)
    original: nn.Module = fixture.model.eval().to(dtype)
    truth = copy.deepcopy(original).double()
    args, kwargs = cast(fixture.example(rows=8), dtype)
    model = roo.rewrite(original, args, kwargs, spec=fixture.spec, fanout=16, split="always")
    own, found = [], []
    with torch.no_grad():
        for seed in range(4):
            call = cast(fixture.batch(COUNTS, seed=seed), dtype)
            many, named = expanded(model, call)
            wide, keywords = cast((many, named), torch.float64)
            want = outputs(truth(*wide, **keywords))
            own.append(error(outputs(original(*many, **named)), want))
            found.append(error(outputs(model(*call[0], num_impressions=COUNTS, **call[1])), want))
    assert model._whole_program().emitted is not None
    assert sum(found) <= 2 * sum(own) + 1e-9
