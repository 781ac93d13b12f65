"""Where to broadcast: a minimum cut between what runs per request and what runs per impression.

    u ── linear ── relu ──┐                request = {u, linear, relu}
                          ├── cat ── ...   residuals = {relu}
    x ────────────────────┘

A node that may run per request (annotated REQUEST) pays on one of two sides:

    source ─► X_in    the extra time of running X at I rows instead of R   (finite: X moves to impressions)
    X_in ─► X_out     the time to broadcast X, once, however many read it  (finite: X crosses)
    X_out ─► Y_in     forever, for each reader Y
    Y_in ─► X_in      forever: what runs per request has its inputs there

Analysis only: the result is a `Partition` that `hoist` obeys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch.fx import Node

from passes.mixed_rate import at_request_rate
from roo_rewrite.capture import Captured
from roo_rewrite.cost import NOMINAL_IMPRESSIONS, Device, device_of, nbytes, runs, tensors, time
from roo_rewrite.facts import Annotation, Offsets, Provenance, Ragged, Replicated, Rows, Several, Size, annotation


@dataclass(frozen=True)
class Partition:
    """The plan: nodes that run per request, in order; those of them that cross, in order; why others do not move."""

    request: tuple[Node, ...]
    residuals: tuple[Node, ...]
    reasons: dict[Node, str] = field(default_factory=dict)
    fanout: float = 1.0

    def __str__(self) -> str:
        names = [", ".join(n.name for n in nodes) or "nothing" for nodes in (self.request, self.residuals)]
        return f"per request: {names[0]}\ncrossing: {names[1]}"


def partition(captured: Captured, fanout: float) -> Partition:
    """The cheapest partition at `fanout` impressions a request."""
    nodes = [n for n in captured.graph.nodes if n.op != "output"]
    movable = [n for n in nodes if may_move(n)]
    inside = _cut(captured, movable, fanout) if movable else set()
    request = tuple(n for n in movable if n in inside)
    residuals = tuple(
        n for n in request if any(u not in inside and reads_value(u) for u in n.users) and not is_bundle(n)
    )
    reasons = {n: _reason(n, inside) for n in nodes if n not in inside}
    return Partition(request, residuals, {n: r for n, r in reasons.items() if r}, fanout)


def reads_value(node: Node) -> bool:
    """Whether a node reads its operands' entries, not only their sizes or device."""
    return node.op == "output" or not (isinstance(annotation(node).batching, Size) or node.target is getattr)


def may_move(node: Node) -> bool:
    """Whether a node is proved to depend on its request alone."""
    known = annotation(node)
    return known.provenance is Provenance.REQUEST and isinstance(
        known.batching, (Rows, Ragged, Offsets, Replicated, Several)
    )


def is_bundle(node: Node) -> bool:
    """A node with several outputs, or a list: its parts cross, not it."""
    return isinstance(annotation(node).batching, Several) or isinstance(node.meta.get("val"), (list, tuple))


def _reason(node: Node, inside: set[Node]) -> str:
    known = annotation(node)
    if known.provenance is Provenance.REQUEST:
        return "running it per request would not pay at this fan-out"
    inputs: list[Annotation] = [annotation(n) for n in node.all_input_nodes]
    own = known.reason and not any(i.provenance is Provenance.IMPRESSION for i in inputs)
    return known.reason if own else ""


def _cut(captured: Captured, movable: list[Node], fanout: float) -> set[Node]:
    network = nx.DiGraph()
    device = device_of(captured)
    scale = NOMINAL_IMPRESSIONS / captured.batch
    members = set(movable)
    for node in movable:
        into, out = ("in", node), ("out", node)
        saved = time(node, device) * scale * (1.0 - 1.0 / fanout)
        if node.op == "placeholder":
            network.add_edge("source", into)
        elif saved > 0:
            network.add_edge("source", into, capacity=_whole(saved))
        _broadcast_edge(network, node, _broadcast(node, device) * scale, device.start_ns)
        for source in node.all_input_nodes:
            if source in members:
                network.add_edge(into, ("in", source))
        for user in node.users:
            if user in members:
                network.add_edge(out, ("in", user))
            elif reads_value(user) and not at_request_rate(user, node):
                network.add_edge(out, "sink")
    if "sink" not in network:
        return members
    network.add_node("source")
    _, (kept, _) = nx.minimum_cut(network, "source", "sink", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    return {n for n in movable if ("in", n) in kept}


def _broadcast(node: Node, device: Device) -> float:
    """Nanoseconds to read and write a value at the rows of the batch; one that is transposed, run by run."""
    value = node.meta.get("val")
    apart = sum(runs(t) for t in tensors(value) if t.ndim > 1)
    return 2.0 * nbytes(value) / device.bytes_per_ns + apart * device.run_ns


def _whole(ns: float) -> int:
    """Picoseconds as an integer: with floats an edge may look unsaturated by a rounding error, and the cut is lost."""
    return max(1, round(1000 * ns))


def _broadcast_edge(network: nx.DiGraph, node: Node, ns: float, start: float) -> None:
    if is_bundle(node):
        network.add_edge(("in", node), ("out", node))
    elif isinstance(annotation(node).batching, Replicated):
        network.add_edge(("in", node), ("out", node), capacity=0)
    else:
        network.add_edge(("in", node), ("out", node), capacity=_whole(ns + start))
