"""group, RequestBatch and the collate function, against a plain Python oracle."""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

import roo_rewrite
from roo_rewrite.data import DemotedFeature, RequestBatch, RequestCollate, RequestSampler, concat, group
from roo_rewrite.errors import DataError, InputError, SpecError
from roo_rewrite.features import FeatureSpec

SPEC = FeatureSpec(
    request=["user", "hist", "hist_len"],
    impression=["item", "tags", "tag_off"],
    columns={"x": {"request": [(0, 1), (2, 3)]}},
    jagged={"hist": "hist_len", "tags": "tag_off"},
)


def make(ids: list[int]) -> dict[str, torch.Tensor]:
    """An impression-level call whose request features are functions of the request id."""
    rows = torch.arange(len(ids))
    hist = [[float(r) + j for j in range(abs(r) % 3)] for r in ids]
    tags = [[i] * (i % 2) for i in range(len(ids))]
    user = torch.tensor(ids, dtype=torch.float64).reshape(-1, 1)
    item = torch.stack([rows, rows * 2], 1).double()
    offsets = torch.tensor([0, *[len(t) for t in tags]]).cumsum(0)
    return {
        "user": user,
        "hist": torch.tensor([v for h in hist for v in h], dtype=torch.float32),
        "hist_len": torch.tensor([len(h) for h in hist], dtype=torch.int32),
        "item": item,
        "tags": torch.tensor([v for t in tags for v in t], dtype=torch.long),
        "tag_off": offsets,
        "x": torch.cat([user, item[:, :1], user + 1], 1),
    }


def oracle(ids: list[int]) -> tuple[list[int], list[list[int]]]:
    """Requests in the order of their first row, and the rows of each."""
    requests: list[int] = []
    for r in ids:
        if r not in requests:
            requests.append(r)
    return requests, [[i for i, v in enumerate(ids) if v == r] for r in requests]


IDS = st.lists(st.integers(-3, 4), min_size=1, max_size=14)


@given(IDS)
@settings(deadline=None, max_examples=60)
def test_group_matches_the_oracle(ids):
    call = make(ids)
    batch = group(call, torch.tensor(ids), SPEC, labels={"y": torch.arange(len(ids))})
    requests, rows = oracle(ids)
    order = [i for r in rows for i in r]
    assert batch.request_ids.tolist() == requests
    assert batch.num_impressions.tolist() == [len(r) for r in rows]
    assert batch.kwargs["user"].tolist() == [[float(r)] for r in requests]
    assert batch.kwargs["hist_len"].tolist() == [abs(r) % 3 for r in requests]
    assert batch.kwargs["hist"].tolist() == [float(r) + j for r in requests for j in range(abs(r) % 3)]
    assert batch.kwargs["item"].tolist() == [[float(i), 2.0 * i] for i in order]
    assert batch.kwargs["tags"].tolist() == [i for i in order for _ in range(i % 2)]
    assert batch.kwargs["x"][0].tolist() == [[float(r), float(r) + 1] for r in requests]
    assert batch.kwargs["x"][1].tolist() == [[float(i)] for i in order]
    assert batch.labels["y"].tolist() == order
    assert batch.restore(batch.labels["y"]).tolist() == list(range(len(ids)))


@given(IDS)
@settings(deadline=None, max_examples=40)
def test_expanding_a_batch_gives_the_impressions_back(ids):
    call = make(ids)
    batch = group(call, ids, SPEC)
    _, kwargs = batch.to_impressions()
    again = group(kwargs, batch.request_ids[batch.request_rows], SPEC)
    same(again.kwargs, batch.kwargs)
    for name in ("user", "item", "x", "hist_len"):
        assert torch.equal(batch.restore(kwargs[name]), call[name])


@given(IDS, st.data())
@settings(deadline=None, max_examples=40)
def test_slices_concatenate_to_the_whole(ids, data):
    batch = group(make(ids), ids, SPEC, labels=torch.arange(len(ids)))
    cut = data.draw(st.integers(0, len(batch)))
    parts = [batch[:cut], batch[cut:]]
    assert sum(len(p) for p in parts) == len(batch)
    whole = concat(parts)
    same(whole.kwargs, batch.kwargs)
    assert torch.equal(whole.labels, batch.labels)
    assert torch.equal(whole.num_impressions, batch.num_impressions)
    assert torch.equal(whole.request_ids, batch.request_ids)


