"""Every model of DeepCTR-Torch is rewritten and verified: named inputs and the packed matrix, eval and train."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepctr_torch")
deepctr = pytest.importorskip("fixtures.deepctr")

SIZES = {"user_sparse": 3, "item_sparse": 2, "user_dense": 2, "item_dense": 1, "vocab": 30, "dim": 4}


def load(name: str, packed: bool) -> Any:
    return deepctr.load(name, packed=packed, **SIZES, **({"steps": 5} if name in deepctr.HISTORY else {}))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("packed", [False, True], ids=["named", "packed"])
@pytest.mark.parametrize("name", deepctr.NAMES)
def test_is_rewritten_and_verified(name: str, packed: bool, training: bool, rewritten_and_verified: Any) -> None:
    fixture = load(name, packed)
    fixture.model.train(training)
    args, kwargs = fixture.example(rows=6)
    model = rewritten_and_verified(fixture.model, args, kwargs, spec=fixture.spec, batches=8)
    program = model._whole_program()
    assert program.plan.request
    assert not program.captured.leaves
