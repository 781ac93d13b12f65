"""Models stay at their bounds: no more FLOPs than the scalar bound's, nor than the hand-written twin's."""

from __future__ import annotations

import pytest

from tools.bench.flops import measure

NAMES = ("WDL", "PNN", "MLR", "IFM", "DCN", "AFM", "AFN")


@pytest.mark.parametrize("name", [*(f"deepctr:{n}" for n in NAMES), "xdeepfm", "late_stage"])
def test_flops_left_are_those_of_the_bound_or_the_twin(name: str) -> None:
    row = measure(name, fanout=16, requests=8, rewritten=True)
    assert row.rewritten is not None
    assert row.rewritten < 1
    assert not row.verdict, row
