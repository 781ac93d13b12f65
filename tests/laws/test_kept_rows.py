"""`kept_rows(E x, E m) == E kept_rows(x, m)`, and `f(x[m])` put back is `where(m, f(kept_rows(x, m)), out)`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roo_rewrite.ops.kept import FewRowsError, kept_rows, kept_source

counted = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=6)


def drawn(rows: list[tuple[bool, int]]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.arange(3.0 * len(rows), dtype=torch.float64).reshape(-1, 3)
    return x, torch.tensor([k for k, _ in rows], dtype=torch.bool), torch.tensor([n for _, n in rows], dtype=torch.long)


@settings(derandomize=True, deadline=None)
@given(counted)
def test_kept_rows_commute_with_the_broadcast(rows: list[tuple[bool, int]]) -> None:
    x, mask, counts = drawn(rows)
    wide, wide_mask = x.repeat_interleave(counts, 0), mask.repeat_interleave(counts)
    if int(wide_mask.sum()) < 2 <= len(wide):
        with pytest.raises(FewRowsError):
            kept_source(mask, counts)
        with pytest.raises(FewRowsError):
            kept_source(wide_mask)
        return
    if not wide_mask.any():
        return
    right = x[kept_source(mask, counts)].repeat_interleave(counts, 0)
    assert torch.equal(wide[kept_source(wide_mask)], right)
    assert torch.equal(kept_rows(wide, wide_mask), right)


@settings(derandomize=True, deadline=None)
@given(counted)
def test_rows_put_back_are_those_of_the_kept_alone(rows: list[tuple[bool, int]]) -> None:
    x, mask, _ = drawn(rows)
    given = x.requires_grad_()

    def f(t: Tensor) -> Tensor:
        return (t.log1p() / t).cumsum(1)  # infinite and not a number in a row that is never kept, below

    out = torch.full_like(x, 7.0)
    expected = out.detach().clone()
    expected[mask] = f(given[mask])
    found = torch.where(mask[:, None], f(kept_rows(given, mask)), out) if mask.any() else out + 0 * given
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    if mask.any() and not mask[0]:  # row 0 holds the 0 that f cannot take
        (want,), (got,) = (torch.autograd.grad(y.sum(), given) for y in (expected, found))
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


def test_no_rows_and_none_kept() -> None:
    x = torch.ones(3, 2)
    assert kept_rows(x[:0], torch.zeros(0, dtype=torch.bool)).shape == (0, 2)
    assert torch.equal(kept_rows(x, torch.zeros(3, dtype=torch.bool)), x)
    with pytest.raises(FewRowsError):
        kept_source(torch.tensor([False, True, False]))
