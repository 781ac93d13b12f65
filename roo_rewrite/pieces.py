"""The pieces, one for each key, of a KeyedJaggedTensor that forward puts together.

    values = cat([hist_values, item_ids.reshape(-1)])      pieces {hist: (hist_values, hist_lengths),
    lengths = cat([hist_lengths, full((B,), 1)])                   item: (item_ids.reshape(-1), full((B,), 1))}
    KeyedJaggedTensor(["hist", "item"], values, lengths)

A key's values are its piece only where its lengths count just those:

    sum(lengths_k) = len(values_k)   for each key k

which is known of a jagged input, of a constant number of values for each row, and of what a mask keeps:

    values = ids[mask], lengths = mask.sum(1)              the piece is (ids, mask); its collection is given both

Else there are no pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

SIDE = "roo_side"  # attribute of a part: on which side it lies

_CATS = (torch.cat, torch.concat, torch.concatenate)
_FILLED = {aten.full.default: 1, aten.ones.default: None, aten.full_like.default: 1, aten.ones_like.default: None}
_SELECTS = (torch.Tensor.__getitem__, torch.masked_select, torch.Tensor.masked_select)
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)


@dataclass(frozen=True)
class Piece:
    """(values, lengths[, weights]) of one key, or (ids [B, L], mask [B, L]).

    each: how many values a row has, where that is a constant. masked: whether it is the ids that a mask keeps.
    """

    tensors: Sequence[Tensor]
    side: Provenance
    each: int | None = None
    masked: bool = False


class Pieces(TorchFunctionMode):
    """While active, remembers what concatenations are made of, and on which side each value lies."""

    def __init__(self, atoms: Sequence[Atom]):
        super().__init__()
        self._atoms = atoms
        self._given: Sequence[Tensor] = ()
        self._joined: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def see(self, given: Sequence[Tensor]) -> None:
        """Takes the tensors that stand for the atoms in this trace."""
        self._given, self._joined, self._kept = given, {}, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _CATS and args and made.ndim == 1:  # dim can only be 0
            self._joined[id(made)] = made, list(args[0])
        if func in _SELECTS and len(args) == 2 and _is_mask(args[1], args[0]):
            self._kept[id(made)] = made, args[0], args[1]
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
            return Piece(tensors, self._side(tensors))
        made, *kept = self._kept.get(id(values), (None,))
        if made is values and not weights and _counts(_node(lengths), _node(kept[1])) and not _may_change(kept):
            return Piece(kept, self._side(kept), masked=True)
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


def _is_mask(mask: Any, of: Tensor) -> bool:
    """Whether it keeps single entries of `[B, L]`."""
    return (
        isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == of.ndim == 2 and mask.shape == of.shape
    )


def _counts(node: Node | None, mask: Node | None) -> bool:
    """Whether the node counts the entries of each row of the mask."""
    while node is not None and node.target in _CASTS:
        node = node.all_input_nodes[0]
    if node is None or mask is None or node.target is not aten.sum.dim_IntList or node.args[0] is not mask:
        return False
    return list(node.args[1]) in ([1], [-1]) and len(node.args) == 2  # type: ignore[arg-type]


def _fill(node: Node | None) -> int | None:
    """The whole number that the node is filled with."""
    while node is not None and node.target in _CASTS:
        node = node.all_input_nodes[0]
    if node is None or node.target not in _FILLED:
        return None
    at = _FILLED[node.target]
    value = 1 if at is None else node.args[at]
    return value if isinstance(value, int) else None


# -- parts of an input


def _picked(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, key: original(self, key) if self._jt_dict is None else self._jt_dict[key]


def _split(original: Callable[..., Any]) -> Callable[..., Any]:
    def split(self: Any, segments: list[int]) -> Any:
        return [_with_parts(made, self) for made in original(self, segments)]

    return split


def _permuted(original: Callable[..., Any]) -> Callable[..., Any]:
    def permute(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_parts(original(self, *args, **kwargs), self)

    return permute


def _with_parts(made: Any, whole: Any) -> Any:
    """The KeyedJaggedTensor with the parts of the one that its keys are taken from."""
    parts = whole._jt_dict or {}
    if made is not whole and parts and all(SIDE in vars(jagged) for jagged in parts.values()):
        made._jt_dict = {key: parts[key] for key in made.keys()}
    return made


# Methods of a KeyedJaggedTensor, while tracing: what they give has the parts of the input it is taken from.
KEEPING_PARTS = {"__getitem__": _picked, "split": _split, "permute": _permuted}
