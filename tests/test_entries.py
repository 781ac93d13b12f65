"""The functions emitted code calls run the very overloads that the graph names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import roo_rewrite as roo
from roo_rewrite.emit import function
from roo_rewrite.entries import ENTRIES, with_entries
from roo_rewrite.rules.law import trial
from roo_rewrite.rules.registry import Extent, registered

aten = torch.ops.aten


class Ran(TorchDispatchMode):
    """Notes the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def ran(function: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Tensor]]:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    torch.manual_seed(0)
    with Ran() as mode:
        made = function(*args, **kwargs)
    return mode.ops, pytree.tree_leaves(made)


@pytest.mark.parametrize("op", sorted(ENTRIES, key=str), ids=str)
def test_an_entry_runs_its_overload(op: Any) -> None:
    name = str(op).replace("_.", ".")
    tried = 0
    for case in registered()[name].cases:
        args, kwargs = pytree.tree_map_only(Extent, int, trial(name, case).arguments())
        if op is aten.add_.Tensor:  # the other operand must fit
            args = args[:1] * 2
        if isinstance(args[0], (Tensor, list)):
            want, got = ran(op, args, kwargs), ran(ENTRIES[op], args, kwargs)
            assert want[0] == got[0]
            assert all(torch.equal(a, b) for a, b in zip(want[1], got[1], strict=True))
            tried += 1
    assert tried


@given(st.tuples(st.integers(0, 2), st.none() | st.integers(-7, 7), st.none() | st.integers(-7, 9), st.integers(1, 2)))
@settings(derandomize=True)
def test_a_slice_is_narrowed_where_its_place_is_known(where: tuple[Any, ...]) -> None:
    x = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    graph.output((graph.call_function(aten.slice.Tensor, (node, *where)),))
    run, source = function(graph)
    assert torch.equal(run(None, x)[0], aten.slice.Tensor(x, *where))
    dim, start, end, step = where
    inside = 0 <= (start or 0) <= (x.shape[dim] if end is None else end) <= x.shape[dim]
    assert ("narrow" in source) == (inside and step == 1)
    assert "slice" in str(graph), "the graph itself stays ATen"


def test_sizes_and_rows_of_counts() -> None:
    graph = torch.fx.Graph()
    counts = graph.placeholder("counts")
    rows = graph.call_function(aten.sym_size.int, (counts, 0))
    ids = graph.call_function(aten.repeat_interleave.Tensor, (counts,), {"output_size": 3})
    graph.output((rows, ids))
    run, source = function(graph)
    assert [v.tolist() if isinstance(v, Tensor) else v for v in run(None, torch.tensor([2, 0, 1]))] == [3, [0, 0, 2]]
    assert "aten" not in source


def test_a_number_for_a_tensor_keeps_the_overload() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("n")
    node.meta["val"] = 2
    graph.output((graph.call_function(aten.mul.Tensor, (node, 3)),))
    assert [n.target for n in with_entries(graph).nodes][1] is aten.mul.Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(4, 6), nn.Linear(4, 6)
        self.norm, self.table = nn.LayerNorm(12), nn.Embedding(5, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        joined = torch.cat([self.user(self.table(u)), self.item(x) + x.sum(1, keepdim=True)], 1)
        h = self.norm(joined)[:, 1:7]
        return torch.relu(self.item(x) * h + h.exp() + self.item(x)).mean(1)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_called_compiles_whole(training: bool) -> None:
    torch.manual_seed(0)
    model = Net().train(training)
    made = roo.rewrite(
        model, (torch.arange(5), torch.randn(5, 4)), spec=roo.FeatureSpec(request=["u"], impression=["x"]), check=True
    )
    assert "torch.ops.aten.linear" not in made.code
    assert "Tensor_addcmul_" in made.code
    u, x, counts = torch.arange(3), torch.randn(6, 4), torch.tensor([2, 0, 4])
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, x, num_impressions=counts), made(u, x, num_impressions=counts))
