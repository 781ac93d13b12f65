"""What a split is priced at: ties, fan-outs, columns that are few, parts that lie apart in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from passes.annotate import Policy, annotate
from passes.forms import Blocks, Whole
from passes.normalize import normalize
from passes.partition import partition
from passes.price import Candidate, Price
from passes.split import split
from roo_rewrite.capture import Captured
from roo_rewrite.cost import CPU, CUDA, Device, flops, runs, time
from roo_rewrite.facts import Provenance

Function = Callable[..., Any]


def priced(fanout: float = 10.0, **changes: Any) -> Price:
    return Price(replace(CPU, **changes), fanout, 8, "priced")


@pytest.mark.parametrize(
    ("fanout", "after", "taken"),
    [(10.0, 90.0, True), (10.0, 103.0, True), (10.0, 106.0, False), (1.0, 90.0, True), (1.0, 100.0, False)],
)
def test_of_equal_time_the_split_is_taken_unless_the_fanout_is_1(fanout: float, after: float, taken: bool) -> None:
    assert priced(fanout).take("split", 100.0, after) is taken
    assert Price(CPU, fanout, 32, "priced", frozenset({("split", "")})).take("split", 100.0, after) is not taken
    assert Price(CPU, fanout, 32, "always").take("split", 100.0, after)


def test_a_tie_is_a_tie_at_a_larger_fanout() -> None:
    for after in (0.9, 0.965, 0.98, 1.0, 1.02, 1.045, 1.1):
        taken = [priced(fanout).take("split", 1.0, after) for fanout in (1.0, 1.5, 4.0, 30.0, 1000.0)]
        assert taken == sorted(taken)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_product_of_more_entries_takes_longer(device: Any) -> None:
    price, side = Price(device, 10.0, 8, "priced"), Provenance.IMPRESSION
    for inner, columns in itertools.product((1, 7, 64, 512), repeat=2):
        taken = price.product((100, columns), inner, side)
        assert taken < price.product((100, columns), inner + 1, side)
        assert taken < price.product((100, columns + 1), inner, side)
        assert price.batched(100, inner, 4, columns) < price.batched(101, inner, 4, columns)


def test_without_any_traffic_a_product_takes_its_flops() -> None:
    free = float("inf")
    price = priced(product_bytes_per_ns=free, matrix_bytes_per_ns=free, matrix_ns=0.0)
    with FlopCounterMode(display=False) as counted:
        torch.ones(3, 100, 5) @ torch.ones(3, 5, 7)
    flops = counted.get_total_flops()
    assert price.product((3, 100, 7), 5, Provenance.CONSTANT) == pytest.approx(flops / CPU.product_flops_per_ns)
    assert price.batched(1, 300, 5, 7) == pytest.approx(flops / CPU.product_flops_per_ns)
    assert price.batched(3, 100, 5, 7) == pytest.approx(flops / CPU.matrix_flops_per_ns)


def test_without_any_flops_a_product_takes_its_traffic() -> None:
    free = float("inf")
    price = priced(product_flops_per_ns=free, matrix_flops_per_ns=free, matrix_ns=0.0)
    operands = (torch.ones(300, 5), torch.ones(5, 7), torch.ones(300, 7))
    traffic = sum(t.numel() * t.element_size() for t in operands)
    assert price.batched(1, 300, 5, 7) == pytest.approx(traffic / CPU.product_bytes_per_ns)
    assert price.batched(3, 300, 5, 7) == pytest.approx(3 * traffic / CPU.matrix_bytes_per_ns)
    weights = operands[1].numel() * operands[1].element_size()  # stay in the cache
    assert price.product((300, 7), 5, Provenance.CONSTANT) == pytest.approx(
        (traffic - weights) / CPU.product_bytes_per_ns
    )


def test_a_product_of_few_columns_is_no_faster_than_what_it_moves() -> None:
    price, side = priced(), Provenance.IMPRESSION
    four, eight = (price.product((1000, 64), inner, side) for inner in (4, 8))
    assert eight < 1.5 * four
    assert price.product((1000, 64), 512, side) > 1.8 * price.product((1000, 64), 256, side)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: torch.ones(4, 3, 5), 1),
        (lambda: torch.ones(4, 5, 3).transpose(1, 2), 60),
        (lambda: torch.ones(4, 3, 6)[:, :, :5], 12),
        (lambda: torch.ones(4, 3, 5)[1:], 1),
        (lambda: torch.ones(4, 2, 3, 5).transpose(1, 2), 24),
        (lambda: torch.ones(4, 1, 5).transpose(0, 1), 1),
        (lambda: torch.ones(()), 1),
        (lambda: torch.ones(4, 5).to_sparse(), 1),
        (lambda: torch.ones(4, 5)[:, :0], 0),
    ],
    ids=["contiguous", "transposed", "columns", "rows", "heads", "of size 1", "scalar", "sparse", "empty"],
)
def test_runs_of_memory(made: Callable[[], Tensor], expected: int) -> None:
    assert runs(made()) == expected


def annotated(captured: Function, function: Function) -> Captured:
    trace, inputs = captured(function)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    return trace


def node_of(trace: Captured, name: str) -> Any:
    return next(n for n in trace.graph.nodes if name in str(n.target))


def test_parts_that_are_transposed_are_put_side_by_side_more_slowly(captured: Function) -> None:
    trace = annotated(captured, lambda m, u, x: (x.exp().view(-1, 2, 2).transpose(1, 2), x.tanh().view(-1, 2, 2)))
    price = Price(CPU, 10.0, trace.batch, "priced")
    turned, plain = (Whole(node_of(trace, name)) for name in ("transpose", "reshape"))
    few, many = (price.joined(Blocks(dim, (plain, plain))) for dim in (1, 2))
    assert price.move((*plain.shape[:-1], 4)) < few < many
    assert many < price.joined(Blocks(2, (turned, plain))) < price.joined(Blocks(2, (turned, turned)))
    assert price.joined(turned) == price.move(turned.shape)
    assert price.copied(turned.node, Provenance.IMPRESSION) > price.copied(plain.node, Provenance.IMPRESSION) == 0


def test_a_product_is_priced_by_its_flops_and_what_it_moves(captured: Function) -> None:
    trace = annotated(captured, lambda m, u, x: (x.exp() @ torch.ones(4, 8)).tanh())
    product, tanh = (node_of(trace, name) for name in ("matmul", "tanh"))
    slow, fast = (replace(CPU, product_bytes_per_ns=rate) for rate in (1.0, 100.0))
    assert time(product, slow) > time(product, fast)
    assert time(tanh, slow) == time(tanh, fast)


EINSUMS = {
    "bi,ij->bj": [("bij", 1)],
    "bi,bj->bij": [("bij", 1)],
    "bfd,bgd,fg->b": [("bfgd", 1), ("bfg", 1)],
    "bi,bi,bi->b": [("bi", 2)],
    "...i,ij": [("bij", 1)],
    "bi->b": [],
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_a_letter_counts_once_in_a_product(equation: str) -> None:
    sizes = {"b": 7, "i": 3, "j": 5, "f": 2, "g": 4, "d": 6}
    graph = torch.fx.Graph()
    operands = []
    for k, letters in enumerate(equation.replace("...", "b").split("->")[0].split(",")):
        operands.append(graph.placeholder(f"x{k}"))
        operands[-1].meta["val"] = torch.empty([sizes[c] for c in letters])
    node = graph.call_function(torch.ops.aten.einsum.default, (equation, operands))
    node.meta["val"] = torch.einsum(equation, *(n.meta["val"] for n in operands))
    expected = sum(2 * times * math.prod(sizes[c] for c in letters) for letters, times in EINSUMS[equation])
    assert flops(node) == expected


def test_at_fan_out_1_the_graph_stays_unless_all_of_it_gets_faster(captured: Function) -> None:
    def spreads(m: Any, u: Tensor, x: Tensor) -> Tensor:
        return torch.cat([u, x], 1).var(1)

    def repeats(m: Any, u: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.linear((u + x).unsqueeze(1).expand(-1, 50, -1), m.w).tanh().sum(1)

    for function, kept in ((spreads, True), (repeats, False)):
        trace = annotated(captured, function)
        before = trace.graph
        assert not any(c.taken for c in split(trace, 1.0).candidates) or not kept
        assert (trace.graph is before) is kept
        trace = annotated(captured, function)
        before = trace.graph
        split(trace, 2.0)
        assert trace.graph is not before


def test_a_transposed_value_crosses_as_it_lies_in_memory(captured: Function) -> None:
    def model(m: Any, u: Tensor, x: Tensor) -> Tensor:
        kept = u.exp().repeat(1, 4).view(-1, 4, u.shape[1])
        return kept.transpose(1, 2) + x.exp().repeat(1, 4).view(-1, x.shape[1], 4)

    plan = partition(annotated(captured, model), 10.0)
    assert plan.residuals
    assert not any("transpose" in n.name for n in plan.residuals)


def test_an_addition_of_what_no_impression_has_goes_into_the_requests_term(captured: Function) -> None:
    def model(shift: bool) -> Function:
        def run(m: Any, u: Tensor, x: Tensor) -> Tensor:
            made = torch.cat([u.exp(), x.exp()], 1) @ torch.ones(u.shape[1] + x.shape[1], 8)
            return (made + torch.ones(8) if shift else made).tanh()

        return run

    before = []
    for shift in (False, True):
        trace = annotated(captured, model(shift))
        (candidate,) = split(trace, 10.0).candidates
        assert isinstance(candidate, Candidate)
        before.append(candidate.before)
    assert before[0] < before[1]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_entries_that_lie_apart_are_copied_one_by_one(device: Device) -> None:
    price = Price(device, 10.0, 8, "priced")
    apart, rows = (price.gathered((8, 4, 16), Provenance.IMPRESSION, run) for run in (1, 16))
    assert math.isclose(apart - rows, 8 * 4 * 15 * device.run_ns)
