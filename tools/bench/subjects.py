"""What the benchmarks run: a model by name, in every form there is of it."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

import fixtures
import roo_rewrite
from fixtures import Call, Fixture, deepctr
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import bind_inputs

EVERY = (*fixtures.NAMES, *(f"deepctr:{n}" for n in deepctr.NAMES))


def load(name: str) -> Fixture:
    """A fixture by name, or a DeepCTR-Torch model as `deepctr:NAME`."""
    return deepctr.load(name.removeprefix("deepctr:")) if name.startswith("deepctr:") else fixtures.load(name)


def expanded(fixture: Fixture, call: Call, counts: Tensor) -> Call:
    """The impression-level call of a request-level one."""
    args, kwargs = fixture.example()
    inputs = bind_inputs(fixture.model.forward, args, kwargs, fixture.spec)
    atoms = inputs.flatten(*call, Provenance.REQUEST)[0]
    wide = inputs.select(atoms, torch.repeat_interleave(counts), [Provenance.REQUEST])
    return inputs.unflatten(wide, Provenance.IMPRESSION)


def variants(fixture: Fixture, fanout: int, rewritten: bool) -> tuple[dict[str, nn.Module], float | None]:
    """Every form of the model there is, and the seconds its rewriting took. Each has parameters of its own."""
    forms: dict[str, nn.Module] = {"original": fixture.model}
    seconds = None
    if rewritten:
        args, kwargs = fixture.example()
        start = time.perf_counter()
        model = copy.deepcopy(fixture.model)
        forms["rewritten"] = roo_rewrite.rewrite(model, args, kwargs, spec=fixture.spec, fanout=fanout)
        seconds = time.perf_counter() - start
    if fixture.twin is not None:
        forms["twin"] = fixture.twin(copy.deepcopy(fixture.model))
    return forms, seconds
