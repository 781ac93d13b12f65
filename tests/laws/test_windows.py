"""conv(cat[E a, c], W)  =  cat[E conv(a, W), conv(cat[b, c], W)]        b: entries of a that windows over c reach"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side
from torch import Tensor

# PyTorch's word on an even window with uneven zeros.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zeros around": {"padding": 2},
    "same": {"padding": "same"},
    "by two": {"stride": 2, "padding": 1},
    "with gaps": {"dilation": 2, "padding": "same"},
}


@few
@given(fields(1, 5), st.sampled_from(sorted(OPTIONS)), st.integers(1, 4))
def test_windows_across_the_fields(law: Any, drawn: dict[str, int], name: str, reach: int) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        h = F.pad(side_by_side(inputs, names, 2), (3, 4))
        return F.conv1d(h, m.w, m.b, **OPTIONS[name]).tanh().flatten(1)

    law(Model(run, w=parameter(3, 2, reach), b=parameter(3)), **{f: (2, n) for f, n in drawn.items()})


@pytest.mark.parametrize(
    ("name", "per_request"), [("plain", 5), ("zeros around", 7), ("same", 6), ("by two", 3), ("with gaps", 5)]
)
def test_windows_over_the_request_run_once_per_request(law: Any, name: str, per_request: int) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1).unsqueeze(1)
        return F.conv2d(h, m.w.unsqueeze(-1), m.b, **OPTIONS[name]).flatten(1).sum(1)

    found = law(Model(run, w=parameter(3, 1, 3), b=parameter(3)), u=(7, 4), x=(4, 4))
    assert any(f"conv: {per_request} of" in c for c in found.took()), found.took()


def test_request_entries_between_those_of_the_impression_are_reached_as_they_are(law: Any) -> None:
    def run(m: Model, u0: Tensor, u1: Tensor, x: Tensor) -> Tensor:
        return F.conv1d(torch.cat([u0, x, u1], 2), m.w).amax(2)

    found = law(Model(run, w=parameter(3, 2, 3)), u0=(2, 5), u1=(2, 4), x=(2, 1))
    assert found.flops() == (2 * 12 * 3 * 8 * 6, 2 * (3 * 5 + 12 * 3) * 3 * 6)


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return F.conv1d(torch.cat([u, x], 2), m.w, m.b, padding="same").tanh().mean(2)

    law(Model(run, w=parameter(4, 3, 4), b=parameter(4)), u=(3, 9), x=(3, 5)).precise()


@pytest.mark.parametrize("case", ["no window over the request alone", "uneven zeros along another dim"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 2)
        if case == "uneven zeros along another dim":
            return F.conv2d(h.unsqueeze(1), m.w[:, :1].unsqueeze(2).expand(-1, -1, 2, -1), padding="same").flatten(1)
        return F.conv1d(h, m.w).flatten(1)

    found = law(Model(run, w=parameter(3, 2, 3)), u=(2, 2), x=(2, 4))
    assert not any("conv" in c for c in found.took())
