"""Filters on requests: exact rows, fewer row groups; and batches bounded by bytes."""

from __future__ import annotations

import datetime
import operator
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data import RequestDataset, read, to_requests
from roo_rewrite.data.prune import request_filter
from roo_rewrite.data.sizes import request_bytes
from roo_rewrite.data.store import Writing, part_meta, read_group
from roo_rewrite.data.table import read_manifest
from roo_rewrite.errors import DataError

COLUMNS = ["hist", "item", "item_tags"]


@pytest.fixture(scope="module")
def ids():
    return [i * 7 % 23 for i in range(90)]


@pytest.fixture(scope="module")
def by_user(tmp_path_factory, small_log, spec, ids):
    """A data set of many parts, requests by user."""
    base = tmp_path_factory.mktemp("user")
    pq.write_table(small_log(ids), base / "log.parquet")
    to_requests(base / "log.parquet", base / "out", spec, "rid", user="user", time="time", memory=2000)
    return base / "out"


@pytest.fixture(scope="module")
def by_time(tmp_path_factory, small_log, spec, ids):
    """A data set of many parts, requests by time, which in this log is by id too."""
    base = tmp_path_factory.mktemp("time")
    pq.write_table(small_log(ids), base / "log.parquet")
    to_requests(base / "log.parquet", base / "out", spec, "rid", time="time", memory=2000)
    return base / "out"


@pytest.fixture
def read_groups(monkeypatch):
    """How many row groups were read."""
    seen = []

    def counted(*args):
        seen.append(args[2])
        return read_group(*args)

    monkeypatch.setattr(read, "read_group", counted)
    return seen


def ids_read(folder, filters=None, **options):
    options = {"max_requests": 4, **options}
    return [
        r for b in RequestDataset(folder, columns=COLUMNS, filters=filters, **options) for r in b.request_ids.tolist()
    ]


MOMENT = datetime.datetime(1970, 1, 1, 0, 0, 0, 5000)


@pytest.mark.parametrize(
    ("order", "filters", "expected"),
    [
        ("by_user", [("user", "=", 1)], lambda r: r % 3 == 1),
        ("by_user", pc.field("user").isin([1]), lambda r: r % 3 == 1),
        ("by_user", pc.is_null(pc.field("user")), lambda r: r == 3),
        ("by_time", [("rid", "in", [4, 5])], lambda r: r in (4, 5)),
        ("by_time", [("time", "<", MOMENT)], lambda r: r < 5),
        ("by_time", [[("time", "<", MOMENT)], [("rid", "=", 20)]], lambda r: r < 5 or r == 20),
        ("by_time", (pc.field("rid") > 18) & (pc.field("user") == 2), lambda r: r > 18 and r % 3 == 2),
        ("by_time", pc.list_value_length(pc.field("hist")) == 3, lambda r: r % 4 == 3 and r % 7 != 6),
        ("by_time", pc.field("rid") == 99, lambda r: False),
    ],
)
def test_statistics_prune(request, read_groups, order, filters, expected):
    folder = request.getfixturevalue(order)
    groups = sum(part_meta(str(folder / p.path)).row_groups for p in read_manifest(folder).parts)
    assert groups > 9
    assert sorted(ids_read(folder, filters)) == [r for r in range(23) if expected(r)]
    if "hist" in str(filters):
        assert len(read_groups) == groups
    else:
        assert len(read_groups) <= groups // 2 + 1


VALUES = {
    "rid": [0, 3, 7, 22, 30],
    "user": [0, 1, 5],
    "user_name": ["", "u1", "u22"],
    "user_x": [0.0, -0.0, 1.0, float("nan")],
    "time": [datetime.datetime(1970, 1, 1, 0, 0, 0, us) for us in (0, 3000, 9000)],
}
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


def expressions():
    """Comparisons, null tests and memberships, joined and negated."""
    leaf = st.one_of(
        [
            st.builds(lambda op, v, n=n: op(pc.field(n), v), st.sampled_from(COMPARISONS), st.sampled_from(values))
            for n, values in VALUES.items()
        ]
        + [st.builds(lambda n: pc.is_null(pc.field(n)), st.sampled_from(list(VALUES)))]
        + [st.builds(lambda v: pc.field("rid").isin(v), st.lists(st.integers(0, 25), min_size=1, max_size=3))]
    )
    joined = lambda inner: st.builds(  # noqa: E731
        lambda op, a, b: op(a, b), st.sampled_from([operator.and_, operator.or_]), inner, inner
    )
    return st.recursive(leaf, lambda inner: joined(inner) | st.builds(operator.invert, inner), max_leaves=4)


@pytest.fixture(scope="module")
def with_floats(tmp_path_factory, small_log, spec, ids):
    """A data set with a float column of few values and NaN, a row group a request or two; and its requests."""
    base = tmp_path_factory.mktemp("floats")
    x = [float("nan") if r % 5 == 0 else None if r % 5 == 1 else -0.0 if r % 5 == 2 else 1.0 for r in ids]
    table = small_log(ids).append_column("user_x", pa.array(x))
    pq.write_table(table, base / "log.parquet")
    to_requests(base / "log.parquet", base / "out", spec, "rid", user="user_name", memory=4000)
    first = [ids.index(r) for r in set(ids)]
    return base / "out", table.take(pa.array(first))


@given(expressions())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_a_filter_keeps_what_it_keeps_of_the_log(with_floats, expression):
    folder, requests = with_floats
    assert sorted(ids_read(folder, expression)) == sorted(requests.filter(expression)["rid"].to_pylist())


