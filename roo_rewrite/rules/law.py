"""The gather law, run: does `op(x[idx]) == op(x)[idx]` hold where a rule says so?

Used by the tests of the rules, by `tools/check_rules.py`, and by whoever writes a rule of their own.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, CrossRow, Lengths, Offsets, Ragged, Replicated, RowIndex, Rows, parts
from roo_rewrite.ops.ragged import offsets_of, select_ragged
from roo_rewrite.rules.registry import Call, Case, Extent, Operand, Rule, apply, make_call

PAIR = "pair"
"""The name of the jagged pair in cases."""

JAGGED = ("lengths", "offsets", "starts", "ends")
"""What a case may say instead of the dims of a tensor."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def gather(value: Tensor, batching: Batching, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Rows `rows` (int64) of a value with the given batching, as a value with `len(rows)` rows.

    `lengths` are those of the jagged pair before the gather; values, offsets and lengths of one need them.
    """
    if isinstance(batching, Rows):
        dim, inner = batching.dim, batching.inner
        count = value.shape[dim] // (batching.outer * inner)
        split: Tensor = torch.unflatten(value, dim, (batching.outer, count, inner))
        return split.index_select(dim + 1, rows).flatten(dim, dim + 2)
    if isinstance(batching, RowIndex):
        numbers = batching.step * torch.arange(len(rows), dtype=value.dtype)
        shape = [*value.shape]
        shape[batching.dim] = len(rows)
        return numbers.reshape([-1 if d == batching.dim else 1 for d in range(len(shape))]).expand(shape)
    if isinstance(batching, Ragged):
        assert lengths is not None
        return select_ragged(value, lengths, rows)[0]
    if isinstance(batching, Offsets):
        assert lengths is not None
        chosen = offsets_of(lengths.index_select(0, rows)).to(value.dtype)
        return chosen[0 if batching.first else 1 : len(chosen) if batching.last else -1]
    assert isinstance(batching, Replicated), batching
    return value


@dataclass(frozen=True)
class Drawn:
    """A tensor of a case, with the batching it was drawn for."""

    value: Tensor
    batching: Batching

    def rows(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """The tensor with rows `rows`."""
        return gather(self.value, self.batching, rows, lengths)


def draw(shape: str, lengths: Tensor, generator: torch.Generator) -> Drawn:
    """The tensor a case asks for, for a batch of `len(lengths)` rows."""
    batch = len(lengths)
    if shape == "lengths":
        return Drawn(lengths, Lengths(lengths=PAIR))
    if shape in JAGGED:
        kind = Offsets(PAIR, first=shape != "ends", last=shape != "starts")
        return Drawn(gather(lengths, kind, torch.arange(batch), lengths), kind)
    prefix, _, dims = shape.rpartition(":")
    batching: Batching = Replicated()
    sizes = []
    numbered = dims.startswith("#")
    for dim, token in enumerate(dims.lstrip("#").split()):
        left, _, right = token.partition("*")
        if "B" in token:
            outer, inner = (1, int(right or 1)) if left == "B" else (int(left), 1)
            batching = RowIndex(dim, inner) if numbered else Rows(dim, outer, inner)
            sizes.append(batch if numbered else batch * outer * inner)
        elif token == "R":
            batching = Ragged(PAIR)
            sizes.append(int(lengths.sum()))
        else:
            sizes.append(int(token))
    if numbered:
        empty = torch.empty(sizes, dtype=torch.long)
        return Drawn(gather(empty, batching, torch.arange(batch)), batching)
    return Drawn(_values(prefix, sizes, generator), batching)


def _values(prefix: str, sizes: list[int], generator: torch.Generator) -> Tensor:
    """Small numbers, so that float64 sums and products of them are exact."""
    if prefix == "i":
        return torch.randint(0, 4, sizes, generator=generator)
    if prefix == "b":
        return torch.randint(0, 2, sizes, generator=generator).bool()
    if prefix == "u":
        return 0.05 + 0.9 * torch.rand(sizes, generator=generator, dtype=torch.float64)
    low = 1 if prefix == "p" else -3
    drawn = torch.randint(low, 4, sizes, generator=generator).double()
    if prefix == "m":
        return drawn @ drawn.mT + 3 * torch.eye(sizes[-1], dtype=drawn.dtype)
    if prefix == "c":
        return torch.complex(drawn, torch.randint(-3, 4, sizes, generator=generator).double())
    return drawn.sort().values if prefix == "s" else drawn.float() if prefix == "f" else drawn


def operator(name: str) -> OpOverload:
    """The op of a name like `aten.softmax.int`."""
    space, packet, overload = name.split(".")
    if space == "fbgemm":
        importlib.import_module("fbgemm_gpu")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    assert isinstance(found, OpOverload)
    return found


@dataclass(frozen=True)
class Trial:
    """An op with arguments for a traced batch, and the same with other rows."""

    op: OpOverload
    lengths: Tensor
    drawn: tuple[Drawn, ...]
    build: Callable[..., Any]

    def arguments(self, rows: Tensor | None = None) -> Arguments:
        """`(args, kwargs)` as traced, or with rows `rows`; the batch size in them is an Extent."""
        batch = len(self.lengths) if rows is None else len(rows)
        tensors = [d.value if rows is None else d.rows(rows, self.lengths) for d in self.drawn]
        args = tuple(self.build(Extent(batch), *tensors))
        if args and isinstance(args[-1], dict):
            return args[:-1], args[-1]
        return args, {}

    def run(self, rows: Tensor | None = None) -> list[Tensor]:
        """The outputs, flat."""
        args, kwargs = pytree.tree_map_only(Extent, int, self.arguments(rows))
        outputs = self.op(*args, **kwargs)
        return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]

    def call(self) -> Call:
        """The application as a rule sees it."""
        args, kwargs = self.arguments()
        known = {id(d.value): d.batching for d in self.drawn}

        def operand_of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return Operand(tuple(value.shape), known.get(id(value), Replicated()), value.dtype)

        return make_call(self.op, args, kwargs, operand_of, len(self.lengths), [t.shape for t in self.run()])


def trial(op: str, case: Case, batch: int = 7, seed: int | None = None) -> Trial:
    """The case drawn for a trace of `batch` rows."""
    seed = zlib.crc32(f"{op} {case.shapes}".encode()) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (batch,), generator=generator)
    drawn = tuple(draw(shape, lengths, generator) for shape in case.shapes)
    return Trial(operator(op), lengths, drawn, case.call)


def predict(rule: Rule, trial: Trial) -> Batching:
    """What the rule says. Raises NotRowWise where it declines."""
    return apply(rule, trial.call())


def broken(trial: Trial, batching: Batching, rows: Tensor) -> str:
    """How the law fails for these rows; the empty string where it holds."""
    before = trial.run()
    try:
        after = trial.run(rows)
    except (RuntimeError, IndexError, ValueError) as e:
        return f"{trial.op} cannot be run on rows {rows.tolist()}: {e}"
    kinds = parts(batching)
    if len(kinds) != len(before):
        return f"{trial.op} has {len(before)} outputs, the rule speaks of {len(kinds)}"
    for i, (kind, old, new) in enumerate(zip(kinds, before, after)):
        if isinstance(kind, CrossRow):
            continue
        want = gather(old, kind, rows, trial.lengths)
        if want.shape != new.shape:
            return f"output {i} of {trial.op} is {kind}: on rows {rows.tolist()} {[*want.shape]} became {[*new.shape]}"
        if not torch.allclose(new, want, rtol=1e-10, atol=1e-10, equal_nan=True):
            return f"output {i} of {trial.op} is not {kind}: rows {rows.tolist()} differ"
    return ""


def candidates(shape: Sequence[int], batch: int) -> list[Batching]:
    """Every place the batch could have in a value of this shape; none among them."""
    found: list[Batching] = [Replicated()]
    for dim, size in enumerate(shape):
        merged = size // batch if size and size % batch == 0 else 0
        found += [Rows(dim, outer, merged // outer) for outer in range(1, merged + 1) if merged % outer == 0]
    return found


def row_wise(trial: Trial, choices: Sequence[Tensor]) -> list[list[Batching]]:
    """By brute force, for each output the places of the batch for which the law holds on every choice of rows."""
    runs: list[tuple[Tensor, list[Tensor]]] = []
    before = trial.run()
    for rows in choices:
        try:
            after = trial.run(rows)
        except (RuntimeError, IndexError, ValueError):
            return [[] for _ in before]
        if len(after) != len(before):
            return [[] for _ in before]
        runs.append((rows, after))
    found = []
    for i, old in enumerate(before):
        places = candidates(old.shape, len(trial.lengths))
        found.append([p for p in places if all(_same(gather(old, p, rows), new[i]) for rows, new in runs)])
    return found


def _same(want: Tensor, new: Tensor) -> bool:
    return want.shape == new.shape and torch.allclose(new, want, rtol=1e-10, atol=1e-10, equal_nan=True)


def declines(rule: Rule, trial: Trial) -> str:
    """The reason the rule gives for declining; the empty string where it does not."""
    try:
        predict(rule, trial)
    except NotRowWise as e:
        return str(e)
    return ""
