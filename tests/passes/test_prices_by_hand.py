"""The prices of each law, worked out by hand from shapes whose sizes are different primes.

Of a product its multiply-adds and what it reads and writes, of the rest what is read and written; so many rows per
impression and per request, starts of ops, and stretches of memory. No two constants of the device are alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

import passes.partition
import passes.split
from passes.annotate import Policy, annotate
from passes.normalize import normalize
from passes.price import Price
from roo_rewrite.capture import Captured
from roo_rewrite.cost import Device

Function = Callable[..., Any]
DEVICE = Device(2003.0, 29.0, 89.0, 11.0, 71.0, 43.0, 19.0, 1.3)
FANOUT = 17.0
I = 4096.0  # noqa: E741
R = I / FANOUT
FLOAT = 4


def moved(entries: float, times: float = 2.0) -> float:
    """Read and written, or one of both."""
    return FLOAT * entries * times / 29.0


def product(rows: float, k: float, n: float) -> float:
    """[rows, k] by [k, n], the latter in the cache."""
    return 2 * rows * k * n / 89.0 + FLOAT * (rows * k + rows * n) / 11.0


def matrices(count: float, m: float, k: float, n: float) -> float:
    """So many [m, k] by [k, n]."""
    return count * (71.0 + 2 * m * k * n / 43.0 + FLOAT * (m * k + k * n + m * n) / 19.0)


def started(ops: float) -> float:
    return 2003.0 * ops


def stretches(count: float) -> float:
    return 1.3 * count


def ones(*sizes: int) -> Tensor:
    return torch.ones(*sizes)


def beside(u: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([u.exp(), x.exp()], dim)


@dataclass(frozen=True)
class Case:
    """A model of `u` and `x` of these sizes, and what its split is called and priced at."""

    run: Function
    u: Sequence[int]
    x: Sequence[int]
    what: str
    before: float
    after: float
    training: bool = False


LINEAR = "linear: 3 of 8 columns per request, 5 of 8 columns per impression"
JOINED = moved(I * 8) + stretches(2 * I)
APART = product(R, 3, 7) + product(I, 5, 7) + moved(I * 7) + moved(I * 7, 1) + started(2)


def gate(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True).sigmoid()


def gated_twice(m: Any, u: Tensor, x: Tensor) -> Tensor:
    both = beside(u, x)
    return F.linear(both * gate(x) + both * gate(x.tanh()), ones(7, 8))


def read_whole(m: Any, u: Tensor, x: Tensor) -> Any:
    both = u.exp() + x.exp()
    return F.linear(both, ones(7, 5)), both.tanh()


OVER_COLUMNS = (
    product(I * 11, 8, 7) + moved(I * 8 * 11) + stretches(2 * I) + moved(I * 8 * 11) + stretches(I * 8),
    product(R * 11, 3, 7)
    + product(I * 11, 5, 7)
    + moved(I * 11 * 7)
    + moved(I * 11 * 7)
    + started(2)
    + (moved(R * 3 * 11) + stretches(R * 3))
    + (moved(I * 5 * 11) + stretches(I * 5))
    + (moved(I * 7 * 11) + stretches(I * 7)),
)
CASES = {
    "linear": Case(
        lambda m, u, x: F.linear(beside(u, x), ones(7, 8)), (3,), (5,), LINEAR, product(I, 8, 7) + JOINED, APART
    ),
    "parts of a side": Case(
        lambda m, u, x: F.linear(torch.cat([u.exp(), x.exp(), u.tanh(), x.tanh()], 1), ones(7, 16)),
        (3,),
        (5,),
        "linear: 6 of 16 columns per request, 10 of 16 columns per impression",
        product(I, 16, 7) + moved(I * 16) + stretches(4 * I),
        product(R, 6, 7)
        + moved(R * 6)
        + product(I, 10, 7)
        + moved(I * 10)
        + moved(I * 7)
        + moved(I * 7, 1)
        + started(2),
    ),
    "transposed": Case(
        lambda m, u, x: F.linear(torch.cat([u.exp().transpose(1, 2), x.exp()], 2), ones(7, 8)),
        (3, 2),
        (2, 5),
        LINEAR,
        product(I * 2, 8, 7) + moved(I * 2 * 8) + stretches(I * (2 * 3 + 2)),
        product(R * 2, 3, 7)
        + moved(R * 2 * 3)
        + stretches(R * 2 * 3)
        + product(I * 2, 5, 7)
        + moved(I * 2 * 7)
        + moved(I * 2 * 7, 1)
        + started(2),
    ),
    "sum": Case(
        lambda m, u, x: F.linear(u.exp() + x.exp(), ones(7, 5)),
        (5,),
        (5,),
        "linear: 5 of 5 columns per request, 5 of 5 columns per impression",
        product(I, 5, 7) + moved(I * 5),
        product(R, 5, 7) + product(I, 5, 7) + moved(I * 7) + moved(I * 7, 1) + started(2),
    ),
    "sum read whole": Case(
        read_whole,
        (5,),
        (5,),
        "linear: 5 of 5 columns per request, 5 of 5 columns per impression",
        product(I, 5, 7),
        product(R, 5, 7) + product(I, 5, 7) + moved(I * 7) + moved(I * 7, 1) + started(2),
    ),
    "shifted by a constant": Case(
        lambda m, u, x: F.linear(beside(u, x), ones(7, 8)) + ones(7),
        (3,),
        (5,),
        LINEAR,
        product(I, 8, 7) + JOINED + moved(I * 7),
        APART,
    ),
    "shifted by the impression": Case(
        lambda m, u, x: F.linear(beside(u, x), ones(7, 8)) + gate(x).expand(-1, 7),
        (3,),
        (5,),
        LINEAR,
        product(I, 8, 7) + JOINED,
        APART,
    ),
    "shifted once of twice": Case(
        lambda m, u, x: (lambda y: (y + ones(7), y + gate(x)))(F.linear(beside(u, x), ones(7, 8))),
        (3,),
        (5,),
        LINEAR,
        product(I, 8, 7) + JOINED,
        APART,
    ),
    "normed": Case(
        lambda m, u, x: F.linear(F.layer_norm(beside(u, x), (8,)), ones(7, 8)),
        (3,),
        (5,),
        "linear: 3 of 8 columns per request, 2 of 8 columns per impression, 5 of 8 columns per impression",
        product(I, 8, 7) + 3 * moved(I * 8) + moved(I * 8),
        product(R, 3, 7)
        + product(I, 5, 7)
        + product(I, 2, 7)
        + moved(I * 2)
        + moved(I * 7)
        + 2 * moved(I * 7, 1)
        + started(4)
        + 3 * (moved(R * 3) + moved(I * 5) + moved(I * 2))
        + started(12)
        + 2 * moved(I * 7),
    ),
    "gated": Case(
        lambda m, u, x: F.linear(beside(u, x) * gate(x), ones(7, 8)),
        (3,),
        (5,),
        LINEAR,
        product(I, 8, 7) + 3 * moved(I * 8) + moved(I * 8),
        APART + 2 * moved(I * 7),
    ),
    "gated twice": Case(
        gated_twice,
        (3,),
        (5,),
        LINEAR,
        product(I, 8, 7) + 2 * 3 * moved(I * 8) + moved(I * 8),
        APART + 2 * moved(I * 7, 1) + started(4) + 2 * 2 * moved(I * 7),
    ),
    "channels, long windows": Case(
        lambda m, u, x: F.conv1d(beside(u, x), ones(7, 8, 3)),
        (3, 11),
        (5, 11),
        LINEAR,
        product(I * 9, 8, 7) + moved(I * 8 * 11) + stretches(2 * I),
        product(R * 11, 3, 7) + product(I * 11, 5, 7) + moved(I * 11 * 7) + moved(I * 9 * 7) + started(2),
    ),
    "channels, windows of one": Case(
        lambda m, u, x: F.conv1d(beside(u, x), ones(7, 8, 1)),
        (3, 11),
        (5, 11),
        LINEAR,
        product(I * 11, 8, 7) + moved(I * 8 * 11) + stretches(2 * I),
        product(R * 11, 3, 7) + product(I * 11, 5, 7) + moved(I * 11 * 7) + moved(I * 11 * 7) + started(2),
    ),
    "over columns": Case(
        lambda m, u, x: torch.matmul(ones(7, 8), beside(u, x)),
        (3, 11),
        (5, 11),
        LINEAR,
        *OVER_COLUMNS,
    ),
    "over columns, spelled": Case(
        lambda m, u, x: torch.einsum("nk,bkd->bnd", ones(7, 8), beside(u, x)),
        (3, 11),
        (5, 11),
        LINEAR,
        *OVER_COLUMNS,
    ),
    "outer": Case(
        lambda m, u, x: F.linear((u.exp().unsqueeze(2) * x.exp().unsqueeze(1)).flatten(1), ones(7, 15)),
        (3,),
        (5,),
        "linear: , 15 with the request's factor in the weight",
        product(I, 15, 7) + moved(I * 15),
        product(R, 3, 7 * 5) + moved(R * 7 * 5, 4) + matrices(R, FANOUT, 5, 7) + 2 * moved(I * 7) + started(6),
    ),
    "outer, deep": Case(
        lambda m, u, x: F.conv1d((u.exp().unsqueeze(2) * x.exp().unsqueeze(1)).flatten(1, 2), ones(7, 15, 1)),
        (3, 11),
        (5, 11),
        "linear: , 15 with the request's factor in the weight",
        product(I * 11, 15, 7) + moved(I * 15 * 11),
        product(R * 11, 3, 7 * 5)
        + moved(R * 7 * 5 * 11, 4)
        + matrices(R * 11, FANOUT, 5, 7)
        + 2 * moved(I * 7 * 11)
        + started(6),
    ),
    "attention": Case(
        lambda m, u, x: (lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True))(beside(u, x, 2)),
        (2, 5, 3),
        (2, 11, 3),
        "attention: 2 query blocks, 2 key blocks",
        2 * product(I * 2 * 16, 3, 16) + 2 * moved(I * 2 * 16 * 3),
        started(6) + 2 * product(R * 2 * 5, 3, 5) + 2 * product(I * 2 * 11, 3, 16),
    ),
    "recurrence": Case(
        lambda m, u, x: torch.gru(
            beside(u, x), x.new_zeros(1, x.shape[0], 7), [ones(21, 3), ones(21, 7)], False, 1, 0.0, False, False, True
        ),
        (5, 3),
        (2, 3),
        "recurrence: 5 of 7 steps per request",
        moved(I * 7 * 3, 8),
        moved(R * 5 * 3, 8) + moved(I * 2 * 3, 8) + started(10),
    ),
    "batch norm": Case(
        lambda m, u, x: F.batch_norm(beside(u, x), ones(8), ones(8)),
        (3,),
        (5,),
        "batch norm: 3 of 8 channels per request",
        moved(I * 8),
        moved(R * 3) + moved(I * 5),
    ),
    "batch norm in runs": Case(
        lambda m, u, x: F.batch_norm(torch.cat([u.exp(), x.exp(), u.tanh()], 1), None, None, training=True),
        (3,),
        (5,),
        "batch norm: 6 of 11 channels per request",
        moved(I * 11),
        2 * moved(R * 3) + moved(I * 5) + started(3),
        training=True,
    ),
    "windows": Case(
        lambda m, u, x: F.conv1d(beside(u, x, 2), ones(7, 3, 4)),
        (3, 11),
        (3, 6),
        "conv: 8 of 14 windows per request",
        product(I * 14, 3 * 4, 7) + moved(I * 14 * 7, 30) + moved(I * 3 * 17),
        product(R * 8, 3 * 4, 7)
        + moved(R * 8 * 7, 30)
        + product(I * 6, 3 * 4, 7)
        + moved(I * 6 * 7, 30)
        + moved(R * 3 * 11)
        + moved(I * 3 * 9)
        + moved(I * 14 * 7)
        + started(4),
    ),
    "extremes": Case(
        lambda m, u, x: beside(u, x).amax(1),
        (3, 7),
        (5, 7),
        "amax of each side",
        moved(I * 8 * 7),
        moved(R * 3 * 7, 4) + moved(I * 5 * 7, 4) + 6 * moved(I * 7) + started(12),
    ),
    "weighted sum": Case(
        lambda m, u, x: (beside(u, x) * x.flatten(1)[:, :8].sigmoid().unsqueeze(2)).sum(1),
        (3, 7),
        (5, 7),
        "sum: weighted parts of both sides",
        moved(I * 8 * 7),
        moved(I * 8) + started(6),
    ),
    "inside of a weighted sum": Case(
        lambda m, u, x: F.linear(
            torch.cat([(u.exp() * x.sigmoid().unsqueeze(2)).sum(1), x.exp(), u.tanh().sum(1)], 1), ones(2, 19)
        ),
        (5, 7),
        (5,),
        "linear: inside of a weighted sum of the request's",
        matrices(R, FANOUT, 5, 7),
        product(R * 5, 7, 2) + moved(I * 5, 1) + 2 * moved(I * 5) + started(2),
    ),
    "pairs": Case(
        lambda m, u, x: (lambda t: torch.bmm(t, t.transpose(1, 2)))(beside(u, x)),
        (3, 7),
        (5, 7),
        "product aten.bmm",
        started(1) + matrices(I, 8, 7, 8) + 2 * (started(1) + 2 * moved(I * 8 * 7, 1)),
        1.15
        * (
            started(3)
            + matrices(R, 3, 7, 3)
            + matrices(R, 3, 7, 5 * FANOUT)
            + matrices(I, 5, 7, 5)
            + moved(I * 8 * 8)
            + stretches(2 * I)
        ),
    ),
    "pairs, trained": Case(
        lambda m, u, x: torch.bmm(beside(u, x), beside(u.tanh(), x.tanh()).transpose(1, 2)),
        (3, 7),
        (5, 7),
        "product aten.bmm",
        started(1) + matrices(I, 8, 7, 8) + 2 * (started(1) + 2 * moved(I * 8 * 7, 1)),
        1.3
        * (
            started(4)
            + matrices(R, 3, 7, 3)
            + matrices(R, 3, 7, 5 * FANOUT)
            + matrices(R, 5 * FANOUT, 7, 3)
            + matrices(I, 5, 7, 5)
            + moved(I * 8 * 8)
            + stretches(2 * I)
        ),
        training=True,
    ),
    "products of parts": Case(
        lambda m, u, x: (lambda t: torch.bmm(t, t.transpose(1, 2)))(beside(u, x, 2)),
        (7, 3),
        (7, 5),
        "product aten.bmm",
        started(1) + matrices(I, 7, 8, 7) + 2 * (started(1) + 2 * moved(I * 8 * 7, 1)),
        1.15 * (started(2) + matrices(R, 7, 3, 7) + matrices(I, 7, 5, 7) + moved(I * 7 * 7)),
    ),
    "heads before the batch": Case(
        lambda m, u, x: (lambda t: torch.einsum("hbid,hbjd->hbij", t, t))(beside(u, x, 2).transpose(0, 1)),
        (2, 3, 7),
        (2, 5, 7),
        "product aten.einsum",
        started(1) + matrices(I * 2, 8, 7, 8) + started(1) + 2 * moved(I * 2 * 8 * 7, 1),
        1.15
        * (
            started(4)
            + matrices(R * 2, 3, 7, 3)
            + matrices(I * 2, 3, 7, 5)
            + matrices(I * 2, 5, 7, 3)
            + 2 * moved(I * 2 * 3 * 7)
            + matrices(I * 2, 5, 7, 5)
            + moved(I * 2 * 8 * 8)
            + stretches(2 * I * 2)
        ),
    ),
    "experts": Case(
        lambda m, u, x: torch.einsum("bi,eio->beo", beside(u, x), ones(11, 8, 7)),
        (3,),
        (5,),
        "product aten.einsum",
        started(1) + product(I, 8, 77) + (FLOAT * 8 * 77) / 11 + moved(8 * 77) + started(1) + 2 * moved(I * 8, 1),
        1.15
        * (
            started(2)
            + (product(R, 3, 77) + FLOAT * 3 * 77 / 11 + moved(3 * 77))
            + (product(I, 5, 77) + FLOAT * 5 * 77 / 11 + moved(5 * 77))
            + moved(I * 77)
        ),
    ),
    "recurrent cell": Case(
        lambda m, u, x: torch.gru_cell(beside(u, x), u.tanh() @ ones(3, 7), ones(21, 8), ones(21, 7)),
        (3,),
        (5,),
        "recurrent cell: products by side",
        product(I, 3, 21) + product(I, 5, 21) + product(I, 7, 21),
        product(R, 3, 21) + product(I, 5, 21) + product(R, 7, 21) + started(3) + moved(I * 21) - started(1),
    ),
}


def annotated(captured: Function, run: Function, **changes: Any) -> Captured:
    trace, inputs = captured(run, **changes)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    return trace


def apart(*graphs: Graph) -> int:
    """How many ops one of two graphs has and the other has not."""
    a, b = (Counter(str(n.target) for n in g.nodes if n.op == "call_function") for g in graphs)
    return ((a - b) + (b - a)).total()


@pytest.mark.parametrize("name", CASES)
def test_the_price_of_a_split(captured: Function, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    trace = annotated(captured, case.run, training=case.training, u=case.u, x=case.x)
    monkeypatch.setattr(passes.split, "device_of", lambda _: DEVICE)
    graph = trace.graph
    found = passes.split.split(trace, FANOUT, "always").candidates
    far = apart(trace.graph, graph)
    assert case.what in [c.what for c in found]
    (candidate,) = (c for c in found if c.what == case.what)
    assert (candidate.before, candidate.after) == pytest.approx((case.before, case.after), rel=1e-9)
    trace.graph = graph
    monkeypatch.setattr(Price, "take", lambda *_: False)
    passes.split.split(trace, FANOUT, "always")
    assert apart(trace.graph, graph) < far


def test_the_price_of_a_graph(captured: Function) -> None:
    trace = annotated(
        captured, lambda m, u, x: (u.exp().view(-1, 3, 1).squeeze(2), F.linear(x, ones(7, 5))), u=(3,), x=(5,)
    )
    made = FLOAT * 7 * 5 / 29.0 * I / trace.batch
    linear = 2 * I * 5 * 7 / 89.0 + FLOAT * (I * 5 + I * 7 + 5 * 7 * I / trace.batch) / 11.0
    want = moved(I * 3) + made + linear + started(3)
    assert Price(DEVICE, 1.0, trace.batch, "priced").together(trace.graph) == pytest.approx(want)


def test_the_edges_of_the_cut(captured: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    """In picoseconds: the time saved by a run per request, and that of a value that crosses."""

    def model(m: Any, u: Tensor, x: Tensor) -> Tensor:
        turned = u.exp().transpose(1, 2)
        return turned.tanh().sum((1, 2), keepdim=True) * turned.sigmoid() + x

    trace = annotated(captured, model, u=(3, 5), x=(5, 3))
    seen = list[Any]()
    monkeypatch.setattr(passes.partition, "device_of", lambda _: DEVICE)
    cut = passes.partition.nx.minimum_cut
    monkeypatch.setattr(passes.partition.nx, "minimum_cut", lambda g, *a, **k: seen.append(g) or cut(g, *a, **k))
    passes.partition.partition(trace, FANOUT)
    found = {}
    for a, b, data in seen[0].edges(data=True):
        names = tuple(end if isinstance(end, str) else f"{end[0]} {end[1].name}" for end in (a, b))
        found[names] = data.get("capacity", math.inf)
    crossing, turned = (moved(I * 15) + stretches(n) + started(1) for n in (I / trace.batch, I * 15))
    scalar = moved(I) + stretches(I / trace.batch) + started(1)
    spent = {"exp": 30, "tanh": 30, "sum_1": 16, "sigmoid": 30, "mul": 31}  # numbers read and written
    crosses = {"atoms_0": crossing, "exp": crossing, "sum_1": scalar, **dict.fromkeys(("tanh", "mul"), turned)}
    reads = [("exp", "atoms_0"), ("transpose", "exp"), ("tanh", "transpose"), ("sigmoid", "transpose")]
    reads += [("sum_1", "tanh"), ("mul", "sum_1"), ("mul", "sigmoid")]
    want = {("source", f"in {name}"): moved(I * n, 1) * (1 - 1 / FANOUT) for name, n in spent.items()}
    want |= {(f"in {n}", f"out {n}"): crosses.get(n, turned) for n in (*crosses, "sigmoid", "transpose")}
    want |= {(f"out {b}", f"in {a}"): math.inf for a, b in reads} | {(f"in {a}", f"in {b}"): math.inf for a, b in reads}
    want |= {("source", "in atoms_0"): math.inf, ("out mul", "sink"): math.inf}
    assert found == {edge: ns if ns == math.inf else round(1000 * ns) for edge, ns in want.items()}
