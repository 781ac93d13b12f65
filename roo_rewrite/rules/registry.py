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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._ops import OpOverload

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Ragged, Replicated, RowIndex, Rows, Several


class Extent(int):
    """An integer argument or extent that depends on the batch size; its value is the hint of the trace."""

    def __mul__(self, other: int) -> Extent:
        return Extent(int(self) * int(other))

    def __add__(self, other: int) -> Extent:
        return Extent(int(self) + int(other))

    __rmul__ = __mul__
    __radd__ = __add__


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
        if isinstance(self.batching, Lengths):
            return Rows(0)
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

    batch: the batch size of the trace; integers that depend on it are `Extent`s.
    out: shape of each output, as traced. several: whether the op returns a list or a tuple.
    random: whether it may draw random numbers.
    """

    name: str
    args: dict[str, Any]
    batch: int
    out: tuple[tuple[int, ...], ...] = ()
    several: bool = False
    random: bool = False

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
    inner or outer dim, `R` the values of a jagged pair. A prefix sets what is drawn (float64 integers
    without): `f:` the same in float32, `i:` int64 below 4, `b:` bool, `p:` positive, `u:` in (0, 1),
    `c:` complex, `s:` sorted along the last dim, `m:` regular symmetric matrices. `#B*2 1` is
    `2 * arange(B)` laid along dim 0; `lengths`, `offsets`, `starts` (without the total) and `ends`
    (without the first 0) are those of the jagged pair.
    call: `(n, *tensors) -> args`, or `-> (args, kwargs)` where the last is a dict; n is the batch size.
    declines: the rule must decline here (a negative test), because the law does not hold. The batch drawn has
    7 rows then, so that a `7` is a dim of a value without a batch that has an entry per row.
    empty: False where the op itself cannot run on a batch of no rows.
    """

    shapes: tuple[str, ...]
    call: Build
    declines: bool = False
    empty: bool = True


def case(*shapes: str, call: Build | None = None, declines: bool = False, empty: bool = True) -> Case:
    """A Case; without `call` the tensors are the positional arguments."""
    return Case(shapes, call or (lambda n, *tensors: tensors), declines, empty)


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    sizes: the arguments that may depend on the batch size.
    special: batchings other than Rows and Replicated that its operands may have.
    places: the op only places the entries of its first operand, so that row numbers and lengths stay what they are.
    """

    op: str
    function: RuleFunction
    cases: tuple[Case, ...]
    sizes: frozenset[str] = frozenset()
    special: tuple[type[Batching], ...] = ()
    places: bool = False


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
    places: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a function as the rule of `ops` (`"aten.softmax.int"`). A second rule for an op is an error."""

    def register(function: RuleFunction) -> RuleFunction:
        for op in ops:
            _once(op)
            _REGISTRY.rules[op] = Rule(op, function, tuple(cases), frozenset(sizes), special, places)
        return function

    return register


def no_rule(reason: str, *ops: str) -> None:
    """Records why these ops can have no rule: they mix rows by their nature, say."""
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


def make_call(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operand_of: Callable[[Any], Any],
    batch: int,
    out: Sequence[Sequence[int]],
) -> Call:
    """The Call of `op(*args, **kwargs)`: arguments by schema name, defaults filled in.

    operand_of maps each leaf of the arguments: a tensor to its Operand, an integer that depends on the
    batch size to an Extent, anything else to itself.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [convert(v) for v in value]
        return operand_of(value)

    schema = op._schema
    named: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        named[argument.name] = convert(given)
    several = len(schema.returns) > 1 or any(str(r.type).startswith("List") for r in schema.returns)
    random = torch.Tag.nondeterministic_seeded in op.tags
    return Call(str(op), named, batch, tuple(tuple(shape) for shape in out), several, random)


def infer(call: Call) -> Batching:
    """Where the batch lives in the result of `call`: `Several` for an op with several outputs.

    Raises NotRowWise, with the reason, where there is no rule or the rule declines. A rule sees sizes as hints:
    the caller, who knows them as symbols, confirms that `Rows(dim, outer, inner)` has `outer * B * inner` entries
    in that dim and that no other dim depends on the batch.
    """
    if not _batched(call) and not call.random:
        return Several((Replicated(),) * len(call.out)) if call.several else Replicated()
    found = find(call.name)
    if found is None:
        raise NotRowWise(reason_without_rule(call.name))
    return apply(found, call)


def apply(found: Rule, call: Call) -> Batching:
    """What the rule says of `call`; on values of a jagged pair, unless it knows them, element by element."""
    for name, value in call.args.items():
        if name not in found.sizes and _has_extent(value):
            raise NotRowWise(f"{name} depends on the batch size")
    if found.places and isinstance(_first(call).batching, (RowIndex, Lengths)):
        return _placed(found, call)
    if Ragged not in found.special:
        return _on_elements(found, call)
    return found.function(call)


def _first(call: Call) -> Operand:
    return call.operands()[0]


def _placed(found: Rule, call: Call) -> Batching:
    """Runs a rule on row numbers or lengths as on rows; they stay what they are with one entry a row."""
    x = _first(call)
    rows = x.batching if isinstance(x.batching, RowIndex) else Rows(0)
    name = next(iter(call.args))
    result = found.function(replace(call, args={**call.args, name: replace(x, batching=Rows(rows.dim))}))
    if isinstance(result, Rows) and result == Rows(result.dim):
        if isinstance(x.batching, RowIndex):
            return replace(x.batching, dim=result.dim)
        if len(call.out[0]) == 1:
            return x.batching
    if isinstance(x.batching, RowIndex):
        raise NotRowWise("the row numbers arange(B) leave their dim")
    return result


def _has_extent(value: Any) -> bool:
    return isinstance(value, Extent) or (isinstance(value, (list, tuple)) and any(map(_has_extent, value)))


def _batched(call: Call) -> bool:
    return _has_extent(list(call.args.values())) or any(not isinstance(o.batching, Replicated) for o in call.operands())


def _on_elements(found: Rule, call: Call) -> Batching:
    """Gathering rows gathers elements of jagged values, and an op that is row-wise in dim 0 commutes with that too."""
    ragged = {o.batching: o.shape[0] for o in call.operands() if isinstance(o.batching, Ragged)}
    if not ragged:
        return found.function(call)
    others = any(not isinstance(o.batching, (Ragged, Replicated)) for o in call.operands())
    if len(ragged) > 1 or others or _has_extent([*call.args.values()]):
        raise NotRowWise("jagged values meet values of other rows")
    ((kind, total),) = ragged.items()
    flat = replace(call, batch=total, args={name: _flattened(value) for name, value in call.args.items()})
    result = found.function(flat)
    parts = result.parts if isinstance(result, Several) else (result,)
    if any(p not in (Rows(0), Replicated()) for p in parts):
        raise NotRowWise("the elements of jagged values leave dim 0")
    lifted = tuple(kind if p == Rows(0) else p for p in parts)
    return Several(lifted) if isinstance(result, Several) else lifted[0]


def _flattened(value: Any) -> Any:
    """Jagged operands as operands with a row per element."""
    if isinstance(value, (list, tuple)):
        return [_flattened(v) for v in value]
    if isinstance(value, Operand) and isinstance(value.batching, Ragged):
        return replace(value, batching=Rows(0))
    return value


def op_name(target: Any) -> str:
    """`aten.softmax.int` for an OpOverload; the qualified name of anything else."""
    if isinstance(target, OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
