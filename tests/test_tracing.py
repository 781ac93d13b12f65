"""tracing: what a trace has no way to say is said in ops it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import roo_rewrite as roo
from roo_rewrite.tracing import Traceable, as_written


def instead(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with Traceable():
        return function(*args, **named)


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_entries_taken_along_a_dim_are_those_torch_takes(data: st.DataObject) -> None:
    dim = data.draw(st.integers(-3, 2))
    sizes = [(n, data.draw(st.sampled_from([n, 1])), data.draw(st.sampled_from([n, 1]))) for n in (2, 3, 4)]
    first, second = [a for _, a, _ in sizes], [b for _, _, b in sizes]
    second[dim] = data.draw(st.integers(0, 5))
    x = torch.randn(first, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(first[dim], second)
    expected, found = torch.take_along_dim(x, indices, dim), instead(torch.take_along_dim, x, indices, dim)
    assert torch.equal(found, expected)
    assert torch.equal(instead(Tensor.take_along_dim, x, indices, dim), expected)
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), x)):
        torch.testing.assert_close(a, b)


def test_entries_taken_without_a_dim_are_torchs_own() -> None:
    x, indices = torch.randn(2, 3), torch.tensor([[0, 5], [3, 1]])
    assert torch.equal(instead(torch.take_along_dim, x, indices), torch.take_along_dim(x, indices))


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dim_out_of_range_is_torchs_own_error(dim: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        instead(torch.take_along_dim, torch.randn(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64), dim)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_combinations_are_those_of_torch(n: int, r: int, again: bool) -> None:
    x = torch.arange(n) * 3
    found, expected = instead(torch.combinations, x, r, again), torch.combinations(x, r, again)
    assert torch.equal(found, expected)
    assert found.shape == expected.shape


def draw(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(sizes, dtype=torch.float64) * 3).to(dtype)


MATRICES = ([(3,), (3, 4), (4, 5)], [(2, 3), (3, 4), (4,)], [(3,), (3,)], [(2, 3), (3, 9), (9, 1), (1, 5)])
PLACES = [draw(n).abs().cumsum(0) + torch.arange(n) for n in (4, 5, 6)]
COUNTS = torch.tensor([1, 3, 2, 1, 2])
# Arguments of each function; a last dict is its keyword arguments.
SAID: dict[Callable[..., Any], list[tuple[Any, ...]]] = {
    torch.kron: [(draw(*a), draw(*b)) for a, b in itertools.product([(), (2,), (2, 3), (2, 1, 3), (0, 3)], repeat=2)],
    torch.linalg.multi_dot: [([draw(*size) for size in sizes],) for sizes in MATRICES],
    torch.cov: [
        (x, {"correction": c, "fweights": f, "aweights": a})
        for x in (draw(3, 5), draw(5), draw(1, 5), draw(2, 5, dtype=torch.int64), draw(2, 5, dtype=torch.complex128))
        for c, f, a in itertools.product((0, 1, 9), (None, COUNTS), (None, torch.rand(5, dtype=torch.float64)))
    ],
    torch.corrcoef: [(draw(3, 5),), (draw(5),), (draw(2, 5, dtype=torch.complex128),)],
    torch.vander: [
        (x, n, up)
        for x in (draw(3), draw(0), draw(3, dtype=torch.int32), draw(3, dtype=torch.bool))
        for n, up in itertools.product((None, 0, 1, 4), (True, False))
    ],
    torch.gradient: [
        (draw(4, 5, 6), {"spacing": step, "dim": dim, "edge_order": order})
        for step, dim in ((1, -1), (2.5, 0), ([1, 2.0], (2, 0)), (PLACES, (0, 1, 2)), ((PLACES[1],), 1))
        for order in (1, 2)
    ]
    + [(draw(2, 3),), (draw(3, 4, dtype=torch.int64),), (draw(4, 3, 3), {"spacing": 0.5})],
}


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("function", SAID, ids=lambda f: f.__name__)
def test_what_is_spelled_out_is_what_torch_gives(function: Callable[..., Any]) -> None:
    for given_ in SAID[function]:
        args, named = (given_[:-1], given_[-1]) if isinstance(given_[-1], dict) else (given_, {})
        leaves = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor) and a.dtype is torch.float64]
        for leaf in leaves:
            leaf.requires_grad_()
        found, expected = instead(function, *args, **named), function(*args, **named)
        torch.testing.assert_close(list(found) if isinstance(found, tuple) else found, expected, equal_nan=True)
        if function is torch.vander:  # whose own backward fails
            continue
        ends = [[t.sum() for t in pytree.tree_leaves(made) if t.dtype is torch.float64] for made in (found, expected)]
        if leaves and ends[0] and all(bool(t.isfinite()) for t in ends[1]):
            slopes = [torch.autograd.grad(e, leaves, allow_unused=True, materialize_grads=True) for e in ends]
            torch.testing.assert_close(*slopes, equal_nan=True)


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 6)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.scores(u)
        best = torch.take_along_dim(h, h.argsort(1)[:, :3], 1)
        first, second = torch.combinations(torch.arange(3)).T
        return (best[:, first] * best[:, second] * x[:, :3]).sum(1)


class Crossing(nn.Module):
    """Takes rows of others, and pairs of rows."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        pairs = torch.combinations(u[:, 0])
        return torch.take_along_dim(u, u.argsort(0), 0).sum(1) + x.sum(1) + pairs.sum()


