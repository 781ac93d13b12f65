"""What moved, what did not and why, what it saves: as text, as JSON, and as a page (`report_html`).

Costs are per impression at the fan-out of the plan: an op that runs per request costs `1 / fanout` of
what it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from roo_rewrite.cost import Cost, cost, nbytes, tensors, traced_cost
from roo_rewrite.facts import Provenance, Replicated, Size, annotation
from roo_rewrite.inputs import Inputs
from roo_rewrite.places import place_of
from roo_rewrite.program import Program

_NOTHING = Cost(0.0, 0.0)
_SIDES = {Provenance.CONSTANT: "constant", Provenance.REQUEST: "request", Provenance.IMPRESSION: "impression"}


@dataclass(frozen=True)
class NodeReport:
    """One node. depends: constant (sizes too), request or impression. runs: on which side; crosses: broadcast.

    reason: why a node runs per impression. Costs: FLOPs and bytes per impression, before and after.
    """

    name: str
    op: str
    depends: str
    runs: str
    crosses: bool
    reason: str
    shape: str
    module: str
    file: str
    line: int
    code: str
    inputs: tuple[str, ...]
    before: Cost
    after: Cost

    @property
    def where(self) -> str:
        """`file.py:12`, or the submodule where no line is known."""
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.file else self.module


@dataclass(frozen=True)
class SplitReport:
    """A split that was considered, what it was thought to gain (time before over after), and whether it was taken.

    measured: what it gains, where `split_gains` (the verb `bench`) has measured it.
    """

    what: str
    gain: float
    taken: bool
    where: str = ""
    measured: float | None = None


@dataclass(frozen=True)
class Report:
    """The report of one program.

    original, rewritten: FLOPs and bytes per impression. request, impression, both: FLOPs per impression of what
    depends on the request alone (Cu), on the impression alone (Ci), on both (Cx), before hoisting.
    fallback: nothing could be proved and the original runs on broadcast inputs; notes say why.
    """

    model: str
    mode: str
    fanout: float
    fallback: bool
    notes: tuple[str, ...]
    original: Cost = _NOTHING
    rewritten: Cost = _NOTHING
    request: float = 0.0
    impression: float = 0.0
    both: float = 0.0
    nodes: tuple[NodeReport, ...] = ()
    splits: tuple[SplitReport, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, inputs: Inputs, model: str = "model", training: bool = False) -> Report:
        """The report of `program`, of a model so called in the mode given."""
        mode = "train" if training else "eval"
        sides = {a.name: _SIDES[a.provenance] for a in inputs.atoms}
        plan, captured = program.plan, program.captured
        if plan is None or captured is None:
            return cls(model, mode, 1.0, True, program.notes, inputs=sides)
        graph_nodes = [n for n in captured.graph.nodes if n.op != "output"]
        named = {n: a.name for n, a in zip((n for n in graph_nodes if n.op == "placeholder"), inputs.atoms)}
        made = _Nodes(plan, captured.batch, named)
        nodes = tuple(made.report(n) for n in graph_nodes)
        shares = made.shares(graph_nodes)
        return cls(
            model,
            mode,
            plan.fanout,
            False,
            program.notes,
            _scaled(traced_cost(captured), 1 / captured.batch),
            _sum(n.after for n in nodes),
            *shares,
            nodes=nodes,
            splits=tuple(SplitReport(c.what, c.gain, c.taken, c.where, c.measured) for c in program.candidates),
            inputs=sides,
        )

    # -- numbers

    @property
    def bound(self) -> float:
        """`(Cu + Ci + Cx) / (Cu / f + Ci + Cx)`: the most that hoisting what depends on the request alone can save."""
        rest = self.impression + self.both
        return _over(self.request + rest, self.request / self.fanout + rest)

    @property
    def hoisting(self) -> float:
        """FLOPs of the graph that was hoisted over those of the rewritten model; `bound` is its limit."""
        return _over(self.request + self.impression + self.both, self.rewritten.flops)

    @property
    def regrouping(self) -> float:
        """FLOPs of the original over those of the graph that was hoisted: what splitting saves or costs."""
        return _over(self.original.flops, self.request + self.impression + self.both)

    @property
    def crossing(self) -> tuple[NodeReport, ...]:
        """The values that are broadcast."""
        return tuple(n for n in self.nodes if n.crosses)

    @property
    def kept(self) -> tuple[NodeReport, ...]:
        """Nodes that might have been hoisted and were not, or that made others stay."""
        return tuple(n for n in self.nodes if n.reason)

    # -- forms

    @property
    def text(self) -> str:
        """Everything, as text."""
        return "\n".join([self.summary, "", *_table(self)]) if self.nodes else self.summary

    @property
    def summary(self) -> str:
        """The text without its table of all nodes."""
        return "\n".join(_summary(self))

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        made = asdict(self)
        made |= {"bound": self.bound, "hoisting": self.hoisting, "regrouping": self.regrouping}
        made["crossing"] = [n.name for n in self.crossing]
        return made

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self) -> str:
        """One page that needs no network: the graph, coloured by provenance, and a table to filter."""
        from roo_rewrite.report_html import page

        return page(self)


class _Nodes:
    """The report of each node under a plan. `named`: the inputs' own names."""

    def __init__(self, plan: Any, batch: int, named: dict[Node, str]):
        self.plan, self.batch, self.named = plan, batch, named
        self.inside = set(plan.request)
        self.crossing = {n for n in plan.residuals if any(self._reads_rows(u) for u in n.users)}

    def report(self, node: Node) -> NodeReport:
        before, after = self._costs(node)
        place = place_of(node)
        depends = _depends(node)
        runs = "request" if node in self.inside else "constant" if depends == "constant" else "impression"
        return NodeReport(
            self.name(node),
            op_of(node),
            depends,
            runs,
            node in self.crossing,
            self.plan.reasons.get(node, "") if runs == "impression" else "",
            shape_of(node),
            place.module,
            place.file,
            place.line,
            place.code,
            tuple(self.name(n) for n in node.all_input_nodes),
            before,
            after,
        )

    def _reads_rows(self, user: Node) -> bool:
        """Whether an impression-level node reads more than the size of what crosses."""
        return user not in self.inside and (user.op == "output" or not isinstance(annotation(user).batching, Size))

    def name(self, node: Node) -> str:
        return self.named.get(node, node.name)

    def _costs(self, node: Node) -> tuple[Cost, Cost]:
        before = _scaled(cost(node), 1 / self.batch)
        after = _scaled(before, 1 / self.plan.fanout) if node in self.inside else before
        if node in self.crossing and not isinstance(annotation(node).batching, Replicated):
            after += Cost(0.0, 2.0 * nbytes(node.meta.get("val")) / self.batch)
        return before, after

    def shares(self, nodes: Sequence[Node]) -> tuple[float, float, float]:
        """Cu, Ci, Cx."""
        request = impression = both = 0.0
        mixed: set[Node] = set()
        for node in nodes:
            sources = node.all_input_nodes
            own = annotation(node).provenance
            touched = any(annotation(s).provenance is Provenance.REQUEST or s in mixed for s in sources)
            flops = cost(node).flops / self.batch
            if own is Provenance.IMPRESSION and touched:
                mixed.add(node)
                both += flops
            elif own is Provenance.IMPRESSION:
                impression += flops
            else:
                request += flops
        return request, impression, both