def same(a, b):
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype


def test_picking_requests_by_list_mask_and_position():
    batch = group(make([5, 6, 5, 7]), ["a", "b", "a", "c"], SPEC)
    assert batch[[2, 0]].request_ids == ("c", "a")
    assert batch[torch.tensor([True, False, True])].num_impressions.tolist() == [2, 1]
    assert batch[-1].request_ids == ("c",)
    assert batch[::-1].request_ids == ("c", "b", "a")
    assert batch[[0, 2]].restore(torch.tensor([10, 12, 30])).tolist() == [10, 12, 30]
    assert batch[[2, 0]].restore(torch.tensor([30, 10, 12])).tolist() == [10, 12, 30]
    with pytest.raises(IndexError, match="request 3 of a batch of 3"):
        batch[3]
    with pytest.raises(InputError, match="mask"):
        batch[torch.tensor([True])]


def test_no_rows_and_requests_without_impressions():
    empty = group({"user": torch.zeros(0, 1), "item": torch.zeros(0, 2)}, [], FeatureSpec(["user"], ["item"]))
    assert len(empty) == 0
    assert empty.total_impressions == 0
    batch = group({"user": torch.zeros(2, 1), "item": torch.ones(2, 2)}, [1, 2], FeatureSpec(["user"], ["item"]))
    kwargs = {**batch.kwargs, "item": torch.zeros(0, 2)}
    none = RequestBatch((), kwargs, torch.tensor([0, 0]), batch.layout, request_ids=torch.tensor([8, 9]))
    assert concat([none, batch]).num_impressions.tolist() == [0, 0, 1, 1]
    assert none[1:].num_impressions.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("user", lambda c: c["user"].__setitem__(2, 9.0)),
        ("user", lambda c: c["user"].__setitem__(0, -0.0)),
        ("hist", lambda c: c["hist"].__setitem__(0, 9.0)),
        ("x", lambda c: c["x"].__setitem__((2, 2), 9.0)),
    ],
)
def test_a_conflict_names_feature_request_and_both_values(name, edit):
    ids = [1, 0, 1, 0] if name != "user" else [0, 1, 0, 1]
    call = make(ids)
    edit(call)
    with pytest.raises(DataError, match=rf"'{name}' of request [01]: .* in row 0, .* in row 2"):
        group(call, ids, SPEC)


def test_nan_is_constant():
    call = {"user": torch.full((2, 1), float("nan")), "item": torch.zeros(2, 1)}
    assert len(group(call, [1, 1], FeatureSpec(["user"], ["item"]))) == 1


def test_first_last_and_demote():
    ids, call = [4, 4], make([4, 4])
    call["user"][1] = 7.0
    call["x"][1, 2] = 8.0
    assert group(call, ids, SPEC, on_conflict="first").kwargs["user"].tolist() == [[4.0]]
    assert group(call, ids, SPEC, on_conflict="last").kwargs["user"].tolist() == [[7.0]]
    with pytest.warns(DemotedFeature, match="user, x"):
        batch = group(call, ids, SPEC, on_conflict="demote")
    assert batch.kwargs["user"].tolist() == [[4.0], [7.0]]
    assert batch.kwargs["hist_len"].tolist() == [1]
    assert [list(p.shape) for p in batch.kwargs["x"]] == [[1, 1], [2, 2]]
    assert "user" in batch.spec.impression
    with pytest.raises(DataError, match="on_conflict must be one of"):
        group(call, ids, SPEC, on_conflict="newest")


@pytest.mark.parametrize("half", ["hist", "hist_len"])
def test_demoting_a_jagged_pair_moves_both_halves(half):
    call = make([1, 1])
    if half == "hist":
        call["hist"][1] = 9.0
    else:
        call["hist_len"] = torch.tensor([2, 0], dtype=torch.int32)
    with pytest.warns(DemotedFeature, match="hist, hist_len"):
        batch = group(call, [1, 1], SPEC, on_conflict="demote")
    assert batch.kwargs["hist_len"].shape == (2,)
    assert torch.equal(batch.kwargs["hist"], call["hist"])


