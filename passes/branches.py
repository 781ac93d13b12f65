"""One trace for both ways of `if mask.any():`.

T goes in, N stays out. On a batch that stays out no entry of the mask is true; with that known, T is rewritten

    index_put(x, [M], v), masked_fill(x, M, v), where(M, v, x), select_scatter(x, select(x)), clone(x)  ->  x

and where nothing but N is left, T stands for both. Beside `all` the same with a mask that is true everywhere. Of
several conditions every choice of ways is looked at; conditions that are one value are one.

T also runs, on such a batch, what only it does; so those are ops that raise on no values, and whose gradients of zero
are zero.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from passes.drawn import drawn_order, draws
from passes.functionalize import keeps
from passes.normalize import normalize
from roo_rewrite.branches import MOST, Place
from roo_rewrite.capture import Captured
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import AUTOCAST, EFFECT

aten = torch.ops.aten
_Key = Hashable

_COPIES = {aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default}
_RESHAPED = {"view", "unsqueeze", "squeeze", "expand", "slice", "select", "permute", "transpose", "contiguous", "t"}
_RESHAPED |= {"reshape", "repeat", "detach", "expand_as", "view_as", "flatten"}
_NOT = {aten.logical_not.default, aten.bitwise_not.default}
_AND = {aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor}
_OR = {aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor}
_PLACED = {aten.select_scatter.default: aten.select.int, aten.slice_scatter.default: aten.slice.Tensor}
# What only T does: nothing that looks entries up, asks anything of values, or has them in its gradient.
_TOTAL = {"index_put", "masked_fill", "where", "select_scatter", "slice_scatter", "fill", "zeros_like", "ones_like"}
_TOTAL |= {"full_like", "full", "zeros", "ones", "add", "sub", "eq", "ne", "lt", "gt", "le", "ge", "to"}
_TOTAL |= {"clone", "logical_not", "bitwise_not", "logical_and", "bitwise_and", "logical_or", "bitwise_or", "sym_size"}
_TOTAL |= {"any", "all", "isnan", "isinf", "lift_fresh_copy", "copy", *_RESHAPED}


class _Numbers:
    """Equal values of traces of one model have equal numbers.

    known: the masks, by number, that are true everywhere or nowhere. passed: ops that give an operand back for it.
    """

    def __init__(self) -> None:
        self._numbers: dict[_Key, int] = {}
        self._acts = 0
        self.known: dict[int, bool] = {}
        self.passed = set[Node]()

    def of(self, captured: Captured) -> dict[Node, int]:
        """The number of each node. Raises ValueError where the graph holds what has none."""
        made: dict[Node, int] = {}
        inputs = self._acts = 0
        for at, node in enumerate(captured.graph.nodes):
            if node.op == "placeholder":
                made[node] = self._number(("input", inputs))
                inputs += 1
            elif node.op == "get_attr":
                made[node] = self._number(_held(captured, str(node.target)))
            elif node.op == "call_function":
                made[node] = self._call(node, made)
            elif node.op != "output":
                raise ValueError(f"{node.op} at {at}")
        return made

    def _number(self, key: _Key) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _call(self, node: Node, made: dict[Node, int]) -> int:
        if EFFECT in node.meta:
            raise ValueError(f"{node.target} writes")
        same = self._simpler(node, made)
        if same is not None:
            return same
        arguments = _frozen((node.args, sorted(node.kwargs.items())), made)
        key: _Key = (node.target, arguments, str(node.meta.get(AUTOCAST)))
        if keeps(node):  # the n-th of those that draw, or update statistics
            self._acts += 1
            key = (key, self._acts)
        number = self._number(key)
        truth = self._truth(node, made)
        if truth is not None:
            self.known[number] = truth
        return number

    def _is(self, value: Any, made: dict[Node, int]) -> bool | None:
        return self.known.get(made[value]) if isinstance(value, Node) else None

    def _simpler(self, node: Node, made: dict[Node, int]) -> int | None:
        """The number of the operand that this op gives back."""
        if node.target in _COPIES:
            return made[node.args[0]]  # type: ignore[index]
        kept = self._kept(node, made)
        if not isinstance(kept, Node):
            return None
        before, after = kept.meta["val"], node.meta["val"]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            return None
        self.passed.add(node)
        return made[kept]

    def _kept(self, node: Node, made: dict[Node, int]) -> Any:
        args: Any = node.args
        if node.target is aten.index_put.default:
            return args[0] if any(self._is(i, made) is False for i in args[1] if i is not None) else None
        if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return args[0] if self._is(args[1], made) is False else None
        if node.target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
            truth = self._is(args[0], made)
            return None if truth is None else args[1] if truth else args[2]
        if node.target in _PLACED:
            taken = (_PLACED[node.target], _frozen(((args[0], *args[2:]), []), made), "None")
            return args[0] if self._numbers.get(taken) == made[args[1]] else None
        return None

    def _truth(self, node: Node, made: dict[Node, int]) -> bool | None:
        args = [self._is(a, made) for a in node.args]
        if node.target in _NOT and args[0] is not None:
            return not args[0]
        if node.target in _AND and False in args:
            return False
        if node.target in _OR and True in args:
            return True
        return args[0] if _name(node) in _RESHAPED and node.meta["val"].dtype == torch.bool else None


def _name(node: Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, OpOverload) else str(node.target)


def _frozen(value: Any, made: dict[Node, int]) -> _Key:
    if isinstance(value, Node):
        return ("node", made[value])
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, made) for v in value)
    if isinstance(value, slice):
        return ("slice", *(_frozen(v, made) for v in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _held(captured: Captured, name: str) -> _Key:
    """A parameter or buffer by its name; a constant of the trace by what is in it."""
    value = captured.constants.get(name.removeprefix("_roo."))
    if not name.startswith("_roo.") or not isinstance(value, Tensor):
        return ("held", name)
    return ("constant", str(value.dtype), tuple(value.shape), str(value.tolist()))


def settled(captured: Captured) -> bool:
    """Whether the trace stands for every way through its conditions; they are its outputs no longer then."""
    count = len(captured.branches)
    assert captured.again is not None
    try:
        general = captured.again(frozenset())
        if captured.sites or general.branches != captured.branches or not _proved(general):
            return False
    except (CaptureError, ValueError):  # one of the ways cannot be traced, or numbered
        return False
    output = captured.graph.output_node()
    output.args = (tuple(output.args[0])[:-count],)  # type: ignore[arg-type]
    captured.branches = ()
    return True


def _proved(general: Captured) -> bool:
    normalize(general)
    numbers = _Numbers().of(general)
    alike: dict[int, list[Place]] = {}
    for place, condition in zip(general.branches, _conditions(general)):
        alike.setdefault(numbers[condition], []).append(place)
    if len(alike) > MOST or any(_mask(c) is None for c in _conditions(general)):
        return False
    choices = (combinations(alike, k) for k in range(1, len(alike) + 1))
    return all(_same(general, choice, alike) for choice in chain.from_iterable(choices))


def _conditions(captured: Captured) -> list[Node]:
    returned: Any = captured.graph.output_node().args[0]
    return list(returned[len(returned) - len(captured.branches) :])


def _mask(condition: Node) -> tuple[Node, bool] | None:
    """The mask, and what it is on a batch that goes the other way."""
    other = {aten.any.default: False, aten.all.default: True}.get(condition.target)  # type: ignore[call-overload]
    mask = condition.args[0] if condition.args else None
    found = isinstance(mask, Node) and isinstance(other, bool) and mask.meta["val"].dtype == torch.bool
    return (mask, other) if found else None  # type: ignore[return-value]


def _same(general: Captured, choice: Iterable[int], alike: dict[int, list[Place]]) -> bool:
    """Whether the general trace is the one that goes the other way at the chosen conditions, on batches that do."""
    assert general.again is not None
    other = general.again(frozenset(place for number in choice for place in alike[number]))
    if other.sites or not set(other.branches) <= set(general.branches):
        return False
    normalize(other)
    numbers = _Numbers()
    mine = numbers.of(general)
    known = dict(zip(general.branches, _conditions(general)))
    for number in choice:
        found = _mask(known[alike[number][0]])
        assert found is not None
        numbers.known[mine[found[0]]] = found[1]
        mine = numbers.of(general)
    others = numbers.of(other)
    theirs = set(others.values())
    extra = [n for n in mine if (mine[n] not in theirs or n in numbers.passed) and n.op == "call_function"]
    asked = dict(zip(other.branches, _conditions(other)))
    return (
        all(_total(n) and _no_gradient(n, mine, theirs) for n in extra)
        and all(mine[known[place]] == others[condition] for place, condition in asked.items())
        and [mine[n] for n in mine if _acts(n)] == [others[n] for n in others if _acts(n)]
        and _orders(mine) == _orders(others)
        and _results(general, mine) == _results(other, others)
        and (general.out_values, general.out_tree) == (other.out_values, other.out_tree)
        and general.accepts == other.accepts
    )


def _acts(node: Node) -> bool:
    return node.op == "call_function" and keeps(node)


def _orders(nodes: Iterable[Node]) -> list[list[int] | None]:
    """In what order each draw goes through its operand: in another one, equal seeds give other masks."""
    return [drawn_order(n) for n in nodes if draws(n)]


def _total(node: Node) -> bool:
    """Whether an op raises on no values of its operands."""
    if node.target is not aten.index_put.default:
        return _name(node) in _TOTAL or getattr(node.target, "__module__", "") == "_operator"
    base, indices, value = (node.args[0], node.args[1], node.args[2])
    masks = [i.meta["val"] for i in indices if isinstance(i, Node)]  # type: ignore[union-attr]
    one = isinstance(base, Node) and isinstance(value, Node) and value.meta["val"].numel() == 1
    return one and len(masks) == 1 and masks[0].dtype == torch.bool


def _no_gradient(node: Node, mine: dict[Node, int], theirs: set[int]) -> bool:
    """Whether an op reads no parameter that N does not: the gradient N leaves alone would be zero."""
    return all(
        n.op != "get_attr" or mine[n] in theirs or str(n.target).startswith("_roo.") for n in node.all_input_nodes
    )


def _results(captured: Captured, numbers: dict[Node, int]) -> _Key:
    returned: Any = captured.graph.output_node().args[0]
    return _frozen(returned[: len(returned) - len(captured.branches)], numbers)
