"""Histories stored once: exact for any lists, and short for growing windows."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data import history

INTS = st.lists(st.one_of(st.none(), st.integers(0, 2)), max_size=6)
FLOATS = st.lists(st.one_of(st.none(), st.sampled_from([0.0, -0.0, float("nan"), 1.5])), max_size=6)
NAMES = st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "bb"])), max_size=6)


@given(
    kind_and_rows=st.one_of(
        st.tuples(st.just(pa.list_(pa.int16())), st.lists(st.one_of(st.none(), INTS), max_size=12)),
        st.tuples(st.just(pa.list_(pa.float32())), st.lists(st.one_of(st.none(), FLOATS), max_size=12)),
        st.tuples(st.just(pa.large_list(pa.string())), st.lists(st.one_of(st.none(), NAMES), max_size=12)),
    ),
    newest_first=st.booleans(),
    skip=st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_any_lists_come_back(kind_and_rows, newest_first, skip):
    kind, rows = kind_and_rows
    lists = pa.array(rows, kind).slice(skip)
    new, length = history.encode(lists, newest_first)
    back = history.decode(new, length, kind, newest_first)
    assert back.type == kind
    assert repr(back.to_pylist()) == repr(lists.to_pylist())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=10), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_moving_window_stores_each_event_once(steps, newest_first):
    first, last, rows = 0, 20, [list(range(20))]
    for drop, grow in steps:
        first, last = first + drop, last + grow
        rows.append(list(range(first, last)))
    lists = pa.array([r[::-1] for r in rows] if newest_first else rows)
    new, _ = history.encode(lists, newest_first)
    assert len(new.flatten()) == last
    assert history.saving(lists, newest_first) == sum(map(len, rows)) - last


def test_lists_that_share_nothing_cost_nothing():
    rows = [[1, 2], [3, 4], [], [4, 3]]
    new, length = history.encode(pa.array(rows), False)
    assert new.to_pylist() == rows
    assert length.to_pylist() == [2, 2, 0, 2]


def test_an_overlap_the_sums_invent_is_caught(monkeypatch):
    monkeypatch.setattr(history, "_mixed", lambda codes: codes * 0)
    rows = pa.array([[1, 2, 3], [7, 8, 9]])
    new, length = history.encode(rows, False)
    assert history.decode(new, length, rows.type, False).to_pylist() == rows.to_pylist()
    assert new.to_pylist() == rows.to_pylist()


@pytest.mark.parametrize(
    ("kind", "can"),
    [
        (pa.list_(pa.int64()), True),
        (pa.large_list(pa.string()), True),
        (pa.list_(pa.timestamp("us")), True),
        (pa.list_(pa.list_(pa.int8())), False),
        (pa.list_(pa.struct([("a", pa.int8())])), False),
        (pa.int64(), False),
    ],
)
def test_what_can_be_encoded(kind, can):
    assert history.can_encode(kind) is can
