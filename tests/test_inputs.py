"""The calling convention: a call into atoms and back."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs, bind_inputs

REQUEST, IMPRESSION = Provenance.REQUEST, Provenance.IMPRESSION


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Features:
    user: Tensor
    item: Tensor


class Model(nn.Module):
    def forward(self, a: Any, b: Any = None, *rest: Any, c: Any = None, **more: Any) -> Any:
        return a


def bind(
    args: tuple[Any, ...], kwargs: dict[str, Any], request: list[str], impression: list[str], **how: Any
) -> Inputs:
    return bind_inputs(Model().forward, args, kwargs, roo.FeatureSpec(request, impression, **how))


def rows(n: int, width: int = 2) -> Tensor:
    return torch.arange(n * width, dtype=torch.float64).reshape(n, width)


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((rows(3), rows(3)), {}, ["a", "b"]),
        ((rows(3),), {"c": rows(3), "z": rows(3)}, ["a", "c", "z"]),
        ((rows(3), 5, rows(3), rows(3)), {}, ["a", "rest.0", "rest.1"]),
        (({"x": [rows(3), {"y": rows(3)}]},), {}, ["a.x.0", "a.x.1.y"]),
        ((Pair(rows(3), rows(3)),), {}, ["a.left", "a.right"]),
        ((Features(rows(3), rows(3)),), {"b": None}, ["a.user", "a.item"]),
        (((rows(3), None, "word", 2.5),), {}, ["a.0"]),
    ],
)
def test_names_are_paths_and_the_way_back_is_the_call(args: Any, kwargs: Any, names: list[str]) -> None:
    inputs = bind(args, kwargs, names[:1], names[1:])
    assert [a.name for a in inputs.atoms] == names
    atoms, statics = inputs.flatten(args, kwargs, IMPRESSION)
    again, named = inputs.unflatten(atoms, IMPRESSION, statics)
    assert inputs.flatten(again, named, IMPRESSION)[1] == statics
    assert type(again[0]) is type(args[0])


@given(st.lists(st.integers(0, 2), max_size=6))
def test_select_gathers_dense_and_jagged_rows_alike(picks: list[int]) -> None:
    values, lengths = torch.arange(6.0), torch.tensor([2, 0, 4])
    inputs = bind((rows(3),), {"b": values, "c": lengths}, ["b", "c"], ["a"], jagged={"b": "c"})
    dense, chosen, number = inputs.select(
        [rows(3), values, lengths], torch.tensor(picks, dtype=torch.long), (REQUEST, IMPRESSION)
    )
    parts = [values[:2], values[2:2], values[2:]]
    assert dense.tolist() == [rows(3)[p].tolist() for p in picks]
    assert number.tolist() == [len(parts[p]) for p in picks]
    assert chosen.tolist() == [v for p in picks for v in parts[p].tolist()]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3)), max_size=3))
def test_packed_columns_come_apart_and_together(pieces: list[tuple[int, int]]) -> None:
    ranges, end = [], 0
    for start, width in sorted(pieces):
        if start >= end and start + width <= 8:
            ranges.append((start, start + width))
            end = start + width
    if not ranges:
        return
    x = rows(3, 8)
    inputs = bind((x,), {}, [], [], columns={"a": {"request": ranges}})
    atoms, _ = inputs.flatten((x,), {}, IMPRESSION)
    wanted = [c for a, b in ranges for c in range(a, b)]
    assert torch.equal(atoms[0], x[:, wanted])
    assert torch.equal(inputs.unflatten(atoms, IMPRESSION)[0][0], x)
    pair = (atoms[0][:1], atoms[1])
    back, _ = inputs.flatten((pair,), {}, REQUEST)
    assert [len(t) for t in back] == [1, 3]


def test_one_side_alone() -> None:
    inputs = bind((rows(3), rows(3)), {"c": rows(3)}, ["a", "c"], ["b"])
    assert len(inputs.flatten_side((rows(2),), {"c": rows(2)}, REQUEST)) == 2
    assert len(inputs.flatten_side((rows(5),), {}, IMPRESSION)) == 1


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((rows(3),), {}, "lacks input 'b'"),
        ((rows(3), 4), {}, "'b' must be a tensor"),
        ((rows(3), rows(3)), {"c": 1}, "not in the example"),
        ((rows(3), rows(3)), {"a": rows(3)}, "given twice"),
    ],
)
def test_a_call_that_is_not_like_the_example(args: Any, kwargs: Any, message: str) -> None:
    inputs = bind((rows(3), rows(3)), {}, ["a"], ["b"])
    with pytest.raises(roo.InputError, match=message):
        inputs.flatten(args, kwargs, REQUEST)


@pytest.mark.parametrize(
    ("request_", "impression", "message"),
    [
        (["a"], [], "'b' is not assigned"),
        (["a", "b"], ["b"], "'b' is assigned to both"),
        (["a", "zz"], ["b"], "'zz' names no input"),
    ],
)
def test_a_spec_that_does_not_fit(request_: Any, impression: list[str], message: str) -> None:
    with pytest.raises(roo.SpecError, match=message):
        bind((rows(3), rows(3)), {}, request_, impression)


def test_a_parameter_named_num_impressions_is_refused() -> None:
    class Taken(nn.Module):
        def forward(self, u: Tensor, num_impressions: Tensor) -> Tensor:
            return u

    with pytest.raises(roo.SpecError, match="num_impressions of its own"):
        roo.rewrite(Taken(), (rows(3), rows(3)), spec=roo.FeatureSpec(["*"], []))


def test_inputs_pickle_without_a_warning() -> None:
    inputs = bind(({"x": rows(3)},), {"b": 4}, ["a.x"], [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pickle.loads(pickle.dumps(inputs))
    assert again.tree == inputs.tree
    assert again.atoms == inputs.atoms