class SpelledOut(nn.Module):
    """Of the user alone, but for `crossing`."""

    def __init__(self, crossing: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.crossing = nn.Linear(4, 16), nn.Linear(16, 4), crossing

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.second(torch.linalg.multi_dot([u, self.first.weight.T, torch.cov(self.first.weight)]))
        h = torch.kron(h[:, None], self.second.weight[:1])[:, 0, :4] + torch.gradient(h, dim=1)[0]
        h = h + torch.vander(u[:, 0], 4) @ torch.corrcoef(self.second.weight)
        if self.crossing:
            h = h @ torch.cov(u.T) + torch.gradient(u, dim=0)[0]
        return (h.relu() * x).sum(1)


@pytest.mark.parametrize("model", [Sorted(), Crossing(), SpelledOut(), SpelledOut(True)])
def test_models_that_take_and_combine(model: nn.Module) -> None:
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    found = roo.rewrite(model, (torch.randn(12, 4), torch.randn(12, 4)), spec=spec, fanout=10, check=True)
    roo.verify(model, found, batches=6)
    assert ("on broadcast inputs" in str(found.report)) == isinstance(model, Crossing)
    assert "opaque leaf" not in str(found.report)
    late = {n.op for n in found.report.nodes if n.runs == "impression"}
    assert ("relu" in late) == bool(getattr(model, "crossing", False))


class RowByRow(nn.Module):
    def __init__(self, rows: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rows = rows
        self.mix = nn.Bilinear(3, 3, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.cat([self.mix(*row.split(3)) for row in self.rows(torch.cat([u, x], 1))])


@pytest.mark.parametrize("rows", [iter, Tensor.unbind, lambda t: torch.unbind(input=t, dim=0)])
def test_rows_taken_apart_one_by_one_end_the_trace_at_once(rows: Callable[[Tensor], Any]) -> None:
    model = RowByRow(rows).double()
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    u, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    rewritten = roo.rewrite(model, (u[[0, 0, 1]], x), spec=spec, fanout=4)
    assert "taken apart row by row" in str(rewritten.report)
    counts = torch.tensor([2, 1])
    torch.testing.assert_close(rewritten(u, x, num_impressions=counts), model(u[[0, 0, 1]], x))


class PartlyCompiled(nn.Module):
    def __init__(self, backend: Callable[..., Any]):
        super().__init__()
        self.user = torch.compile(nn.Linear(4, 4), backend=backend)
        self.item = nn.Linear(4, 4)
        self.item.compile(backend=backend)
        self.mix = torch.compile(lambda h, x: (h * x).sum(-1), backend=backend)

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return self.mix(self.user(u).relu(), self.item(x))


@torch.no_grad()
def test_a_compiled_part_is_traced_as_written() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = PartlyCompiled(backend).eval()
    u, x, spec = torch.randn(6, 4), torch.randn(6, 4), roo.FeatureSpec(request=["u"], impression=["x"])
    rewritten = roo.rewrite(model, (u, x), spec=spec, check=True)
    assert not graphs
    assert rewritten._whole_program().plan.request
    counts = torch.tensor([2, 0, 3])
    found = rewritten(u[:3], x[:5], num_impressions=counts)
    assert not graphs
    torch.testing.assert_close(found, model(u[:3].repeat_interleave(counts, 0), x[:5]))
    assert graphs


def test_what_torch_compiles_for_itself_is_compiled() -> None:
    """The branches of `cond` have gradients only then."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    with as_written():
        torch.cond(x.sum() < 1e9, lambda x: layer(x), lambda x: x.sin(), (x,)).sum().backward()
        assert torch.compile(layer, backend="eager")(x).shape == (4, 3)
        doubled = torch.compile(backend="eager")(lambda x: x * 2)
        assert torch.equal(doubled(x), x * 2)
    assert layer.weight.grad is not None
    assert torch.compile.__module__ == "torch"