def test_forms_of_a_call():
    spec = FeatureSpec(["user"], ["item"])
    user, item = torch.zeros(2, 1), torch.ones(2, 1)
    by_mapping = group(({"user": user, "item": item},), [1, 1], spec)
    assert by_mapping.args[0]["user"].shape == (1, 1)
    both = group(((user,), {"item": item}), [1, 1], FeatureSpec(["args.0"], ["item"]))
    assert both.args[0].shape == (1, 1)
    one = group(item, [1, 1], FeatureSpec(columns={"args.0": {"impression": [(0, 1)]}}))
    assert [list(p.shape) for p in one.args[0]] == [[1, 0], [2, 1]]

    class Model(torch.nn.Module):
        def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
            return user + item

    assert group([user, item], [1, 1], spec, model=Model()).args[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, None], "row 1 is missing"),
        (["a", 1], "all integers or all strings"),
        (torch.tensor([1.0, 2.0]), "must be integers"),
        ([1.0, float("nan")], "row 1 is missing"),
        ([1], "there are 1 request ids"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(DataError, match=message):
        group({"user": torch.zeros(2, 1)}, ids, FeatureSpec(["user"]))


def test_a_spec_that_does_not_fit():
    with pytest.raises(SpecError, match="not assigned"):
        group({"user": torch.zeros(2, 1), "item": torch.zeros(2)}, [1, 1], FeatureSpec(["user"]))


def test_keyed_jagged_tensors_become_pairs():
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor")
    kjt = sparse.KeyedJaggedTensor(
        keys=["u", "i"],
        values=torch.tensor([1, 2, 1, 2, 5, 6, 7, 8]),
        lengths=torch.tensor([2, 2, 0, 1, 2, 1]),
    )
    batch = group({"f": kjt}, [3, 3, 4], FeatureSpec(["u"], ["i"]))
    user, item = batch.kwargs["f"]
    assert user.keys() == ["u"]
    assert user.lengths().tolist() == [2, 0]
    assert item.values().tolist() == [5, 6, 7, 8]
    assert concat([batch[:1], batch[1:]]).kwargs["f"][0].values().tolist() == [1, 2]
    assert batch.to("cpu").kwargs["f"][1].lengths().tolist() == [1, 2, 1]
    with pytest.raises(DataError, match=r"'f\.u' of request 3: .* row 0, .* row 2"):
        group({"f": kjt}, [3, 4, 3], FeatureSpec(["u"], ["i"]))


def test_a_batch_is_a_pytree():
    batch = group(make([1, 2, 1]), ["p", "q", "p"], SPEC, labels=torch.arange(3.0), weights=torch.ones(3))
    leaves, tree = pytree.tree_flatten(batch)
    assert all(v is None or isinstance(v, torch.Tensor) for v in leaves)
    back = pytree.tree_unflatten(leaves, tree)
    same(back.kwargs, batch.kwargs)
    assert back.request_ids == ("p", "q")
    other = group(make([4, 5, 5]), ["r", "s", "s"], SPEC, labels=torch.arange(3.0), weights=torch.ones(3))
    assert pytree.tree_structure(other) == tree
    doubled = pytree.tree_map(lambda v: None if v is None else v * 2, batch)
    assert doubled.labels.tolist() == [0.0, 4.0, 2.0]


class Scorer(torch.nn.Module):
    """Takes a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, batch: RequestBatch) -> torch.Tensor:
        item = self.linear(batch.kwargs["item"].float())[:, 0]
        rows = torch.repeat_interleave(batch.num_impressions, output_size=item.shape[0])
        return item + batch.kwargs["user"].float()[:, 0].index_select(0, rows)


def test_a_batch_goes_through_export():
    spec = FeatureSpec(["user"], ["item"])
    call = {"user": torch.rand(3, 1)[[0, 1, 0]], "item": torch.rand(3, 2)}
    batch = group(call, [1, 2, 1], spec)
    program = torch.export.export(Scorer(), (batch,), strict=False)
    scorer = Scorer()
    scorer.load_state_dict(program.state_dict)
    assert torch.equal(program.module()(batch), scorer(batch))


def test_a_batch_goes_through_ddp(tmp_path):
    """In a process of its own, which says where it stands if it does not end: gloo's threads outlive a test."""
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "store")]
    root = str(Path(roo_rewrite.__file__).parent.parent)
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert ended.returncode == 0, ended.stderr


