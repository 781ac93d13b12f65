"""Entries written into a value along a static dim: what is written and what is left stay parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side, widths
from torch import Tensor

ALONG = {
    "one entry": (slice(1, 2), lambda t: t.exp()),
    "an entry by its number": (1, lambda t: t.exp()),
    "the last": (-1, lambda t: t * 2),
    "a range": (slice(0, 2), lambda t: t.tanh()),
    "every other": (slice(1, None, 2), lambda t: -t),
    "all": (slice(None), lambda t: t.sin()),
    "none": (slice(3, 3), lambda t: t),
}


@few
@given(fields(2, 3), st.sampled_from(sorted(ALONG)), st.booleans())
def test_each_entry_keeps_its_side(law: Any, drawn: dict[str, int], name: str, fresh: bool) -> None:
    """Entries made of those that were there, one by one, or of zeros."""
    names, (at, f) = list(drawn), ALONG[name]
    early, late = widths(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        given = side_by_side(inputs, names)
        x = torch.zeros_like(given) if fresh else given.clone()
        if fresh:
            for i in range(given.shape[1]):
                x[:, i] = given[:, i]
        x[:, at] = f(x[:, at])
        x[:][:, at] += 1
        return F.linear(x, m.w)

    found = law(Model(run, w=parameter(6, early + late)), **{n: (w,) for n, w in drawn.items()})
    assert found.flops()[1] <= 2 * 6 * (3 * early + 12 * late)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_request_s_value_written_beside_an_impression_s(law: Any, dim: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = x.clone()
        h.select(dim, 2).copy_(u)
        return F.linear(h if dim == 2 else h.transpose(1, 2), m.w)

    found = law(Model(run, w=parameter(6, 4)), u=(4,), x=(4, 4))
    assert found.flops()[1] == 2 * 6 * 4 * (3 * 1 + 12 * 3)


def test_declines_what_is_written_over_the_batch(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        h[1:] = h[1:] * 2
        return F.linear(h, m.w)

    found = law(Model(run, w=parameter(6, 4)), u=(2,), x=(2,))
    assert found.flops()[0] == found.flops()[1]
