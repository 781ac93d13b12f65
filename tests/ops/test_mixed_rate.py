"""jagged_einsum against einsum on gathered operands, in every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.ops.mixed_rate import Layout, jagged_apply, jagged_einsum, jagged_layout

SHAPES = {
    "bqd,bkd->bqk": ((2, 3), (4, 3)),
    "bd,bkd->bk": ((3,), (4, 3)),
    "bqk,bkd->bqd": ((2, 4), (4, 3)),
    "bd,bd->b": ((3,), (3,)),
    "bk,bkd->bdk": ((4,), (4, 3)),
    "bhqd,bhkd->bhqk": ((2, 1, 3), (2, 4, 3)),
}


def check(equation: str, counts: list[int]) -> Layout:
    first, second = SHAPES[equation]
    number = torch.tensor(counts, dtype=torch.long)
    rows = torch.repeat_interleave(number)
    x = torch.randn(len(rows), *first, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(counts), *second, dtype=torch.float64, requires_grad=True)
    layout = jagged_layout(number, rows)
    got = jagged_einsum(equation, x, y, layout)
    want = torch.einsum(equation, x, y[rows])
    torch.testing.assert_close(got, want)
    weights = torch.rand_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), (x, y)), torch.autograd.grad((want * weights).sum(), (x, y))
    ):
        torch.testing.assert_close(a, b)
    return layout


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 17, 40]), max_size=8))
def test_equals_einsum_on_gathered_rows(equation: str, counts: list[int]) -> None:
    check(equation, counts)


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("counts", [[3, 3], [3, 4, 0], [], [0]])
def test_applied_in_place_of_a_broadcast_whatever_the_strides(op: str, counts: list[int]) -> None:
    number = torch.tensor(counts, dtype=torch.long)
    rows = torch.repeat_interleave(number)
    x, y = torch.randn(3, 2, len(rows)).permute(2, 1, 0), torch.randn(len(counts), 1, 3)
    layout, expected = jagged_layout(number, rows), getattr(torch, op)(x, y[rows])
    torch.testing.assert_close(jagged_apply(op, x, y, layout), expected)


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        ([3, 3, 3], "even"),
        ([5], "even"),
        ([1, 1], "even"),
        ([3, 4, 2], "padded"),
        ([2, 0, 2], "padded"),
        ([100, 1, 1, 0, 2, 3], "buckets"),
        ([0, 0, 0, 9], "buckets"),
        ([], "gather"),
        ([0, 0], "gather"),
    ],
)
def test_the_layout_follows_the_counts(counts: list[int], kind: str) -> None:
    layout = check("bqd,bkd->bqk", counts)
    found = (
        "even"
        if layout.even
        else "gather"
        if not layout.buckets
        else "buckets"
        if layout.order is not None
        else "padded"
    )
    assert found == kind


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_padding_never_more_than_doubles_the_work(counts: list[int]) -> None:
    number = torch.tensor(counts)
    layout = jagged_layout(number, torch.repeat_interleave(number))
    assert sum(len(b.gather) for b in layout.buckets) <= 2 * sum(counts)


def test_two_impressions_never_meet() -> None:
    """A row that is not finite stays alone, padding included."""
    number = torch.tensor([3, 0, 1])
    x, y = torch.ones(4, 2), torch.ones(3, 5, 2)
    x[0] = float("nan")
    got = jagged_einsum("bd,bkd->bk", x, y, jagged_layout(number, torch.repeat_interleave(number)))
    assert bool(got[0].isnan().all())
    assert bool(got[1:].isfinite().all())


def test_a_wrong_equation_is_an_error() -> None:
    number = torch.tensor([2, 2])
    with pytest.raises(RuntimeError):
        jagged_einsum(
            "bd,bke->bkq", torch.ones(4, 2), torch.ones(2, 5, 2), jagged_layout(number, torch.tensor([0, 0, 1, 1]))
        )
