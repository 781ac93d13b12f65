"""What a call gives on traced values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


def traced(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """`target(*args, **kwargs)` on fake tensors, in their mode; no size becomes a constant by it."""
    kwargs = kwargs or {}
    mode = next((v.fake_mode for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, FakeTensor)), None)
    with torch.no_grad():
        if mode is None:
            return target(*args, **kwargs)
        # The C++ form of a composite op asks for sizes as plain numbers (linear and matmul in 3 dims, torch 2.11).
        with mode, enable_python_dispatcher():
            return target(*args, **kwargs)
