"""The registry of row rules: one rule an op, found by import, never listed twice.

A rule answers one question: given where the batch lives in the operands, where does it live in the
result? It returns a Batching, or declines by raising NotRowWise with a reason.

The law every rule obeys, for every list of rows `idx` (repeats, permutations, none):

    op(x[idx]) == op(x)[idx]

Adding an op is one function and at least one case to test it with:

    @rule("aten.softmax.int", cases=[case("B 3 4", call=lambda n, x: (x, -1))])
    def softmax(call: Call) -> Batching:
        return along(call, "dim")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, RowIndex, Rows


@dataclass(frozen=True)
class Operand:
    """A tensor argument as a rule sees it: its shape (hints), dtype and batching."""

    shape: tuple[int, ...]
    batching: Batching
    dtype: torch.dtype = torch.float32

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def rows(self) -> Rows | None:
        """Where the batch is; None when the operand has none. Declines for anything else."""
        if isinstance(self.batching, Rows):
            return self.batching
        if isinstance(self.batching, Replicated):
            return None
        if isinstance(self.batching, RowIndex):
            raise NotRowWise("the row numbers arange(B) are used as values")
        raise NotRowWise(f"an operand is {type(self.batching).__name__}")


@dataclass(frozen=True)
class Call:
    """One application of an op: arguments by schema name, defaults filled in, tensors as Operands.

    batch: the batch size of the trace; sizes that depend on it appear as their hint.
    out: shape of each output, as traced.
    """

    name: str
    args: dict[str, Any]
    batch: int
    out: tuple[tuple[int, ...], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def operand(self, name: str) -> Operand:
        """The tensor argument `name`."""
        found = self.args[name]
        assert isinstance(found, Operand), f"{self.name}: {name} is {found!r}"
        return found

    def operands(self) -> list[Operand]:
        """Every tensor argument, those inside lists too, in order."""
        return list(_operands(self.args.values()))

    def replicated(self, *names: str) -> None:
        """Declines unless each of these arguments is absent or has no batch."""
        for name in names:
            value = self.args.get(name)
            if isinstance(value, Operand) and value.rows is not None:
                raise NotRowWise(f"{name} has a batch of its own")


def _operands(values: Iterable[Any]) -> Iterable[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _operands(value)


RuleFunction = Callable[[Call], Batching]
Build = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """A way to call the op in the test of the gather law.

    shapes: one string a tensor, `"B 3 4"`; `B` is the batch, `B*3` and `3*B` the batch merged with an
    inner or outer dim; a prefix sets the values drawn: `i:` int64 below 4, `b:` bool, `p:` positive,
    `u:` in (0, 1), `c:` complex.
    call: `(n, *tensors) -> args`, or `-> (args, kwargs)` where the last is a dict; n is the batch size.
    declines: the rule must decline here (a negative test), because the law does not hold.
    """

    shapes: tuple[str, ...]
    call: Build
    declines: bool = False


def case(*shapes: str, call: Build | None = None, declines: bool = False) -> Case:
    """A Case; without `call` the tensors are the positional arguments."""
    return Case(shapes, call or (lambda n, *tensors: tensors), declines)


@dataclass(frozen=True)
class Rule:
    """A registered rule. `sizes` names the arguments that may depend on the batch size;
    `special` lists batchings other than Rows and Replicated that its operands may have."""

    op: str
    function: RuleFunction
    cases: tuple[Case, ...]
    sizes: frozenset[str] = frozenset()
    special: tuple[type[Batching], ...] = ()


@dataclass
class _Registry:
    rules: dict[str, Rule] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)


_REGISTRY = _Registry()


def rule(
    *ops: str,
    cases: Sequence[Case],
    sizes: Sequence[str] = (),
    special: tuple[type[Batching], ...] = (),
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a function as the rule of `ops` (`"aten.softmax.int"`). A second rule for an op is an error."""

    def register(function: RuleFunction) -> RuleFunction:
        for op in ops:
            _once(op)
            _REGISTRY.rules[op] = Rule(op, function, tuple(cases), frozenset(sizes), special)
        return function

    return register


def no_rule(reason: str, *ops: str) -> None:
    """Records why these ops can have no rule: they mix rows by their nature."""
    for op in ops:
        _once(op)
        _REGISTRY.declined[op] = reason


def _once(op: str) -> None:
    if op in _REGISTRY.rules or op in _REGISTRY.declined:
        raise ValueError(f"{op} has a rule already")


def find(op: str) -> Rule | None:
    """The rule of an op named like `aten.softmax.int`."""
    return _REGISTRY.rules.get(op)


def reason_without_rule(op: str) -> str:
    """Why an op has no rule, or that nobody has written one."""
    return _REGISTRY.declined.get(op, f"no row rule for {op}")


def registered() -> dict[str, Rule]:
    """Every rule by op name."""
    return dict(_REGISTRY.rules)


def declined() -> dict[str, str]:
    """Every op that can have no rule, and why."""
    return dict(_REGISTRY.declined)


def op_name(target: Any) -> str:
    """`aten.softmax.int` for an OpOverload; the qualified name of anything else."""
    if isinstance(target, OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
