"""A module that several parameters are read from is looked up once in a call.

    w = self.mlp.0.weight            mlp_0 = self.mlp.0
    b = self.mlp.0.bias              w = mlp_0.weight; b = mlp_0.bias

Each dot is a function of Python's. Parameters themselves are read anew wherever they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.fx import Graph, Node


def share_owners(graph: Graph) -> None:
    """Rewrites the attributes that a graph reads, in place."""
    reads = [n for n in graph.nodes if n.op == "get_attr"]
    shared = _shared([str(n.target) for n in reads])
    made: dict[str, Node] = {}
    for node in reads:
        owner, path = _cut(str(node.target), shared)
        if owner:
            with graph.inserting_before(node):
                base = _module(graph, owner, shared, made)
                *way, last = path
                node.args = (_below(graph, base, way), last)
            node.op, node.target = "call_function", getattr


def _owners(path: str) -> list[str]:
    """The modules on the way to what a path names, nearest first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _shared(paths: Iterable[str]) -> frozenset[str]:
    """The modules from which more than one thing is read."""
    read = list(paths)
    modules = {owner for path in read for owner in _owners(path)}
    found = Counter(owners[0] for path in (*read, *modules) if (owners := _owners(path)))
    return frozenset(path for path, reads in found.items() if reads > 1)


def _cut(path: str, shared: frozenset[str]) -> tuple[str, list[str]]:
    """The nearest shared module of a path, none as "", and the way from there."""
    owner = next((o for o in _owners(path) if o in shared), "")
    return owner, path.removeprefix(f"{owner}.").split(".")


def _module(graph: Graph, path: str, shared: frozenset[str], made: dict[str, Node]) -> Node:
    """The node of a shared module, made where it is first needed."""
    if path not in made:
        owner, way = _cut(path, shared)
        base = _module(graph, owner, shared, made) if owner else None
        made[path] = graph.create_node("get_attr", path) if base is None else _below(graph, base, way)
    return made[path]


def _below(graph: Graph, module: Node, way: Iterable[str]) -> Node:
    """The module at the end of a way from another."""
    for part in way:
        module = graph.call_function(getattr, (module, part))
    return module
