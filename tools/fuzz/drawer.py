"""Draws a program: a pool of values, and steps that take some of them and put others in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tools.fuzz.recorder import F64, Recorder, Size, UnusableError, sides, val

WIDEST = 64
STEPS: dict[str, tuple[Callable[[Drawer], Any], float]] = {}


@dataclass(frozen=True)
class Step:
    """One step of `STEPS` by name, and the seed it draws from."""

    name: str
    seed: int


def step(weight: float = 1.0) -> Callable[[Callable[[Drawer], Any]], Callable[[Drawer], Any]]:
    """Registers a step under its name: `weight` times as likely as others. What it returns goes into the pool."""

    def register(function: Callable[[Drawer], Any]) -> Callable[[Drawer], Any]:
        assert function.__name__ not in STEPS
        STEPS[function.__name__] = function, weight
        return function

    return register


def shape_of(node: Node) -> list[Any]:
    """Its sizes; that of the batch is a Size."""
    return list(val(node).shape)


@dataclass
class Drawer:
    """The program being drawn.

    request: names of the request-level inputs. low: whether it may compute in less than float64.
    """

    r: Recorder
    request: frozenset[str]
    low: bool = False
    pool: list[Node] = field(default_factory=list)
    chance: random.Random = field(default_factory=random.Random)

    def take(self, step_: Step) -> str:
        """Runs one step, all of it or nothing of it: why it was left out."""
        self.chance = random.Random(step_.seed)
        mark, size = self.r.mark(), len(self.pool)
        self.r.generator.manual_seed(step_.seed)
        try:
            for made in self._several(STEPS[step_.name][0](self)):
                self.put(made)
        except UnusableError as e:
            self.r.undo(mark)
            del self.pool[size:]
            return str(e)
        return ""

    def _several(self, made: Any) -> Sequence[Node]:
        return made if isinstance(made, (list, tuple)) else [made]

    # -- chance

    def maybe(self, p: float = 0.5) -> bool:
        """True with probability p."""
        return self.chance.random() < p

    def one(self, *choices: Any) -> Any:
        """One of these."""
        return self.chance.choice(choices)

    def number(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return self.chance.randint(low, high)

    def scale(self) -> float:
        """A plain number."""
        return self.one(0.5, -1.5, 2, 0.25, 1.0, -0.75)

    # -- out of the pool

    def pick(self, fits: Callable[[Node], bool] = lambda n: True, side: str = "") -> Node:
        """A value, later ones more likely; side: "request" or "impression" for one of that side alone."""
        found = [n for n in self.pool if fits(n) and (not side or self.side(n) == side)]
        if not found:
            raise UnusableError(f"no value on the {side} side fits")
        return self.chance.choices(found, [1 + 0.3 * i for i in range(len(found))])[0]

    def side(self, node: Node) -> str:
        """ "request", "impression", "both", or "" for what depends on no input."""
        names = sides(node)
        mine = {n in self.request for n in names}
        return "" if not mine else "both" if len(mine) > 1 else "request" if True in mine else "impression"

    def some(self, low: int = 2, high: int = 4, fits: Callable[[Node], bool] | None = None) -> list[Node]:
        """Several float values; mostly one of each side among them, in any order."""
        fits = fits or floating
        picks = []
        for side in ("request", "impression"):
            if self.maybe(0.8):
                try:
                    picks.append(self.pick(fits, side))
                except UnusableError:
                    continue
        while len(picks) < self.number(low, high):
            picks.append(self.pick(fits))
        self.chance.shuffle(picks)
        return picks

    # -- into a shape

    def rows(self, x: Node) -> Node:
        """The value with its batch in dim 0."""
        dim = batch_dim(x)
        if dim == 0:
            return x
        if dim is None:
            raise UnusableError("no plain batch")
        if self.maybe():
            order = [dim, *(d for d in range(val(x).ndim) if d != dim)]
            return self.r("permute.default", x, order)
        return self.r("transpose.int", x, 0, dim)

    def flat(self, x: Node) -> Node:
        """The value as `[B, K]`."""
        x = self.rows(x)
        if val(x).ndim == 1:
            return self.r("unsqueeze.default", x, self.one(1, -1))
        if val(x).ndim == 2:
            return x
        if self.maybe(0.4):
            return self.r("reshape.default", x, [val(x).shape[0], -1])
        return self.r("flatten.using_ints", x, 1) if self.maybe() else self.r("reshape.default", x, [-1, per_row(x)])

    def matrix(self, x: Node, width: int = 0) -> Node:
        """The value as `[B, width]`."""
        x = self.flat(x)
        have = int(val(x).shape[1])
        if not width or have == width:
            return x
        if have > width and self.maybe(0.6):
            start = self.number(0, have - width)
            return self.r("slice.Tensor", x, 1, start, start + width)
        if have == 1 and self.maybe(0.7):
            return self.r("expand.default", x, [-1, width])
        if floating(x) and self.maybe(0.6):
            return self.r("linear.default", x, self.r.weight(width, have))
        columns = torch.arange(width) % have
        if self.maybe(0.3):
            columns = columns.flip(0)
        return self.r("index_select.default", x, 1, columns)

    def cube(self, x: Node, tokens: int, width: int) -> Node:
        """The value as `[B, tokens, width]`."""
        if val(x).ndim == 3 and batch_dim(x) == 0 and shape_of(x)[1:] == [tokens, width]:
            return x
        x = self.matrix(x, tokens * width)
        if self.maybe(0.4):
            return self.r("unflatten.int", x, 1, [tokens, width])
        return self.r(self.one("view.default", "reshape.default"), x, [val(x).shape[0], tokens, width])

    # -- into the pool

    def put(self, made: Node) -> None:
        """A result into the pool: real, of one plain batch dim, of moderate width."""
        if val(made).dtype.is_complex:
            made = self.r("real.default", made)
        if val(made).dtype not in (F64, torch.int64, torch.bool) and (not self.low or self.maybe()):
            made = self.r("to.dtype", made, F64)
        made = self._one_batch(made)
        if batch_dim(made) is not None and per_row(made) > WIDEST:
            made = self.r("slice.Tensor", self.flat(made), 1, 0, WIDEST // 2)
        self.pool.append(made)

    def _one_batch(self, x: Node) -> Node:
        grown = [d for d, s in enumerate(shape_of(x)) if isinstance(s, Size)]
        if len(grown) == 1 and batch_dim(x) is None:
            return self._unmerged(x, grown[0])
        if not grown:
            like = self.matrix(self.pick(floating), 1)
            x = self.r("reshape.default", x, [1, -1]) if val(x).ndim else x
            return self.r("mul.Tensor", like, x)
        if len(grown) > 1:
            x = (
                self.r("sum.dim_IntList", x, grown[1:])
                if val(x).dtype != torch.bool
                else self.r("any.dim", x, grown[-1])
            )
            return self._one_batch(x)
        return x

    def _unmerged(self, x: Node, dim: int) -> Node:
        size = val(x).shape[dim]
        assert isinstance(size, Size)
        rows, times = Size(1, size.of), size.times
        if size.of != "B" or size.more:
            raise UnusableError("no multiple of the batch")
        parts = self.one([rows, times], [rows, times], [times, rows])
        return self.r("unflatten.int", x, dim, parts)

    def tame(self, x: Node) -> Node:
        """Finite and small."""
        if self.maybe(0.3):
            x = self.r("nan_to_num.default", x, 0.5, 2.0, -2.0)
        return self.r("tanh.default", x)


def batch_dim(node: Node) -> int | None:
    """Where the batch lies, alone in a dim."""
    grown = [d for d, s in enumerate(shape_of(node)) if isinstance(s, Size)]
    return grown[0] if len(grown) == 1 and val(node).shape[grown[0]] == Size(1) else None


def per_row(node: Node) -> int:
    """Entries of a row."""
    product = 1
    for size in shape_of(node):
        product *= 1 if isinstance(size, Size) else int(size)
    return product


def floating(node: Node) -> bool:
    """Whether a value is a float64 one with a plain batch."""
    return val(node).dtype is F64 and batch_dim(node) is not None


def integral(node: Node) -> bool:
    """Whether a value holds integers, one batch."""
    return val(node).dtype is torch.int64 and batch_dim(node) is not None