def _depends(node: Node) -> str:
    known = annotation(node)
    return "constant" if isinstance(known.batching, Size) else _SIDES[known.provenance]


def op_of(node: Node) -> str:
    """What a node does, in a word or two."""
    if node.op in ("placeholder", "get_attr"):
        return {"placeholder": "input", "get_attr": "parameter"}[node.op]
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target).removeprefix("aten.")
        return name.removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def shape_of(node: Node) -> str:
    """`[B, 4, 16] f32`, the batch by name; of each tensor of the value."""
    return ", ".join(f"[{', '.join(_size(s) for s in t.shape)}] {_dtype(t)}" for t in tensors(node.meta.get("val")))


def _size(size: int | torch.SymInt) -> str:
    return "B" if isinstance(size, torch.SymInt) else str(size)


def _dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name.replace("float", "f").replace("bf", "bf").replace("uint", "u").replace("int", "i")


def _scaled(value: Cost, by: float) -> Cost:
    return Cost(value.flops * by, value.bytes * by)


def _sum(costs: Iterator[Cost]) -> Cost:
    total = _NOTHING
    for value in costs:
        total += value
    return total


def _over(a: float, b: float) -> float:
    return a / b if b else 1.0


def _summary(report: Report) -> Iterator[str]:
    yield f"{report.model}, {report.mode}, fan-out {report.fanout:g}"
    if report.fallback:
        yield "  the original runs on broadcast inputs: equal, and not faster"
    else:
        yield from _numbers(report)
    for note in report.notes:
        yield f"  note: {note}"
    if report.kept:
        yield "not hoisted:"
        for node in report.kept:
            yield f"  {node.op:<22} {node.reason}" + (f"   {node.where}: {node.code}" if node.where else "")
    if report.splits:
        yield from splits(report.splits)


def splits(found: Sequence[SplitReport]) -> Iterator[str]:
    """One line each."""
    yield "splits (predicted time before / after of the op; measured: the model's time without / with it):"
    for split in found:
        measured = f"{split.measured:5.2f}x" if split.measured is not None else " " * 6
        taken = "taken " if split.taken else "left  "
        yield f"  {taken} {split.gain:6.2f}x {measured}  {split.what}  {split.where}".rstrip()


def _numbers(report: Report) -> Iterator[str]:
    ops = [n for n in report.nodes if n.op not in ("input", "parameter") and n.runs != "constant"]
    hoisted = [n for n in ops if n.runs == "request"]
    yield f"  {len(hoisted)} of {len(ops)} ops run once per request, {len(report.crossing)} values are broadcast:"
    for node in report.crossing:
        yield f"    {node.name:<24} {node.shape}"
    yield f"  per impression   {'original':>12} {'rewritten':>12} {'ratio':>8}"
    for name in ("flops", "bytes"):
        a, b = getattr(report.original, name), getattr(report.rewritten, name)
        yield f"    {name:<14} {a:>12,.0f} {b:>12,.0f} {_over(a, b):>7.2f}x"
    of = f"of the request {report.request:,.0f}, of the impression {report.impression:,.0f}, of both {report.both:,.0f}"
    by = f"by regrouping {report.regrouping:.2f}x, by hoisting {report.hoisting:.2f}x of at most {report.bound:.2f}x"
    yield f"  FLOPs {by}\n    ({of})"


def _table(report: Report) -> Iterator[str]:
    yield f"{'node':<28} {'op':<26} {'depends on':<11} {'runs per':<11} {'FLOPs':>12} {'after':>12}  where"
    for node in report.nodes:
        if node.op == "parameter":
            continue
        runs = node.runs + (" ->" if node.crosses else "")
        yield (
            f"{node.name:<28} {node.op:<26} {node.depends:<11} {runs:<11} "
            f"{node.before.flops:>12,.0f} {node.after.flops:>12,.0f}  {node.where}"
        ).rstrip()
