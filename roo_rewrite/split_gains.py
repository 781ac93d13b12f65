"""What each split gains, measured: the model's program against one where that split alone is decided the other way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from roo_rewrite.module import RequestModel

Times = Callable[[RequestModel, RequestModel], tuple[float, float]]


def measure(model: RequestModel, times: Times, most: int) -> int:
    """Measures up to `most` splits of the present mode, those of the largest predicted difference first.

    times: the time of each of two models, taken in turn. The gains are in `model.report` after; a split that was left
    is measured by taking it. Returns how many were measured. Each costs a build of the model.
    """
    program = model._whole_program()
    chosen = sorted({c.key: c for c in program.candidates}.values(), key=lambda c: -abs(c.before - c.after))[:most]
    gains: dict[Any, float] = {}
    for candidate in chosen:
        other = _otherwise(model, candidate.key)
        mine, others = times(model, other)
        gains[candidate.key] = others / mine if candidate.taken else mine / others
    program.candidates = tuple(replace(c, measured=gains.get(c.key, c.measured)) for c in program.candidates)
    return len(gains)


def _otherwise(model: RequestModel, key: tuple[str, str]) -> RequestModel:
    """The same model with one split decided the other way."""
    build: Any = model._build
    build = replace(build, options=replace(build.options, otherwise=frozenset({key})))
    example, statics = model._example
    made = RequestModel(model._original, model._inputs, example, statics, build, model._settings)
    made._whole_program()
    return made
