"""Gradients of large tables are compared over the rows in use, as exactly as over all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite import closeness
from roo_rewrite.closeness import compact, distance, gradients_differ, together

ROWS, WIDTH = 30_000, 16
NAN, INF = float("nan"), float("inf")


def table(entries: dict[int, float], shape: tuple[int, ...] = (ROWS, WIDTH)) -> Tensor:
    made = torch.zeros(shape, dtype=torch.float64)
    for row, value in entries.items():
        made[row].view(-1)[row % made[row].numel()] = value
    return made


ENTRIES = st.dictionaries(st.integers(0, ROWS - 1), st.sampled_from([1.0, -2.5, 1e-12, -0.0, NAN, INF]), max_size=5)


@given(ENTRIES, ENTRIES, st.sampled_from([(ROWS, WIDTH), (ROWS * WIDTH,), (ROWS, 4, 4)]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_rows_in_use_are_judged_as_the_whole(one: dict[int, float], two: dict[int, float], shape: tuple) -> None:
    dense = table(one, shape), table({**one, **two}, shape)
    (a,), (b,) = together(*([compact(g)] for g in dense))
    assert a is not None
    assert b is not None
    assert len(a) == len(b) <= len({*one, *two})
    assert distance(a, b) == distance(*dense)
    assert a.nan_to_num(7.0, 8.0).sum() == dense[0].nan_to_num(7.0, 8.0).sum()


def test_a_full_a_small_and_a_missing_gradient_stay_as_they_are() -> None:
    full, small = torch.ones(ROWS, WIDTH), torch.zeros(3, 2)
    assert compact(full) is full
    assert compact(small) is small
    assert compact(None) is None
    (one, none), (two, other) = together([full, None], [compact(table({2: 1.0}).float()), small])
    assert one is full
    assert none is None
    assert other is small
    assert two is not None
    assert two.shape == full.shape


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (40, WIDTH)])
def test_a_sparse_gradient_is_one_of_rows(shape: tuple[int, int]) -> None:
    index = torch.tensor([[7, 3, 7]])
    sparse = torch.sparse_coo_tensor(index, torch.ones(3, shape[1]), shape, check_invariants=True)
    dense = sparse.to_dense()
    assert gradients_differ(["t"], [compact(sparse)], [compact(dense)], torch.float64) is None
    dense[5, 1] = 1e-3
    assert "'t'" in (gradients_differ(["t"], [compact(sparse)], [compact(dense)], torch.float64) or "")
    assert gradients_differ(["t"], [None], [compact(dense)], torch.float64) is not None
    assert gradients_differ(["t"], [None], [compact(0 * dense)], torch.float64) is None


class Tables(nn.Module):
    """Adds 0 with a gradient to one row of a large table. `leak`: that row."""

    def __init__(self, leak: int | None = None, sparse: bool = False) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, WIDTH, sparse=sparse), nn.Embedding(50, WIDTH)
        self.leak = leak

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        out = (self.user(u) * self.item(x)).sum(1)
        if self.leak is None:
            return out
        extra = 1e-3 * self.user.weight[self.leak, 3]
        return out + (extra - extra.detach())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("leak", [None, 5, ROWS - 1])
def test_one_wrong_row_of_a_large_table_is_found(
    leak: int | None, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = Tables(sparse=sparse), Tables(leak)
    wrong.load_state_dict(right.state_dict())
    args = torch.arange(7), torch.arange(7)  # row 5 is read, the last row never
    rewritten = roo.rewrite(wrong, args, spec=roo.FeatureSpec(request=["u"], impression=["x"]))
    largest = []

    def seen(*runs: closeness.Gradients) -> list[list[Tensor | None]]:
        made = together(*runs)
        largest.extend(g.numel() for run in made for g in run if g is not None)
        return made

    monkeypatch.setattr(closeness, "together", seen)
    if leak is None:
        roo.verify(right, rewritten, batches=8)
    else:
        with pytest.raises(roo.EquivalenceError, match=r"gradient of 'user\.weight' is off"):
            roo.verify(right, rewritten, batches=8)
    assert max(largest) < ROWS


def test_where_the_original_has_no_gradient_none_is_asked() -> None:
    """A softmax of nothing but minus infinity, made 0 after: nothing is trained by it."""
    want, got = torch.tensor([NAN, 1.0, INF]), torch.tensor([0.5, 1.0, NAN])
    assert gradients_differ(["t"], [got], [want], torch.float64) is None
    assert gradients_differ(["t"], [want], [got], torch.float64) is not None
    assert gradients_differ(["t"], [got + 1], [want], torch.float64) is not None
