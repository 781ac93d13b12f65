"""rows_seen: an extreme over the rows of requests that have impressions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.ops.extreme import rows_seen

OPS = {"max": True, "min": False, "any": True, "all": False}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(OPS)),
    st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any),
    st.integers(1, 2),
    st.integers(1, 2),
    st.data(),
)
def test_an_extreme_of_the_broadcast_rows(
    name: str, counts: list[int], outer: int, inner: int, data: st.DataObject
) -> None:
    size = outer * len(counts) * inner * 2
    drawn = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    x = torch.tensor(drawn).reshape(-1, 2)
    x = x > 0 if name in ("any", "all") else x
    number = torch.tensor(counts)
    wide = x.reshape(outer, len(counts), inner, 2).repeat_interleave(number, 1).reshape(-1, 2)
    op = getattr(torch, name)
    assert torch.equal(op(rows_seen(x, number, OPS[name], outer, inner)), op(wide))


@pytest.mark.parametrize("largest", [True, False])
def test_without_any_impressions_nothing_is_hidden(largest: bool) -> None:
    x = torch.tensor([2, 1])
    assert torch.equal(rows_seen(x, torch.tensor([0, 0]), largest), x)
