"""What a forward returns: a tree of tensors, sizes and plain values."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError


class Shape(tuple):  # type: ignore[type-arg]
    """A torch.Size in the structure of an output: torch's own rule for it makes a plain tuple."""


def _size(values: Iterable[Any], _: Any) -> Any:
    values = tuple(values)
    return torch.Size(values) if all(isinstance(v, (int, torch.SymInt)) for v in values) else Shape(values)


pytree.register_pytree_node(Shape, lambda shape: (list(shape), None), _size)


class _Computed:
    def __repr__(self) -> str:
        return "<computed>"


COMPUTED_VALUE = _Computed()
COMPUTED = (Tensor, torch.SymInt)
_KEPT = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, enum.Enum)


def flatten_output(out: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """A model's output as leaves; dataclasses and the like that torch does not know are registered.

    Raises CaptureError for an object that may hold tensors nobody can see.
    """
    for _ in range(8):
        values, tree = pytree.tree_flatten(out)
        unknown = {type(v) for v in values if hasattr(type(v), "__dataclass_fields__")}
        if not unknown:
            break
        for kind in unknown:
            torch.export.register_dataclass(kind)
    if any(_is_size(v) for v in pytree.tree_leaves(out, is_leaf=_is_size)):
        out = pytree.tree_map(lambda v: Shape(v) if _is_size(v) else v, out, is_leaf=_is_size)
        values, tree = pytree.tree_flatten(out)
    strange = next((v for v in values if not isinstance(v, (*COMPUTED, *_KEPT))), None)
    if strange is not None:
        raise CaptureError(f"forward returns a {type(strange).__name__}, which is no tensor and no plain value")
    return values, tree


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


def unflatten_output(out_values: Sequence[Any], out_tree: pytree.TreeSpec, tensors: Sequence[Tensor]) -> Any:
    """The flat outputs of the graph in the structure of the original's."""
    stock = iter(tensors)
    values = [next(stock) if v is COMPUTED_VALUE else v for v in out_values]
    return pytree.tree_unflatten(values, out_tree)
