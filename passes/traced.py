"""What a call gives on traced values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from roo_rewrite.errors import NotRowWise


def traced(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """`target(*args, **kwargs)` on fake tensors, in their mode; no size becomes a constant by it.

    Raises NotRowWise where the call asks what a size is, as the result would hold for the traced batch only. What is
    known of the sizes is then as it was.
    """
    kwargs = kwargs or {}
    mode = next((v.fake_mode for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, FakeTensor)), None)
    with torch.no_grad():
        if mode is None:
            return target(*args, **kwargs)
        # The C++ form of a composite op asks for sizes as plain numbers (linear and matmul in 3 dims, torch 2.11).
        with mode, enable_python_dispatcher(), _unanswered(mode.shape_env):
            try:
                return target(*args, **kwargs)
            except GuardOnDataDependentSymNode as e:
                raise NotRowWise(f"{target} asks for the number that {e.cond} is") from e


def called(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    """A new node `target(*args)`, with its traced value."""
    made = graph.call_function(target, args)
    made.meta["val"] = traced(target, map_arg(args, lambda n: n.meta["val"]))
    return made


@contextlib.contextmanager
def _unanswered(env: ShapeEnv | None) -> Iterator[None]:
    """While active, a question whose answer would make a size a number is an error. `s >= 16`, by which torch chooses
    a kernel, may be asked.

    torch asks `_check_frozen` first, before it notes anything (its own `error_on_new_guards` does the same, but is
    not in torch 2.11). Of this error it knows that the size has no answer.
    """

    def refuse(expr: sympy.Basic, value: sympy.Basic) -> None:
        pins = value == (sympy.true if isinstance(expr, sympy.Eq) else sympy.false)
        if isinstance(expr, Relational) and not (isinstance(expr, (sympy.Eq, sympy.Ne)) and pins):
            return
        raise GuardOnDataDependentSymNode(expr, f"{expr} is {value} for the traced batch only")

    if env is None:
        yield
        return
    vars(env)["_check_frozen"] = refuse
    try:
        yield
    finally:
        del vars(env)["_check_frozen"]
