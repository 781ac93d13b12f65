"""The pieces, one for each key, of a KeyedJaggedTensor that forward puts together.

    values = cat([hist_values, item_ids.reshape(-1)])      pieces {hist: (hist_values, hist_lengths),
    lengths = cat([hist_lengths, full((B,), 1)])                   item: (item_ids.reshape(-1), full((B,), 1))}
    KeyedJaggedTensor(["hist", "item"], values, lengths)

A key's values are its piece only where its lengths count just those:

    sum(lengths_k) = len(values_k)   for each key k

which is known of a jagged input, and of a constant number of values for each row; else there are no pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from roo_rewrite.facts import Provenance
from roo_rewrite.memory import all_written, behind, sharing

if TYPE_CHECKING:
    from roo_rewrite.atoms import Atom

aten = torch.ops.aten

_CATS = (torch.cat, torch.concat, torch.concatenate)
_FILLED = {aten.full.default: 1, aten.ones.default: None, aten.full_like.default: 1, aten.ones_like.default: None}
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)


@dataclass(frozen=True)
class Piece:
    """(values, lengths[, weights]) of one key; each: how many values a row has, where that is a constant."""

    tensors: Sequence[Tensor]
    side: Provenance
    each: int | None


class Pieces(TorchFunctionMode):
    """While active, remembers what concatenations are made of, and on which side each value lies."""

    def __init__(self, atoms: Sequence[Atom]):
        super().__init__()
        self._atoms = atoms
        self._given: Sequence[Tensor] = ()
        self._joined: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}

    def see(self, given: Sequence[Tensor]) -> None:
        """Takes the tensors that stand for the atoms in this trace."""
        self._given, self._joined = given, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _CATS and args and made.ndim == 1:  # dim can only be 0
            self._joined[id(made)] = made, list(args[0])
        return made

    def of(self, kjt: Any) -> dict[str, Piece] | None:
        """The pieces by key; None where they are not known."""
        columns = [kjt._values, kjt._lengths, *([kjt._weights] if kjt._weights is not None else [])]
        if any(c is None for c in columns) or kjt.variable_stride_per_key():
            return None
        leaves = [self._leaves(c) for c in columns]
        if {len(of_one) for of_one in leaves} != {len(kjt.keys())} or _may_change([t for c in leaves for t in c]):
            return None
        if not all(statically_known_true(n.shape[0] == leaves[1][0].shape[0]) for n in leaves[1]):
            return None
        found = {key: self._piece(part) for key, *part in zip(kjt.keys(), *leaves, strict=True)}
        known = {key: piece for key, piece in found.items() if piece is not None}
        return known if len(known) == len(found) else None

    def _leaves(self, tensor: Tensor) -> list[Tensor]:
        made, parts = self._joined.get(id(tensor), (None, ()))
        return [tensor] if made is not tensor else [leaf for part in parts for leaf in self._leaves(part)]

    def _piece(self, tensors: Sequence[Tensor]) -> Piece | None:
        """The piece of (values, lengths[, weights]); None where the lengths may not be those of the values."""
        values, lengths, *weights = tensors
        if lengths.dtype not in (torch.int32, torch.int64) or any(w.shape != values.shape for w in weights):
            return None
        if any(values is a and lengths is b for a, b in self._pairs()):
            return Piece(tensors, self._side(tensors), None)
        each = _fill(_node(lengths))
        if each is None or not statically_known_true(values.shape[0] == each * lengths.shape[0]):
            return None
        return Piece(tensors, self._side(tensors), each)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        by_name = {a.name: t for a, t in zip(self._atoms, self._given)}
        kinds = {a.name: a.kind for a in self._atoms}
        named = [a for a in self._atoms if a.rows_in and kinds[a.rows_in] == "lengths"]
        return [(by_name[a.name], by_name[a.rows_in]) for a in named]

    def _side(self, tensors: Sequence[Tensor]) -> Provenance:
        sides = {node: a.provenance for a, t in zip(self._atoms, self._given) if (node := _node(t)) is not None}
        made_of = behind([node for t in tensors if (node := _node(t)) is not None])
        return max((sides[n] for n in made_of if n in sides), default=Provenance.REQUEST)


def _node(tensor: Tensor) -> Node | None:
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def _may_change(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them, or what it is filled or cast from, is written, so that it may not be what was joined."""
    nodes = [_node(t) for t in tensors]
    known = [n for n in nodes if n is not None]
    if len(known) < len(nodes):
        return True
    cast = behind([n for n in known if n.target in _CASTS])
    return not sharing(known).union(cast).isdisjoint(all_written(known[0].graph.nodes))


def _fill(node: Node | None) -> int | None:
    """The whole number that the node is filled with."""
    while node is not None and node.target in _CASTS:
        node = node.all_input_nodes[0]
    if node is None or node.target not in _FILLED:
        return None
    at = _FILLED[node.target]
    value = 1 if at is None else node.args[at]
    return value if isinstance(value, int) else None
