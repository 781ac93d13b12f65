"""Batch objects: arguments that are no tuple, list or dict and hold tensors, as nodes of a call.

A dataclass, a dict of a class of its own, any object with attributes (RecBole's `Interaction`, a `UserDict`) is a node
whose children are its entries and its attributes. It is made again without a call of its constructor.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.kjt import is_ragged

_NEVER = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


def register_objects(tree: Any) -> None:
    """Makes pytree nodes of the objects in `tree`, at any depth, that hold tensors."""
    _register(tree, ())


def _register(tree: Any, above: tuple[int, ...]) -> bool:
    """Whether no object in `tree` holds one of `above`: one that holds itself is no node."""
    fine = True
    for value in pytree.tree_leaves(tree, is_leaf=is_ragged):
        if id(value) in above:
            return False
        held = _held(value)
        if not held:
            continue
        if not _register(held, (*above, id(value))):
            fine = False
        elif any(isinstance(v, Tensor) or is_ragged(v) for v in pytree.tree_leaves(held, is_leaf=is_ragged)):
            _node(type(value))
    return fine


def _held(value: Any) -> list[Any]:
    if isinstance(value, _NEVER) or is_ragged(value):
        return []
    entries = list(value.values()) if isinstance(value, dict) else []
    return entries + list(getattr(value, "__dict__", {}).values())


def _node(cls: type) -> None:
    if is_dataclass(cls):
        torch.export.register_dataclass(cls)
        return
    mapping = issubclass(cls, dict)
    base: Any = next((b for b in (OrderedDict, dict) if issubclass(cls, b)), object)

    def parts(value: Any) -> list[tuple[Any, Any]]:
        entries: list[tuple[Any, Any]] = [(pytree.MappingKey(k), v) for k, v in dict.items(value)] if mapping else []
        return entries + [(pytree.GetAttrKey(k), v) for k, v in getattr(value, "__dict__", {}).items()]

    def made(children: Iterable[Any], keys: list[Any]) -> Any:
        value = base.__new__(cls)
        for key, child in zip(keys, children):
            if isinstance(key, pytree.MappingKey):
                base.__setitem__(value, key.key, child)
            else:
                value.__dict__[key.name] = child
        return value

    pytree.register_pytree_node(
        cls,
        lambda value: ([child for _, child in parts(value)], [key for key, _ in parts(value)]),
        made,
        flatten_with_keys_fn=lambda value: (parts(value), [key for key, _ in parts(value)]),
    )
