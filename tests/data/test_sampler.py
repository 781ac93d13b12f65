"""RequestSampler: whole requests, within bounds, no loss or repeat, resumable."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data import RequestSampler
from roo_rewrite.errors import DataError

IDS = st.lists(st.integers(0, 9), max_size=40)
BOUND = st.integers(1, 12)


@given(IDS, BOUND, st.integers(1, 4), st.booleans(), st.integers(1, 8))
@settings(deadline=None, max_examples=80)
def test_ranks_cover_every_row_once_and_keep_requests_whole(ids, bound, world, shuffle, buffer):
    batches = []
    for rank in range(world):
        options = {"max_impressions": bound, "shuffle": shuffle, "buffer": buffer, "rank": rank, "world_size": world}
        sampler = RequestSampler(ids, **options)
        mine = list(sampler)
        assert len(sampler) == len(mine)
        batches += mine
    assert sorted(itertools.chain(*batches)) == list(range(len(ids)))
    homes = [{ids[i] for i in b} for b in batches]
    assert sum(len(h) for h in homes) == len(set(ids))
    for batch, home in zip(batches, homes):
        assert len(batch) <= bound or len(home) == 1


@given(IDS, BOUND)
@settings(deadline=None, max_examples=40)
def test_batches_are_as_full_as_the_bound_allows(ids, bound):
    batches = list(RequestSampler(ids, max_impressions=bound))
    for batch, following in zip(batches, batches[1:]):
        first = ids[following[0]]
        assert len(batch) + ids.count(first) > bound


@given(IDS, st.integers(0, 3), st.integers(0, 10), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_resuming_goes_on_where_it_stopped(ids, seed, stop, epoch):
    def fresh() -> RequestSampler:
        return RequestSampler(ids, max_requests=2, shuffle=True, buffer=4, seed=seed)

    whole = fresh()
    whole.set_epoch(epoch)
    expected = list(whole)
    first = fresh()
    first.set_epoch(epoch)
    head = list(itertools.islice(first, stop))
    second = fresh()
    second.load_state_dict(first.state_dict(batches=len(head)))
    assert head + list(second) == expected


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = RequestSampler(range(50), max_requests=1, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_bound_in_bytes():
    sampler = RequestSampler(["a", "b", "a", "c"], max_bytes=10, sizes=[3, 4, 3, 5])
    assert list(sampler) == [[0, 2, 1], [3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a bound"),
        ({"max_requests": 0}, "at least 1"),
        ({"max_requests": 1, "rank": 2, "world_size": 2}, r"rank 2 is not in 0\.\.1"),
        ({"max_requests": 1, "buffer": 0}, "buffer"),
        ({"max_bytes": 9}, "pass sizes"),
        ({"max_bytes": 9, "sizes": [1]}, "bytes of each"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        list(RequestSampler([1, 2], **options))


def test_a_state_of_other_data_is_refused():
    state = RequestSampler([1, 2], max_requests=1).state_dict()
    with pytest.raises(DataError, match="2 requests, the data has 1"):
        RequestSampler([1], max_requests=1).load_state_dict(state)
