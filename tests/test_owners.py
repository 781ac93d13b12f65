"""Parameters are read from modules that were looked up before: the same ones, each anew, in fewer steps."""

from __future__ import annotations

import re
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph

from roo_rewrite.emit import function
from roo_rewrite.owners import share_owners

NAMES = ("a", "b", "0")
PATHS = st.lists(st.lists(st.sampled_from(NAMES), min_size=0, max_size=3).map(tuple), min_size=1, max_size=8)


def tree(depth: int, start: int = 0) -> nn.Module:
    made = nn.Module()
    made.register_parameter("w", nn.Parameter(torch.tensor(float(start))))
    for at, name in enumerate(NAMES if depth else ()):
        made.add_module(name, tree(depth - 1, start * 4 + at + 1))
    return made


def reading(paths: list[str]) -> Graph:
    graph = Graph()
    graph.output(tuple(graph.get_attr(path) for path in paths))
    return graph


def steps(source: str) -> int:
    body = "".join(line for line in source.splitlines(True) if "return" not in line)
    return len(re.findall(r"\.\w+|getattr\(", body))


@given(PATHS)
@settings(derandomize=True)
def test_the_same_parameters_are_read(paths: list[tuple[str, ...]]) -> None:
    model = tree(3)
    names = [".".join((*path, "w")) for path in paths]
    run, source = function(reading(names))
    assert all(got is model.get_parameter(name) for got, name in zip(run(model), names, strict=True))
    plain = sum(len(path) + 1 for path in paths)
    assert steps(source) <= plain
    if len(set(paths)) < len(paths) and any(paths.count(p) > 1 and len(p) > 0 for p in paths):
        assert steps(source) < plain


def test_a_module_read_from_once_is_not_kept() -> None:
    graph = reading(["a.b.w", "b.w"])
    before = str(graph)
    share_owners(graph)
    assert str(graph) == before


def test_a_replaced_module_and_a_new_parameter_are_seen() -> None:
    model: Any = tree(2)
    run, _ = function(reading(["a.b.w", "a.a.w", "a.b.w"]))
    model.a.b = tree(0, 70)
    model.a.a.w = nn.Parameter(torch.tensor(9.0))
    assert [v.item() for v in run(model)] == [70.0, 9.0, 70.0]


def test_a_parameter_is_read_anew_after_a_leaf_has_replaced_it() -> None:
    class Replaces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            model.a.w = nn.Parameter(x + 1)
            return x

    model: Any = tree(1)
    model.leaf = Replaces()
    graph = Graph()
    before = graph.get_attr("a.w")
    graph.call_module("leaf", (before,))
    graph.output((before, graph.get_attr("a.w")))
    first, second = function(graph)[0](model)
    assert second.item() == first.item() + 1
