"""A layered drawing of a graph: each node below all it reads, edges that pass layers kept apart from nodes.

Sugiyama's method: longest-path layers, a dummy on every layer an edge passes, orders by barycentre sweeps,
then places as near to the neighbours' mean as the order and the gaps allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SWEEPS = 12
Key = Any


@dataclass(frozen=True)
class Layout:
    """Centres of the nodes and the points of every edge, in the unit of the widths given; (0, 0) is top left."""

    centres: dict[str, tuple[float, float]]
    edges: dict[tuple[str, str], list[tuple[float, float]]]
    width: float
    height: float


def layout(reads: Mapping[str, Sequence[str]], width: float, height: float, gap: float) -> Layout:
    """Places a graph, given in order as node -> what it reads; nodes are `width` wide, layers `height` high."""
    layers, up, down, chains = _layers(reads)
    for sweep in range(SWEEPS):
        neighbours = up if sweep % 2 == 0 else down
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _reorder(layer, neighbours, {k: i for other in layers for i, k in enumerate(other)})
    xs = {k: i * (width + gap) for layer in layers for i, k in enumerate(layer)}
    for sweep in range(SWEEPS):
        neighbours = up if sweep % 2 == 0 else down
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _settle(layer, neighbours, xs, width, gap)
    left = min(xs.values(), default=0.0)
    places = {k: (xs[k] - left + width, (i + 0.5) * height) for i, layer in enumerate(layers) for k in layer}
    edges = {edge: [places[k] for k in chain] for edge, chain in chains.items()}
    right = max((x for x, _ in places.values()), default=0.0) + width
    return Layout({k: places[k] for k in reads}, edges, right, len(layers) * height)


def _layers(
    reads: Mapping[str, Sequence[str]],
) -> tuple[list[list[Key]], dict[Key, list[Key]], dict[Key, list[Key]], dict[tuple[str, str], list[Key]]]:
    """Layers of nodes and dummies, neighbours above and below, and the chain of keys of each edge."""
    depth: dict[str, int] = {}
    for node, sources in reads.items():
        depth[node] = 1 + max((depth[s] for s in sources), default=-1)
    _lower_sources(reads, depth)
    layers: list[list[Key]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    up: dict[Key, list[Key]] = {}
    down: dict[Key, list[Key]] = {}
    chains = {}
    for node in reads:
        layers[depth[node]].append(node)
    for node, sources in reads.items():
        for source in dict.fromkeys(sources):
            dummies = [(source, node, d) for d in range(depth[source] + 1, depth[node])]
            for dummy in dummies:
                layers[dummy[2]].append(dummy)
            chain: list[Key] = [source, *dummies, node]
            chains[source, node] = chain
            for a, b in zip(chain, chain[1:]):
                down.setdefault(a, []).append(b)
                up.setdefault(b, []).append(a)
    return layers, up, down, chains


def _lower_sources(reads: Mapping[str, Sequence[str]], depth: dict[str, int]) -> None:
    """Inputs go just above their first reader."""
    first: dict[str, int] = {}
    for node, sources in reads.items():
        for source in sources:
            first[source] = min(first.get(source, depth[node]), depth[node])
    for node, sources in reads.items():
        if not sources and node in first:
            depth[node] = first[node] - 1


def _reorder(layer: list[Key], neighbours: Mapping[Key, Sequence[Key]], rank: Mapping[Key, int]) -> None:
    def barycentre(key: Key) -> float:
        near = neighbours.get(key, ())
        return sum(rank[n] for n in near) / len(near) if near else rank[key]

    layer.sort(key=barycentre)


def _settle(
    layer: Sequence[Key], neighbours: Mapping[Key, Sequence[Key]], xs: dict[Key, float], width: float, gap: float
) -> None:
    """Moves a layer's keys towards their neighbours' mean, in order, without overlaps; half from each side."""
    wanted = [_mean([xs[n] for n in neighbours.get(k, ())], xs[k]) for k in layer]
    steps = [_step(a, b, width, gap) for a, b in zip(layer, layer[1:])]
    low, high = list(wanted), list(wanted)
    for i, step in enumerate(steps):
        low[i + 1] = max(low[i + 1], low[i] + step)
    for i, step in reversed(list(enumerate(steps))):
        high[i] = min(high[i], high[i + 1] - step)
    for key, a, b in zip(layer, low, high):
        xs[key] = (a + b) / 2


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _step(a: Key, b: Key, width: float, gap: float) -> float:
    """The least distance of two neighbours' centres; dummies are lines."""
    dummies = isinstance(a, tuple) + isinstance(b, tuple)
    return gap + width * (2 - dummies) / 2
