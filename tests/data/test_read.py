"""Readers against the log itself: every impression once, in batches that resume and shard."""

from __future__ import annotations

import itertools
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from roo_rewrite.data import ImpressionDataset, RequestDataset, to_requests
from roo_rewrite.data.table import read_manifest
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

COLUMNS = ["user", "hist", "item", "item_f", "item_tags"]
FILL = {"user": -1, "click": -1}


@pytest.fixture(scope="module")
def ids():
    return [i * 7 % 23 for i in range(90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_log, spec, ids):
    """A data set of many parts."""
    base = tmp_path_factory.mktemp("read")
    pa.parquet.write_table(small_log(ids), base / "log.parquet")
    to_requests(base / "log.parquet", base / "out", spec, "rid", user="user", memory=8000)
    assert len(read_manifest(base / "out").parts) > 3
    return base / "out"


def reader(folder, **options):
    return RequestDataset(folder, columns=COLUMNS, labels=["click"], fill=FILL, **{"max_impressions": 7, **options})


def seen(batches):
    return sorted(i for b in batches for i in b.kwargs["item"].tolist())


def test_every_value_comes_back(folder, small_log, ids):
    rows = small_log(ids).to_pylist()
    for batch in reader(folder):
        for r, (request, count) in enumerate(zip(batch.request_ids.tolist(), batch.num_impressions.tolist())):
            assert count == ids.count(request)
            one = batch[r]
            mine = [row for row in rows if row["rid"] == request]
            assert one.kwargs["user"].tolist() == [-1 if mine[0]["user"] is None else mine[0]["user"]]
            assert one.kwargs["hist"].tolist() == (mine[0]["hist"] or [])
            assert one.kwargs["hist_lengths"].tolist() == [len(mine[0]["hist"] or [])]
            assert one.kwargs["item"].tolist() == [m["item"] for m in mine]
            assert one.kwargs["item_tags_lengths"].tolist() == [len(m["item_tags"] or []) for m in mine]
            tags = [math.nan if t is None else t for m in mine for t in m["item_tags"] or []]
            assert repr(one.kwargs["item_tags"].tolist()) == repr(tags)
            assert one.labels["click"].tolist() == [-1 if m["click"] is None else m["click"] for m in mine]


@given(
    bound=st.integers(1, 30),
    shuffle=st.booleans(),
    world=st.integers(1, 3),
    seed=st.integers(0, 3),
    window=st.integers(1, 3),
)
@settings(deadline=None, max_examples=25)
def test_ranks_see_every_impression_once(folder, ids, bound, shuffle, world, seed, window):
    batches = []
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "shuffle": shuffle, "seed": seed, "window": window}
        batches += list(reader(folder, max_impressions=bound, **options))
    assert seen(batches) == list(range(len(ids)))
    for batch in batches:
        assert batch.total_impressions <= bound or len(batch) == 1
        assert batch.num_impressions.tolist() == [ids.count(r) for r in batch.request_ids.tolist()]


@given(stop=st.integers(0, 20), shuffle=st.booleans(), epoch=st.integers(0, 1))
@settings(deadline=None, max_examples=25)
def test_resuming_goes_on_where_it_stopped(folder, stop, shuffle, epoch):
    def fresh():
        made = reader(folder, shuffle=shuffle, window=2)
        made.set_epoch(epoch)
        return made

    expected = [b.kwargs["item"].tolist() for b in fresh()]
    first = fresh()
    head = [b.kwargs["item"].tolist() for b in itertools.islice(first, stop)]
    second = reader(folder, shuffle=shuffle, window=2)
    second.load_state_dict(first.state_dict())
    assert head + [b.kwargs["item"].tolist() for b in second] == (
        expected if stop <= len(expected) else head + expected
    )


def test_epochs_shuffle_differently(folder):
    data = reader(folder, shuffle=True)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append([b.request_ids.tolist() for b in data])
    assert orders[0] == orders[2] != orders[1]


def test_workers_share_the_row_groups_and_resume(folder, ids):
    data = reader(folder)
    whole = list(data.track(DataLoader(data, batch_size=None, num_workers=2)))
    assert seen(whole) == list(range(len(ids)))
    data.set_epoch(0)
    head = list(itertools.islice(data.track(DataLoader(data, batch_size=None, num_workers=2)), 3))
    again = reader(folder)
    again.load_state_dict(data.state_dict())
    assert seen(head + list(DataLoader(again, batch_size=None, num_workers=2))) == list(range(len(ids)))


def test_plain_numbers_are_not_copied(folder):
    batch = next(iter(reader(folder, max_impressions=10_000)))
    half = batch[: len(batch) // 2]
    assert half.kwargs["item_f"].untyped_storage().data_ptr() == batch.kwargs["item_f"].untyped_storage().data_ptr()


def test_impression_batches_for_unconverted_models(folder, small_log, ids):
    rows = small_log(ids).to_pylist()
    count = 0
    for batch in ImpressionDataset(reader(folder)):
        items = batch.kwargs["item"].tolist()
        count += len(items)
        mine = [rows[i] for i in items]
        assert batch.request_ids.tolist() == [m["rid"] for m in mine]
        assert batch.kwargs["user"].tolist() == [-1 if m["user"] is None else m["user"] for m in mine]
        assert batch.kwargs["hist_lengths"].tolist() == [len(m["hist"] or []) for m in mine]
        assert batch.kwargs["hist"].tolist() == [h for m in mine for h in m["hist"] or []]
        assert batch.labels["click"].shape == (len(items),)
    assert count == len(ids)


def test_a_call_arranges_the_columns(folder):
    data = reader(folder, call=lambda f: (({"u": f["user"], "deep": [f["item"], 3]},), {"f": f["item_f"]}))
    batch = next(iter(data))
    assert set(batch.args[0]) == {"u", "deep"}
    assert batch.args[0]["deep"][1] == 3
    part = batch[[0]]
    assert part.args[0]["u"].shape == (1,)
    assert part.kwargs["f"].shape == (int(part.num_impressions[0]),)
    with pytest.raises(DataError, match="made a new tensor"):
        next(iter(reader(folder, call=lambda f: {"x": f["item"] + 1})))


def test_only_request_columns(folder, ids):
    batches = list(RequestDataset(folder, columns=["hist"], max_requests=4))
    assert sum(b.total_impressions for b in batches) == len(ids)
    assert all(len(b) <= 4 for b in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["nope"]}, r"no columns \['nope'\]"),
        ({"columns": ["user_name"]}, "'user_name' is string"),
        ({"columns": ["user"]}, "say what they become"),
        ({"rank": 1}, "rank 1"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(DataError, match=message):
        list(RequestDataset(folder, max_requests=1, **options))


def test_string_ids(tmp_path):
    log = pa.table({"rid": ["b", "a", "b"], "user": [1.0, 2.0, 1.0], "item": ["x", "y", "z"]})
    pa.parquet.write_table(log, tmp_path / "log.parquet")
    to_requests(tmp_path / "log.parquet", tmp_path / "out", FeatureSpec(["user"], ["item"]), "rid")
    batch = next(iter(RequestDataset(tmp_path / "out", columns=["user"], impression_id="item", max_requests=9)))
    assert batch.request_ids == ("b", "a")
    assert batch.impression_ids == ("x", "z", "y")
    assert batch.kwargs["user"].dtype == torch.float64
    assert next(
        iter(ImpressionDataset(RequestDataset(tmp_path / "out", columns=["user"], max_requests=9)))
    ).request_ids == (
        "b",
        "b",
        "a",
    )
