"""Lazy modules: parameters whose shapes the first call finds out, or that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError


def give_shapes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Calls `model` once, as its first user would, where it has parameters or buffers without a shape.

    In eval mode, so that nothing else of it changes. Raises CaptureError where it cannot be called with the example.
    """
    held = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    if any(t is not None and is_lazy(t) for t in held):
        _call(model, args, kwargs)


def give_parameters(model: nn.Module, called: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Calls `model` once where a copy of it that was `called` has parameters that it lacks, made in its first call.

    Each copy would draw its own. Whether it did; it raises as `give_shapes` does.
    """
    if not _made(model, called):
        return False
    _call(model, args, kwargs)
    return True


def refuse_parameters(model: nn.Module, called: nn.Module) -> None:
    """Raises CaptureError where a copy of `model` that was `called` has parameters that it lacks."""
    if made := _made(model, called):
        raise CaptureError(f"forward makes new parameters in every call, such as {made[0]!r}; make them in __init__")


def _made(model: nn.Module, called: nn.Module) -> list[str]:
    known = dict(model.named_parameters())
    return [name for name, _ in called.named_parameters() if name not in known]


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    modes = [(m, m.training) for m in model.modules()]
    given = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
    try:
        with torch.no_grad():
            model.eval()(*given[0], **given[1])
    except Exception as e:  # whatever user code raises
        raise CaptureError(f"the model cannot be called with the example: {type(e).__name__}: {e}") from e
    finally:
        for module, training in modes:
            module.training = training
