"""Random graphs of registered ops over random specs, each rewritten and verified.

    python -m tools.fuzz --seconds 600

A graph is a list of steps over a pool of values `[B, 6]`. A step takes values from the pool, gives them the shapes a
case of an op's rule asks for, calls the op, and puts its result, flat again, into the pool. Cases that a rule must
decline are steps like any other: they mix rows, and must stay where they are. What goes wrong is shrunk by
leaving steps out, and printed as a program.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import roo_rewrite as roo
import roo_rewrite.rules  # registers the rules
from roo_rewrite.rules.law import draw, operator
from roo_rewrite.rules.registry import Case, registered

WIDTH = 6
NAMES = ("u0", "u1", "x0", "x1")


@dataclass(frozen=True)
class Step:
    """One op: a case of a rule, or one of `GLUE`; picks are positions in the pool, modulo its length."""

    op: str
    case: int
    picks: tuple[int, ...]
    seed: int


# -- shapes


def tokens(shape: str) -> tuple[str, list[str]]:
    """`"i:B 3"` -> its prefix and dims."""
    prefix, _, dims = shape.rpartition(":")
    return prefix, dims.split()


def usable(case: Case) -> bool:
    """Whether a step can make the call: no jagged pairs, no special matrices, no weights drawn or sizes fixed in it."""
    if {"_weights", "len"} & set(case.call.__code__.co_names):
        return False
    words = [tokens(s) for s in case.shapes]
    return all(p in ("", "i", "b", "p", "u", "s", "f") for p, _ in words) and not any(
        "R" in t or "#" in t or t in ("lengths", "offsets", "starts", "ends") for _, dims in words for t in dims
    )


def shaped(value: Tensor, shape: str) -> Tensor:
    """A pool value `[B, 6]` as the operand a case asks for."""
    prefix, dims = tokens(shape)
    at = next(i for i, t in enumerate(dims) if "B" in t)
    left, _, right = dims[at].partition("*")
    outer, inner = (1, int(right or 1)) if left == "B" else (int(left), 1)
    before, after = [int(t) for t in dims[:at]], [int(t) for t in dims[at + 1 :]]
    number = outer * inner
    for size in (*before, *after):
        number *= size
    columns = torch.arange(number)
    spread = value[:, columns % WIDTH] * (1 + 0.1 * (columns // WIDTH)).to(value.dtype)
    split = spread.reshape(value.shape[0], *before, outer, inner, *after)
    moved = split.movedim(0, at + 1)
    return typed(moved.flatten(at, at + 2), prefix)


def typed(x: Tensor, prefix: str) -> Tensor:
    """What a prefix of a case asks for."""
    match prefix:
        case "i":
            return (x.abs() * 4).long() % 4
        case "b":
            return x > 0
        case "p":
            return x.abs() + 0.5
        case "u":
            return torch.sigmoid(x) * 0.9 + 0.05
        case "s":
            return x.sort(-1).values
        case "f":
            return x.float()
    return x


def flat(out: Tensor, n: int, dim: int | None) -> Tensor:
    """A result as a pool value; dim is where its size grows with the batch."""
    out = out.real if out.is_complex() else out
    out = torch.nan_to_num(out.to(torch.float64), 0.5, 2.0, -2.0)
    rows = out.reshape(1, -1).expand(n, -1) if dim is None else out.movedim(dim, 0).reshape(n, -1)
    rows = rows[:, torch.arange(WIDTH) % rows.shape[1]]
    return rows / (1 + rows.abs())


def invoke(op: str, case: Case, n: int, tensors: list[Tensor]) -> list[Tensor]:
    """The op on these tensors: its output tensors."""
    args = case.call(n, *tensors)
    kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
    out = operator(op)(*(args[:-1] if kwargs else args), **kwargs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


@functools.cache
def layout(op: str, index: int) -> tuple[int, int | None] | None:
    """Which output a step keeps, and the dim that grows with the batch; None where the case is of no use here."""
    case = registered()[op].cases[index]
    generator = torch.Generator().manual_seed(0)
    seen = []
    for n in (5, 7):
        pool = torch.rand(n, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        tensors = [
            shaped(pool, s) if "B" in s else draw(s, torch.ones(n, dtype=torch.long), generator).value
            for s in case.shapes
        ]
        tensors = [t.requires_grad_() if t.is_leaf and t.is_floating_point() else t for t in tensors]
        try:
            seen.append(invoke(op, case, n, tensors))
            for t in seen[-1]:
                if t.requires_grad and not t.is_complex():
                    t.sum().backward(retain_graph=True)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
    for i, (a, b) in enumerate(zip(*seen)):
        grown = [d for d, (s, t) in enumerate(zip(a.shape, b.shape)) if s != t]
        if a.ndim == b.ndim and a.numel() and len(grown) <= 1 and all(a.shape[d] * 7 == b.shape[d] * 5 for d in grown):
            return i, grown[0] if grown else None
    return None


# -- glue: what models do between ops


def _cat_linear(model: Program, values: list[Tensor], seed: int) -> Tensor:
    return torch.tanh(nn.functional.linear(torch.cat(values, 1), model.weight(seed, WIDTH, WIDTH * len(values))))


def _sum(model: Program, values: list[Tensor], seed: int) -> Tensor:
    return sum(values[1:], values[0] * 0.5)


def _product(model: Program, values: list[Tensor], seed: int) -> Tensor:
    return values[0] * values[-1] - values[0]


def _pairs(model: Program, values: list[Tensor], seed: int) -> Tensor:
    fields = torch.stack([values[0], values[-1], values[len(values) // 2]], 1)
    return torch.bmm(fields, fields.transpose(1, 2)).flatten(1)[:, :WIDTH]


def _attention(model: Program, values: list[Tensor], seed: int) -> Tensor:
    tokens_ = torch.stack(values, 1)
    scores = (tokens_ @ values[0].unsqueeze(-1)).squeeze(-1).softmax(-1)
    return (scores.unsqueeze(-1) * tokens_).sum(1)


def _norm(model: Program, values: list[Tensor], seed: int) -> Tensor:
    whole = torch.cat(values, 1)
    return nn.functional.layer_norm(whole, whole.shape[1:])[:, :WIDTH]


def _centred(model: Program, values: list[Tensor], seed: int) -> Tensor:
    return values[0] - values[-1].sum(0) * 0.1


GLUE: dict[str, Callable[[Program, list[Tensor], int], Tensor]] = {
    "cat_linear": _cat_linear,
    "sum": _sum,
    "product": _product,
    "pairs": _pairs,
    "attention": _attention,
    "norm": _norm,
    "centred": _centred,
}


class Program(nn.Module):
    """A random graph as a model of two request and two impression inputs, each `[B, 6]`."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterDict()
        for number, step in enumerate(steps):
            for place, (_, constant) in enumerate(self._constants(step)):
                if constant.is_floating_point():
                    self.weights[f"c{number}_{place}"] = nn.Parameter(constant)
                else:
                    self.register_buffer(f"c{number}_{place}", constant)
            if step.op == "cat_linear":
                self._add_weight(step.seed, WIDTH, WIDTH * len(step.picks))
        self._add_weight(0, 1, 3 * WIDTH)

    def _constants(self, step: Step) -> Iterator[tuple[int, Tensor]]:
        if step.op in GLUE:
            return
        generator = torch.Generator().manual_seed(step.seed)
        for place, shape in enumerate(registered()[step.op].cases[step.case].shapes):
            if "B" not in shape:
                yield place, draw(shape, torch.ones(3, dtype=torch.long), generator).value

    def _add_weight(self, seed: int, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        self.weights[f"w{seed}"] = nn.Parameter(drawn / columns**0.5)

    def weight(self, seed: int, rows: int, columns: int) -> Tensor:
        """The weight of a `cat_linear` step."""
        found: Tensor = self.weights[f"w{seed}"]
        return found.reshape(rows, columns)

    def forward(self, u0: Tensor, u1: Tensor, x0: Tensor, x1: Tensor) -> Any:
        pool = [u0, u1, x0, x1]
        for number, step in enumerate(self.steps):
            values = [pool[p % len(pool)] for p in step.picks]
            pool.append(GLUE[step.op](self, values, step.seed) if step.op in GLUE else self._op(number, step, values))
        score = nn.functional.linear(torch.cat(pool[-3:], 1), self.weight(0, 1, 3 * WIDTH))
        return score.squeeze(1), pool[-1]

    def _op(self, number: int, step: Step, values: list[Tensor]) -> Tensor:
        case = registered()[step.op].cases[step.case]
        given, tensors, place = iter(values), [], 0
        for shape in case.shapes:
            if "B" in shape:
                tensors.append(shaped(next(given), shape))
                continue
            name = f"c{number}_{place}"
            tensors.append(self.weights[name] if name in self.weights else getattr(self, name))
            place += 1
        kept = layout(step.op, step.case)
        assert kept is not None
        n: Any = values[0].shape[0]
        return flat(invoke(step.op, case, n, tensors)[kept[0]], n, kept[1])


# -- drawing, checking, shrinking


@functools.cache
def choices() -> list[tuple[str, int, int]]:
    """Every (op, case, number of batched operands) a step can be."""
    found = []
    for op, rule in sorted(registered().items()):
        for index, case in enumerate(rule.cases):
            batched = sum("B" in s for s in case.shapes)
            if op.startswith("aten.") and batched and usable(case) and layout(op, index) is not None:
                found.append((op, index, batched))
    return found


def drawn_steps(seed: int, length: int) -> tuple[Step, ...]:
    """A random program."""
    chance = random.Random(seed)
    steps = []
    for number in range(length):
        picks = [chance.randrange(1000) for _ in range(chance.randint(2, 3))]
        if chance.random() < 0.4:
            steps.append(Step(chance.choice(sorted(GLUE)), 0, tuple(picks), seed * 100 + number + 1))
        else:
            op, index, batched = chance.choice(choices())
            more = [chance.randrange(1000) for _ in range(batched)]
            steps.append(Step(op, index, tuple(more), seed * 100 + number + 1))
    return tuple(steps)


def problem(steps: tuple[Step, ...], seed: int, split: str) -> str:
    """What is wrong with the rewriting of a program: "" for nothing, "?..." where the original runs instead."""
    generator = torch.Generator().manual_seed(seed)
    example = [torch.randn(6, WIDTH, generator=generator, dtype=torch.float64) for _ in NAMES]
    chance = random.Random(seed)
    sides = [chance.random() < 0.5 for _ in NAMES]
    spec = roo.FeatureSpec(
        request=[n for n, s in zip(NAMES, sides) if s], impression=[n for n, s in zip(NAMES, sides) if not s]
    )
    model = Program(steps)
    try:
        rewritten = roo.rewrite(
            model,
            example,
            spec=spec,
            fanout=chance.choice([2, 16, 256]),
            check=True,
            split=split,  # type: ignore[arg-type]
        )
        roo.verify(model, rewritten, batches=5, seed=seed)
    except roo.CaptureError as e:
        return "?" + str(e)
    except roo.EquivalenceError as e:
        return "?" + str(e) if "nothing was verified" in str(e) else str(e)
    except Exception as e:  # anything else is a fault too
        return f"{type(e).__name__}: {e}"
    if rewritten._whole_program().emitted is None:
        return "?" + "; ".join(rewritten._whole_program().notes)
    return ""


def shrunk(steps: tuple[Step, ...], wrong: Callable[[tuple[Step, ...]], bool]) -> tuple[Step, ...]:
    """The steps without those that the fault does not need."""
    at = 0
    while at < len(steps):
        fewer = steps[:at] + steps[at + 1 :]
        if wrong(fewer):
            steps = fewer
        else:
            at += 1
    return steps


def listing(steps: tuple[Step, ...], sides_seed: int) -> str:
    """The program, a line a step."""
    lines = [f"seed {sides_seed}: pool = {', '.join(NAMES)}"]
    for number, step in enumerate(steps):
        size = len(NAMES) + number
        names = [NAMES[p % size] if p % size < len(NAMES) else f"v{p % size - len(NAMES)}" for p in step.picks]
        shapes = "" if step.op in GLUE else f"  {registered()[step.op].cases[step.case].shapes}"
        lines.append(f"  v{number} = {step.op}({', '.join(names)}){shapes}")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--seconds", default=60.0, help="How long to go on.")
@click.option("--count", default=10**9, help="At most so many graphs.")
@click.option("--seed", default=0, help="The first seed.")
@click.option("--length", default=10, help="Steps a graph.")
@click.option("--split", default="priced", type=click.Choice(["priced", "always", "never"]))
def main(seconds: float, count: int, seed: int, length: int, split: str) -> None:
    """Runs until the time is up; exits with 1 if a graph came out wrong."""
    ends, tally = time.monotonic() + seconds, Counter[str]()
    torch.set_num_threads(1)
    for current in range(seed, seed + count):
        if time.monotonic() > ends:
            break
        steps = drawn_steps(current, length)
        found = problem(steps, current, split)
        tally["wrong" if found and found[0] != "?" else "not rewritten" if found else "equal"] += 1
        if found and found[0] != "?":
            small = shrunk(steps, lambda s, at=current: problem(s, at, split)[:1] not in ("", "?"))
            click.echo(f"{listing(small, current)}\n{problem(small, current, split)}\n")
        elif found:
            click.echo(f"seed {current} is not rewritten: {found[1:200]}")
    click.echo(f"{sum(tally.values())} graphs: " + ", ".join(f"{n} {k}" for k, n in sorted(tally.items())))
    sys.exit(1 if tally["wrong"] else 0)


if __name__ == "__main__":
    main()
