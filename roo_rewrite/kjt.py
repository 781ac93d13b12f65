"""TorchRec's embedding modules, looked up once per side.

    traced                                       emitted
    kjt = KeyedJaggedTensor(u1, u2, x1)          a = collection({u1, u2})    R rows
    pooled = collection(kjt)                     b = collection({x1})        I rows
                                                 pooled = cat of columns of both

The collection stays the module it is: same tables, same names, so that it can be sharded later. A module
that TorchRec put in its place is called with all the features it knows, the other side's ones empty.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Provenance, Ragged, Rows, Several
from roo_rewrite.leaves import LeafSite, add_site
from roo_rewrite.ops.ragged import offsets_of
from roo_rewrite.pieces import KEEPING_PARTS, SIDE, Piece, Pieces

_PLAIN = "torchrec.modules.embedding_modules"


def is_kjt(value: Any) -> bool:
    """Whether `value` is a TorchRec KeyedJaggedTensor, without importing TorchRec."""
    module = sys.modules.get("torchrec.sparse.jagged_tensor")
    return module is not None and isinstance(value, module.KeyedJaggedTensor)


def is_jagged(value: Any) -> bool:
    """Whether `value` is a TorchRec JaggedTensor, without importing TorchRec."""
    module = sys.modules.get("torchrec.sparse.jagged_tensor")
    return module is not None and isinstance(value, module.JaggedTensor)


def is_ragged(value: Any) -> bool:
    """Whether `value` is one argument of several tensors whose rows are of unequal lengths."""
    return is_kjt(value) or is_jagged(value)


def name_parts() -> None:
    """Lets a TorchRec KeyedTensor, whose pytree node has no names, be an input: the tensor `_values`."""
    module = sys.modules.get("torchrec.sparse.jagged_tensor")
    node = pytree.SUPPORTED_NODES.get(module.KeyedTensor) if module is not None else None
    if module is None or node is None or node.flatten_with_keys_fn is not None:
        return

    def named(value: Any) -> Any:
        return [(pytree.GetAttrKey("_values"), value.values())], node.flatten_fn(value)[1]

    pytree.SUPPORTED_NODES[module.KeyedTensor] = node._replace(flatten_with_keys_fn=named)


def join(keys: Sequence[str], atoms: Sequence[Tensor], weighted: bool, sides: Sequence[Provenance]) -> Any:
    """A KeyedJaggedTensor of `keys` from (values, lengths[, weights]) of each. Traced, it remembers its parts."""
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

    step = 3 if weighted else 2
    columns = [torch.cat(list(atoms[i::step])) for i in range(step)] if keys else [torch.zeros(0)] * step
    known: dict[str, Any] = {}
    if torch.compiler.is_exporting():
        parts = {}
        for i, (key, side) in enumerate(zip(keys, sides)):
            values, lengths, *rest = atoms[i * step : (i + 1) * step]
            parts[key] = JaggedTensor(values, lengths=lengths, weights=rest[0] if rest else None)
            parts[key].__dict__[SIDE] = side
        known = {"jt_dict": parts, "length_per_key": [p.values().shape[0] for p in parts.values()]}
        known["stride"] = atoms[1].shape[0] if keys else 0
    weights = columns[2] if weighted else None
    return KeyedJaggedTensor(keys=list(keys), values=columns[0], lengths=columns[1], weights=weights, **known)


@dataclass(frozen=True)
class Output:
    """One output of a collection: the feature looked up, its table, its name, its width."""

    feature: str
    table: str
    name: str
    width: int


@dataclass
class Lookup(LeafSite):
    """One call of a collection for some of its features; (values, lengths[, weights]) of each are its tensors.

    features: all the collection knows. keys: those looked up. outputs: what they give, in its order.
    each: how many values a row has, of the keys of which that is a constant. masked: the keys of which the tensors
    are (ids, mask), both `[B, L]`, for the values and lengths of what the mask keeps.
    """

    features: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()
    pooled: bool = True
    weighted: bool = False
    each: Mapping[str, int] = field(default_factory=dict)
    masked: tuple[str, ...] = ()

    def _of(self, key: str, tensors: Sequence[Any]) -> Sequence[Any]:
        step = 3 if self.weighted else 2
        at = self.keys.index(key) * step
        return tensors[at : at + step]

    def fake(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Empty outputs of the right shapes: `[B, width]` pooled, else `[values, width]`."""
        rows = [self._of(o.feature, tensors)[1 if self.pooled else 0].shape[0] for o in self.outputs]
        return [tensors[0].new_empty((n, o.width), dtype=torch.float32) for n, o in zip(rows, self.outputs)]

    def batching(self, given: Sequence[Batching]) -> Batching:
        """Rows for pooled outputs, the jagged values' own batching for others. Raises NotRowWise."""
        for key in self.keys:
            values, lengths, *weights = self._of(key, given)
            paired = isinstance(values, Ragged) and lengths == Lengths(lengths=values.lengths)
            if key in self.each:
                paired = values == Rows(0, inner=self.each[key]) and lengths == Rows(0)
            if key in self.masked:
                paired = values == lengths == Rows(0)
            if not paired or any(w != values for w in weights):
                raise NotRowWise(f"the lengths and values of {key!r} are not those of one jagged input")
        return Several(tuple(Rows(0) if self.pooled else self._of(o.feature, given)[0] for o in self.outputs))

    def call(self, root: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Looks the features up in the collection that is at `path` now."""
        module, tensors = root.get_submodule(self.path), self._jagged(tensors)
        if type(module).__module__ == _PLAIN and not module._forward_hooks and not module._forward_pre_hooks:
            return [self._table(module, o, *self._of(o.feature, tensors)) for o in self.outputs]
        found = module(self._all(tensors))
        by_name = found.to_dict() if self.pooled else {name: jagged.values() for name, jagged in found.items()}
        return [by_name[o.name] for o in self.outputs]

    def _jagged(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors, with values and lengths for what masks keep."""
        if not self.masked:
            return tensors
        pairs = ((key, *self._of(key, tensors)) for key in self.keys)
        return [t for key, a, b in pairs for t in ((a[b], b.sum(1)) if key in self.masked else (a, b))]

    def _table(
        self, module: Any, output: Output, values: Tensor, lengths: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        found: Tensor
        if self.pooled:
            offsets = offsets_of(lengths).to(values.dtype)
            found = module.embedding_bags[output.table](input=values, offsets=offsets, per_sample_weights=weights)
        else:
            found = module.embeddings[output.table](values)
        return found.float()

    def _all(self, tensors: Sequence[Tensor]) -> Any:
        """A KeyedJaggedTensor of every feature the collection knows; those not looked up have no values."""
        first = tensors[: 3 if self.weighted else 2]
        none = [t.new_empty(0) if i != 1 else torch.zeros_like(t) for i, t in enumerate(first)]
        flat = [t for f in self.features for t in (self._of(f, tensors) if f in self.keys else none)]
        return join(self.features, flat, self.weighted, ())


def collections_of(model: nn.Module, leaves: Sequence[str]) -> dict[str, nn.Module]:
    """TorchRec's unsharded embedding collections by path, but those that are, or lie in, a leaf."""
    names = ("EmbeddingBagCollection", "EmbeddingCollection")
    return {
        path: module
        for path, module in model.named_modules()
        if type(module).__module__ == _PLAIN
        and type(module).__name__ in names
        and not any(f"{path}.".startswith(f"{leaf}.") for leaf in leaves)
    }


@contextlib.contextmanager
def looked_up(model: nn.Module, leaves: Sequence[str], sites: list[LeafSite], pieces: Pieces) -> Iterator[None]:
    """While active, a traced call of an embedding collection is one `roo::leaf` for each side of its features."""
    found = collections_of(model, leaves)
    if not found:
        yield
        return
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    kept = {name: getattr(KeyedJaggedTensor, name) for name in KEEPING_PARTS}
    try:
        for name, method in KEEPING_PARTS.items():
            setattr(KeyedJaggedTensor, name, method(kept[name]))
        for path, module in found.items():
            module.__dict__["_compiled_call_impl"] = functools.partial(_traced, module, path, sites, pieces)
        with pieces:
            yield
    finally:
        for name, method in kept.items():
            setattr(KeyedJaggedTensor, name, method)
        for module in found.values():
            module.__dict__.pop("_compiled_call_impl", None)


def _traced(self: Any, path: str, sites: list[LeafSite], pieces: Pieces, features: Any) -> Any:
    """The call of collection `self` (so named for the capture to see whose failure it is)."""
    parts = _parts(features, pieces) if is_kjt(features) else None
    if parts is None or self._forward_hooks or self._forward_pre_hooks:
        raise TypeError(f"{type(self).__name__} {path!r} is called with features made within the model")
    pooled = hasattr(self, "embedding_bags")
    outputs = _outputs(self, pooled)
    weighted = pooled and self.is_weighted()
    if (weighted or not pooled) and any(parts[o.feature].masked for o in outputs):
        raise TypeError(
            f"{type(self).__name__} {path!r} is called with sequences of unequal lengths made within the model"
        )
    sides = {o.feature: parts[o.feature].side for o in outputs}
    results: dict[str, Tensor] = {}
    for side in dict.fromkeys(sides.values()):
        keys = tuple(f for f, s in sides.items() if s is side)
        mine = tuple(o for o in outputs if sides[o.feature] is side)
        each = {key: n for key in keys if (n := parts[key].each) is not None}
        masked = tuple(key for key in keys if parts[key].masked)
        site = Lookup(
            path,
            features=tuple(sides),
            keys=keys,
            outputs=mine,
            pooled=pooled,
            weighted=weighted,
            each=each,
            masked=masked,
        )
        tensors = [t for key in keys for t in parts[key].tensors[: 3 if weighted else 2]]
        made = torch.ops.roo.leaf(tensors, add_site(sites, site))
        results |= {o.name: t for o, t in zip(mine, made)}
    return _result(self, parts, outputs, results, pooled)


def _parts(features: Any, pieces: Pieces) -> dict[str, Piece] | None:
    """The parts of an input, or the pieces of what forward put together, by key."""
    known = features._jt_dict or {}
    if not known or not all(SIDE in vars(jagged) for jagged in known.values()):
        return pieces.of(features)
    return {key: Piece(_tensors(jagged), vars(jagged)[SIDE], None) for key, jagged in known.items()}


def _outputs(collection: Any, pooled: bool) -> list[Output]:
    if pooled:
        configs, named = collection.embedding_bag_configs(), collection._embedding_names
    else:
        configs = collection.embedding_configs()
        named = [name for names in collection.embedding_names_by_table() for name in names]
    pairs = [(config, feature) for config in configs for feature in config.feature_names]
    return [Output(f, c.name, name, c.embedding_dim) for (c, f), name in zip(pairs, named, strict=True)]


def _tensors(jagged: Any) -> list[Tensor]:
    weights = jagged.weights_or_none()
    return [jagged.values(), jagged.lengths(), *([] if weights is None else [weights])]


def _result(
    collection: Any, parts: dict[str, Piece], outputs: Sequence[Output], results: dict[str, Tensor], pooled: bool
) -> Any:
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

    if pooled:
        return KeyedTensor(
            keys=[o.name for o in outputs],
            length_per_key=[o.width for o in outputs],
            values=torch.cat([results[o.name] for o in outputs], dim=1),
        )
    return {
        o.name: JaggedTensor(
            values=results[o.name],
            lengths=parts[o.feature].tensors[1],
            weights=parts[o.feature].tensors[0] if collection.need_indices() else None,
        )
        for o in outputs
    }
