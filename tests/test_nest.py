"""The one walk through a call of plain tensors finds what following each path finds, or declines."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from roo_rewrite.facts import Provenance
from roo_rewrite.nest import call_nests, gather, nest_of
from roo_rewrite.parameters import follow

LEAF = torch.ones(2)
TREES = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(
        st.just(LEAF),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("xyz"), inner, min_size=1, max_size=3),
        ),
        max_leaves=8,
    ),
    min_size=1,
)


def paths_of(tree: dict[str, Any]) -> list[Any]:
    keys = [k for k, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [tuple(("item", getattr(k, "key", getattr(k, "idx", None))) for k in path) for path in keys]


@settings(derandomize=True)
@given(TREES)
def test_one_walk_finds_what_the_paths_find(tree: dict[str, Any]) -> None:
    tree = pytree.tree_map(lambda _: torch.ones(2), tree)
    paths = paths_of(tree)
    nest, found = nest_of(paths), []
    assert nest is not None
    assert gather(dict(reversed(tree.items())), nest, found)
    assert all(a is b for a, b in zip(found, [follow(tree, p, "") for p in paths], strict=True))


@pytest.mark.parametrize(
    "call",
    [
        {"a": {"x": LEAF}, "b": [LEAF]},
        {"a": {"x": LEAF, "y": LEAF, "z": LEAF}, "b": [LEAF]},
        {"a": {"x": LEAF, "z": LEAF}, "b": [LEAF]},
        {"a": {"x": LEAF, "y": 1.0}, "b": [LEAF]},
        {"a": {"x": LEAF, "y": [LEAF]}, "b": [LEAF]},
        {"a": OrderedDict(x=LEAF, y=LEAF), "b": [LEAF]},
        {"a": {"x": LEAF, "y": LEAF}, "b": LEAF.unsqueeze(0)},
        {"a": {"x": LEAF, "y": LEAF}, "b": [LEAF], "c": None},
    ],
)
def test_another_nesting_is_left_to_the_paths(call: dict[str, Any]) -> None:
    nest = nest_of(paths_of({"a": {"x": LEAF, "y": LEAF}, "b": [LEAF]}))
    assert nest is not None
    assert not gather(call, nest, [])


def test_paths_through_attributes_have_no_nest() -> None:
    assert nest_of([(("item", "a"), ("item", "b")), (("item", "a"), ("attribute", "left"))]) is None


def test_packed_columns_are_a_pair_at_request_level() -> None:
    path, other = (("item", "x"),), (("item", "h"), ("item", 0))
    nests = call_nests([path, other], [True, False])
    assert nests[Provenance.IMPRESSION] is None, "their columns are to be told apart"
    user, item, rest = torch.ones(2), torch.ones(3), torch.ones(4)
    nest, found = nests[Provenance.REQUEST], []
    assert nest is not None
    assert gather({"x": (user, item), "h": [rest]}, nest, found)
    assert all(a is b for a, b in zip(found, (user, item, rest), strict=True))
    for pair in (user, (user,), (user, item, rest), (user, 1.0)):
        assert not gather({"x": pair, "h": [rest]}, nest, [])
    plain = call_nests([path], [False])
    assert plain == dict.fromkeys((Provenance.REQUEST, Provenance.IMPRESSION), nest_of([path]))
