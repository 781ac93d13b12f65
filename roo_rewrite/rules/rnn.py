"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, Several
from roo_rewrite.rules.concat import common
from roo_rewrite.rules.registry import Build, Call, Case, Operand, case, no_rule, rule


def _weights(gates: int, layers: int = 1, directions: int = 1) -> list[Tensor]:
    """Weights and biases of a layer of 2 hidden units on 3 inputs, drawn once."""
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for layer in range(layers):
        width = 3 if layer == 0 else 2 * directions
        shapes += [(gates * 2, width), (gates * 2, 2), (gates * 2,), (gates * 2,)] * directions
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _layer(gates: int, *, layers: int = 1, first: bool = True, both: bool = False, dropout: float = 0.0) -> Build:
    """Arguments of `gru.input` and kin; a second state makes the pair of an LSTM."""

    def call(n: int, x: Tensor, *states: Tensor) -> tuple[object, ...]:
        hx = states[0] if len(states) == 1 else list(states)
        return (x, hx, _weights(gates, layers, 1 + both), True, layers, dropout, dropout > 0, both, first)

    return call


def _cell(gates: int) -> Build:
    def call(n: int, x: Tensor, *states: Tensor) -> tuple[object, ...]:
        hx = states[0] if len(states) == 1 else list(states)
        return (x, hx, *_weights(gates))

    return call


def _layer_cases(gates: int, states: int) -> list[Case]:
    hx, stacked = ["1 B 2"] * states, ["4 B 2"] * states
    return [
        case("B 4 3", *hx, call=_layer(gates)),
        case("4 B 3", *hx, call=_layer(gates, first=False)),
        case("B*2 4 3", *["1 B*2 2"] * states, call=_layer(gates)),
        case("B 4 3", *stacked, call=_layer(gates, layers=2, both=True)),
        case("4 B 3", *["1 4 2"] * states, call=_layer(gates), declines=True),
        case("B 4 3", *["1 7 2"] * states, call=_layer(gates), declines=True),
    ]


# Gates and states of each kind of layer.
_KINDS = {"gru": (3, 1), "rnn_tanh": (1, 1), "rnn_relu": (1, 1), "lstm": (4, 2)}


def layer(call: Call) -> Batching:
    """A recurrent layer over `[B, T, D]` (or `[T, B, D]`), states `[layers, B, H]`."""
    if call["train"] and call["dropout"] > 0 and call["num_layers"] > 1:
        raise NotRowWise("dropout between layers draws its own mask for every impression")
    _no_batch(call["params"])
    x, states = call.operand("input"), _states(call)
    if x.ndim != 3:
        raise NotRowWise("a single sequence has no batch dim")
    dim = 0 if call["batch_first"] else 1
    rows = common([_at(x, dim), *(_at(s, 1) for s in states)])
    if rows is None:
        return Several((Replicated(),) * len(call.out))
    return Several((Rows(dim, rows.outer, rows.inner), *(Rows(1, rows.outer, rows.inner) for _ in states)))


def cell(call: Call) -> Batching:
    """One step over `[B, D]`, states `[B, H]`."""
    call.replicated("w_ih", "w_hh", "b_ih", "b_hh")
    states = _states(call)
    rows = common([_at(o, 0) for o in (call.operand("input"), *states)])
    found = Replicated() if rows is None else rows
    return Several((found,) * len(call.out)) if call.several else found


def _states(call: Call) -> Sequence[Operand]:
    hx = call["hx"]
    return hx if isinstance(hx, list) else [hx]


def _no_batch(weights: Sequence[Operand]) -> None:
    if any(w.rows is not None for w in weights):
        raise NotRowWise("the weights have a batch of their own")


def _at(x: Operand, dim: int) -> Operand:
    """x with its batch, which must be dim `dim`, counted as dim 0."""
    if x.rows is None:
        return x
    if x.rows.dim != dim:
        raise NotRowWise("the batch is no dim over which the layer is repeated")
    return replace(x, batching=Rows(0, x.rows.outer, x.rows.inner))


for _name, (_gates, _count) in _KINDS.items():
    rule(f"aten.{_name}.input", cases=_layer_cases(_gates, _count))(layer)
    no_rule("packed sequences are sorted by length over the batch", f"aten.{_name}.data")
    _cell_cases = [
        case("B 3", *["B 2"] * _count, call=_cell(_gates)),
        case("B*2 3", *["B*2 2"] * _count, call=_cell(_gates)),
        case("7 3", *["B 2"] * _count, call=_cell(_gates), declines=True),
    ]
    rule(f"aten.{_name}_cell.default", cases=_cell_cases)(cell)

no_rule(
    "packed sequences are sorted by length over the batch",
    "aten._pack_padded_sequence.default",
    "aten._pad_packed_sequence.default",
)
