"""Numbers that forward draws from Python's or NumPy's generator and that reach nothing it returns.

A trace takes a number for a constant, so a model that draws one is not traced. Some draw one in eval too, where only
training reads it (a random time window, a random mask). While tracing, such a number is made by an operator, so that
the graph shows what depends on it:

    before                                    after
    n = item(roo.drawn_number("random.randint"))
    late = lt(age, n)                         (nothing: no output depends on n)
    return sum(age)                           return sum(age)

A branch on the number, or a size made of it, ends the trace. What is drawn past the functions known here is seen by
the state of the generator.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

# Functions that return one number, and its dtype; those of NumPy many, if asked for a size.
_FUNCTIONS = {
    "random": dict.fromkeys(["random", "uniform"], torch.float64)
    | dict.fromkeys(["randint", "randrange"], torch.int64),
    "numpy.random": dict.fromkeys(["random", "random_sample", "rand", "uniform"], torch.float64)
    | {"randint": torch.int64},
}


@torch.library.custom_op("roo::drawn_number", mutates_args=())
def drawn_number(function: str) -> Tensor:
    """Stands in a trace for one number that a function draws, `[]`; no program runs it."""
    raise NotImplementedError(function)


@drawn_number.register_fake
def _(function: str) -> Tensor:
    owner, _, name = function.rpartition(".")
    return torch.empty((), dtype=_FUNCTIONS[owner][name])


@dataclass
class Draws:
    """count: numbers drawn by functions known here. others: whether anything else moved the generator."""

    count: int = 0
    others: bool = False


def _state() -> tuple[Any, ...]:
    """Of both generators, as values."""
    numpy = sys.modules.get("numpy")
    kind, keys, *rest = numpy.random.get_state() if numpy is not None else ("", b"")
    return random.getstate(), kind, bytes(keys), *rest


@contextlib.contextmanager
def _replaced(make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    owners = {owner: sys.modules[owner] for owner in _FUNCTIONS if owner in sys.modules}
    kept = {(owner, name): getattr(module, name) for owner, module in owners.items() for name in _FUNCTIONS[owner]}
    try:
        for (owner, name), function in kept.items():
            setattr(owners[owner], name, make(f"{owner}.{name}", function))
        yield
    finally:
        for (owner, name), function in kept.items():
            setattr(owners[owner], name, function)


@contextlib.contextmanager
def counted(seed: int) -> Iterator[Draws]:
    """Runs code with both generators seeded, and counts what it draws; the generators end as they were."""
    found, numpy = Draws(), sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy is not None else None
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    last = _state()

    def make(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            found.others |= _state() != last
            number = function(*args, **kwargs)
            found.others |= not isinstance(number, (int, float))
            found.count, last = found.count + 1, _state()
            return number

        return draw

    try:
        with _replaced(make):
            yield found
        found.others |= _state() != last
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])


@contextlib.contextmanager
def symbolic_draws() -> Iterator[Draws]:
    """While tracing: a number drawn is a symbol that `drawn_number` makes."""
    found = Draws()

    def make(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            found.count += 1
            return drawn_number(name).item()

        return draw

    with _replaced(make):
        yield found


def drop_unread(graph: Graph) -> bool:
    """Takes out what depends on a number drawn, in place. False, and nothing done, where an output or a write may."""
    reached: set[Node] = {n for n in graph.nodes if n.target is torch.ops.roo.drawn_number.default}
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            if not _only_a_value(node):
                return False
            reached.add(node)
    for node in reversed(list(graph.nodes)):
        if node in reached:
            graph.erase_node(node)
    return True


def _only_a_value(node: Node) -> bool:
    """Whether all that a call does is to return a value."""
    if isinstance(node.target, OpOverload):
        draws = torch.Tag.nondeterministic_seeded in node.target.tags
        return node.target.namespace == "aten" and not node.target._schema.is_mutable and not draws
    return node.op == "call_function" and getattr(node.target, "__module__", None) in ("_operator", "math", "torch")


__all__ = ["Draws", "counted", "drawn_number", "drop_unread", "symbolic_draws"]