def through_ddp(store):
    faulthandler.dump_traceback_later(200, exit=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    scorer = Scorer()
    wrapped = torch.nn.parallel.DistributedDataParallel(scorer)
    batch = group({"user": torch.zeros(2, 1), "item": torch.rand(2, 2)}, [1, 1], FeatureSpec(["user"], ["item"]))
    wrapped(batch).sum().backward()
    torch.distributed.destroy_process_group()
    assert scorer.linear.weight.grad is not None


def test_restore_is_differentiable_and_checks_rows():
    batch = group({"user": torch.zeros(3, 1), "item": torch.zeros(3)}, [2, 1, 2], FeatureSpec(["user"], ["item"]))
    scores = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    restored = batch.restore({"s": scores})["s"]
    assert restored.tolist() == [1.0, 2.0, 3.0]
    (restored * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert scores.grad.tolist() == [1.0, 100.0, 10.0]
    with pytest.raises(InputError, match="3 impressions"):
        batch.restore(torch.zeros(2))


def test_concat_refuses_what_does_not_match():
    a = group({"user": torch.zeros(1), "item": torch.zeros(1)}, [1], FeatureSpec(["user"], ["item"]))
    b = group({"user": torch.zeros(1), "thing": torch.zeros(1)}, [1], FeatureSpec(["user"], ["thing"]))
    c = group({"user": torch.zeros(1), "item": torch.zeros(1)}, ["x"], FeatureSpec(["user"], ["item"]))
    with pytest.raises(DataError, match="at least one"):
        concat([])
    with pytest.raises(DataError, match="different features"):
        concat([a, b])
    d = group({"user": torch.zeros(1), "item": torch.zeros(1)}, [1], a.spec, labels=torch.zeros(1))
    with pytest.raises(DataError, match="request_ids"):
        concat([a, c])
    with pytest.raises(DataError, match="labels"):
        concat([a, d])


class Log(torch.utils.data.Dataset):
    """Thirty impressions of ten interleaved requests, as an impression-level data set serves them."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> dict[str, object]:
        r = i % 10
        return {"rid": r, "user": float(r), "hist": torch.arange(r % 4), "item": float(i), "click": i % 2}


def test_an_impression_data_set_feeds_request_batches():
    spec = FeatureSpec(["user", "hist", "hist_len"], ["item"], jagged={"hist": "hist_len"})
    collate = RequestCollate(spec, "rid", labels=["click"])
    pickle.loads(pickle.dumps(collate))
    sampler = RequestSampler([i % 10 for i in range(30)], max_impressions=7)
    batches = list(DataLoader(Log(), batch_sampler=sampler, collate_fn=collate))
    assert [b.num_impressions.tolist() for b in batches] == [[3, 3]] * 5
    assert torch.cat([b.request_ids for b in batches]).tolist() == list(range(10))
    assert batches[1].kwargs["hist_len"].tolist() == [2, 3]
    assert batches[1].kwargs["hist"].tolist() == [0, 1, 0, 1, 2]
    assert all((b.labels["click"] == b.kwargs["item"] % 2).all() for b in batches)


def test_collate_names_what_is_missing():
    collate = RequestCollate(FeatureSpec(["user"], ["item"]), "request", labels=["y"])
    with pytest.raises(DataError, match=r"no \['request', 'y'\]"):
        collate([{"user": 1.0, "item": 2.0}])
    with pytest.raises(DataError, match="must be mappings"):
        collate([torch.zeros(2)])


if __name__ == "__main__":
    through_ddp(sys.argv[1])