def test_every_ordered_type_prunes(tmp_path, spec, read_groups):
    kinds = {
        "user_u64": pa.array([1, 2**63 + 5, None, 2**64 - 1], pa.uint64()),
        "user_text": pa.array(["a", "bé", None, "z" * 200]),
        "user_date": pa.array([1, 20_000, None, 30_000], pa.date32()),
        "user_s": pa.array([1, 20_000, None, 30_000], pa.timestamp("s", "UTC")),
        "user_ns": pa.array([1, 20_001, None, 2**62 + 1], pa.timestamp("ns")),
        "user_dict": pa.array(["a", "b", None, "z"]).dictionary_encode(),
        "user.dot": pa.array([1, 2, None, 3], pa.int8()),
    }
    table = pa.table({"rid": [0, 1, 2, 3], "item": [0] * 4, "time": [0] * 4, **kinds})
    pq.write_table(table, tmp_path / "log.parquet")
    to_requests(tmp_path / "log.parquet", tmp_path / "out", spec, "rid", memory=100)
    options = {"columns": ["item"], "max_requests": 9}
    for name, column in kinds.items():
        value = pc.scalar(column.cast(column.type.value_type)[3] if name == "user_dict" else column[3])
        for expression, wanted in [
            (pc.field(name) == value, [3]),
            (pc.field(name) < value, [0, 1]),
            (pc.is_null(pc.field(name)), [2]),
        ]:
            read_groups.clear()
            data = RequestDataset(tmp_path / "out", filters=expression, **options)
            assert [r for b in data for r in b.request_ids.tolist()] == wanted
            assert len(read_groups) == len(wanted) or name == "user.dot"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([("click", "=", 1)], r"filters choose requests, and \['click'\] are impression columns"),
        (pc.field("nope") > 1, "filters do not fit: No match for FieldRef.Name.nope.*request columns are rid"),
        (pc.field(0) > 1, "name their columns"),
        (pc.field("rid"), "filters do not fit"),
        ([("rid", "~", 1)], "filters do not fit"),
        ([("user_name", "=", 1)], "filters do not fit"),
        ("rid = 1", "filters do not fit"),
    ],
)
def test_bad_filters(by_user, filters, message):
    with pytest.raises(DataError, match=message):
        RequestDataset(by_user, filters=filters, max_requests=1)


def test_a_filter_names_its_columns(by_user):
    columns = read_manifest(by_user).columns
    both = (pc.field("rid") > 1) | pc.is_null(pc.field("user_name"))
    assert request_filter(both, columns).names == ("rid", "user_name")


def test_filters_with_shuffle_ranks_and_resuming(by_user):
    def made(rank=0, world=1):
        filters = [("user", "in", [0, 2])]
        options = {"columns": COLUMNS, "filters": filters, "shuffle": True, "window": 2, "max_impressions": 9}
        return RequestDataset(by_user, rank=rank, world_size=world, **options)

    wanted = sorted(r for r in range(23) if r % 3 != 1 and r != 3)
    both = [r for rank in (0, 1) for b in made(rank, 2) for r in b.request_ids.tolist()]
    assert sorted(both) == wanted
    first, second = made(), made()
    batches = iter(first)
    head = [r for _ in range(3) for r in next(batches).request_ids.tolist()]
    second.load_state_dict(first.state_dict())
    assert sorted(head + [r for b in second for r in b.request_ids.tolist()]) == wanted
    with pytest.raises(DataError, match="with the filters it was taken with"):
        RequestDataset(by_user, max_requests=1).load_state_dict(first.state_dict())


def bytes_of(batch):
    """The tensors a call, its labels and its weights hold."""
    tensors = [*batch.kwargs.values(), *(batch.labels or {}).values(), *(batch.weights or {}).values()]
    return sum(t.element_size() * t.numel() for t in tensors)


@given(
    ids=st.lists(st.integers(0, 8), min_size=1, max_size=30),
    bound=st.integers(1, 600),
    shuffle=st.booleans(),
    aligned=st.booleans(),
)
@settings(deadline=None, max_examples=12, derandomize=True)
def test_batches_bounded_by_bytes(small_log, spec, ids, bound, shuffle, aligned):
    table = small_log(ids)
    table = table.append_column("item_more", table["item_tags"])
    with tempfile.TemporaryDirectory() as base:
        pq.write_table(table, Path(base) / "log.parquet")
        to_requests(Path(base) / "log.parquet", Path(base) / "out", spec, "rid", writing=Writing(1, "default"))
        data = RequestDataset(
            Path(base) / "out",
            columns=["time", "hist", "item_tags", "item_more"],
            labels=["item_f"],
            weights=["item"],
            aligned={"item_more": "item_tags"} if aligned else {},
            max_bytes=bound,
            shuffle=shuffle,
        )
        batches = list(data)
    assert sorted(i for b in batches for i in b.weights["item"].tolist()) == list(range(len(ids)))
    for batch in batches:
        sizes = request_bytes(batch)
        assert sizes.tolist() == [bytes_of(batch[r]) for r in range(len(batch))]
        assert bytes_of(batch) == int(sizes.sum())
        assert bytes_of(batch) <= bound or len(batch) == 1
    if not shuffle:
        for a, b in zip(batches, batches[1:]):
            assert bytes_of(a) + int(request_bytes(b)[0]) > bound


def test_bytes_of_no_requests(by_user):
    batch = next(iter(RequestDataset(by_user, columns=COLUMNS, max_requests=2)))
    assert torch.equal(request_bytes(batch[0:0]), torch.zeros(0, dtype=torch.int64))
