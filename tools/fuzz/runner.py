"""One program: drawn, rewritten, verified; and shrunk where that goes wrong."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Node

import roo_rewrite as roo
import roo_rewrite.pipeline
from tools.fuzz import crossing, layers, rule_cases, shapes  # noqa: F401 - registers the steps
from tools.fuzz.drawer import STEPS, Drawer, Step, floating
from tools.fuzz.model import Recorded, model, trace
from tools.fuzz.recorder import F64, Recorder, UnusableError, Value, val

INPUTS = {"a": (4,), "b": (6,), "c": (3, 2), "d": (1,), "e": (5,), "ids": (), "more_ids": (3,), "few": ()}
ROWS = 6
FAULTS = ("please report it", "failed its check")  # notes of a program that say a pass went wrong
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a program: "equal", "wrong", "unverified" or "original" (it runs instead), and why."""

    kind: str
    why: str = ""


def drawn_steps(seed: int, length: int) -> Steps:
    """The steps of a random program, at most `length`."""
    chance = random.Random(seed)
    length = chance.randint(1, length)
    names = sorted(STEPS)
    drawn = chance.choices(names, [STEPS[n][1] for n in names], k=length)
    return tuple(Step(name, chance.randrange(10**9)) for name in drawn)


@dataclass
class Case:
    """A program to be rewritten: the model, its example, its spec."""

    model: Recorded
    example: list[Tensor]
    spec: roo.FeatureSpec
    fanout: float
    left_out: int


def case(steps: Steps, seed: int, only: int | None = None) -> Case:
    """The program of these steps. only: the one value, counted from the end of the pool, that is returned."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(chance.choice([61, 67]), generator)
    sides = {name: chance.random() < 0.5 for name in INPUTS}
    pair = chance.random() < 0.25
    request = frozenset(n for n, s in sides.items() if s) | (
        frozenset(["values", "lengths"]) if chance.random() < 0.5 else frozenset()
    )
    drawer = Drawer(recorder, request, low=chance.random() < 0.1)
    for name, shape in INPUTS.items():
        drawer.pool.append(recorder.input(name, shape, F64 if floats(name) else torch.int64))
    if pair:
        recorder.input("values", (), torch.int64, ragged=True)
        drawer.pool.append(recorder.input("lengths", (), torch.int64))
    left_out = sum(bool(drawer.take(step)) for step in steps)
    made = model(recorder, returned(drawer, chance, only))
    if chance.random() < 0.3:
        made.eval()
    names = [n.name for n in recorder.inputs]
    spec = roo.FeatureSpec(
        request=[n for n in names if n in request],
        impression=[n for n in names if n not in request],
        jagged={"values": "lengths"} if pair else {},
    )
    return Case(made, example(names, generator), spec, chance.choice([1, 2, 16, 256]), left_out)


def floats(name: str) -> bool:
    """Whether an input holds floats."""
    return name not in ("ids", "more_ids", "few", "values", "lengths")


def example(names: list[str], generator: torch.Generator) -> list[Tensor]:
    """A value for each input."""
    counts = torch.randint(0, 4, (ROWS,), generator=generator)
    counts[0] = 2
    made = []
    for name in names:
        if floats(name):
            made.append(torch.randn((ROWS, *INPUTS[name]), generator=generator, dtype=F64))
        elif name == "lengths":
            made.append(counts)
        else:
            shape = (int(counts.sum()),) if name == "values" else (ROWS, *INPUTS[name])
            made.append(torch.randint(0, 9, shape, generator=generator))
    return made


def _side_by_side(drawer: Drawer, parts: list[Any]) -> Any:
    """One tensor of the last parts; as many of them as are not together as wide as the batch is long."""
    if len(parts) == 1:
        return parts[0]
    try:
        return drawer.r("cat.default", parts, 1)
    except UnusableError:
        return _side_by_side(drawer, parts[1:])


def returned(drawer: Drawer, chance: random.Random, only: int | None) -> Any:
    """What the program returns: a tensor, a tuple or a dict, sometimes an input, a number or nothing among it."""
    pool = drawer.pool
    if only is not None:
        return pool[-1 - only]
    late = [n for n in pool[len(INPUTS) :] if floating(n)] or pool[:1]
    tail = late[-4:]
    parts = [drawer.r("flatten.using_ints", drawer.rows(n), 1) if val(n).ndim > 1 else n for n in tail]
    parts = [p if val(p).ndim > 1 else drawer.r("unsqueeze.default", p, 1) for p in parts]
    both = _side_by_side(drawer, parts)
    score = drawer.r("linear.default", both, drawer.r.weight(1, int(val(both).shape[1])))
    form = chance.randrange(6)
    if form == 0:
        return score
    if form == 1:
        return {"score": score, "last": pool[-1], "input": pool[chance.randrange(len(INPUTS))]}
    if form == 2:
        return (score, [pool[-1], None], 3)
    return (score, *chance.sample(late, min(3, len(late))))


@contextlib.contextmanager
def recorded(made: Recorded) -> Iterator[None]:
    """`capture` gives the recorded graph of this model instead of exporting it."""
    with mock.patch.object(roo_rewrite.pipeline, "capture", side_effect=lambda *_, **__: trace(made)):
        yield


def outcome(made: Case, seed: int, split: str, export: bool, batches: int = 8) -> Outcome:
    """Rewrites and verifies. export: the model is traced by torch.export."""
    with contextlib.nullcontext() if export else recorded(made.model):
        try:
            rewritten = roo.rewrite(
                made.model,
                made.example,
                spec=made.spec,
                fanout=made.fanout,
                check=True,
                split=split,  # type: ignore[arg-type]
            )
            roo.verify(made.model, rewritten, batches=batches, seed=seed)
        except roo.CaptureError as e:
            return Outcome("original", str(e))
        except roo.EquivalenceError as e:
            return Outcome("unverified" if "nothing was verified" in str(e) else "wrong", str(e))
        except Exception as e:  # anything else is a fault too
            return Outcome("wrong", f"{type(e).__name__}: {e}")
        program = rewritten._whole_program()
    if program.emitted is None:
        return Outcome("original", "; ".join(program.notes))
    faults = "; ".join(n for n in program.notes if any(words in n for words in FAULTS))
    return Outcome("wrong", faults) if faults else Outcome("equal")


def run(steps: Steps, seed: int, split: str, export: bool = False, only: int | None = None) -> Outcome:
    """The outcome of the program of these steps."""
    return outcome(case(steps, seed, only), seed, split, export)


def shrunk(steps: Steps, wrong: Callable[[Steps], bool]) -> Steps:
    """The steps without those that the fault does not need."""
    at = 0
    while at < len(steps):
        fewer = steps[:at] + steps[at + 1 :]
        if wrong(fewer):
            steps = fewer
        else:
            at += 1
    return steps


def smallest(steps: Steps, seed: int, split: str, export: bool) -> tuple[Steps, int | None, Outcome]:
    """Steps, and the one value returned where that is enough, that still go wrong."""
    steps = shrunk(steps, lambda s: run(s, seed, split, export).kind == "wrong")
    for only in range(len(case(steps, seed).model.recorder.graph.nodes)):
        try:
            if run(steps, seed, split, export, only).kind == "wrong":
                fewer = shrunk(steps, lambda s: run(s, seed, split, export, 0).kind == "wrong") if only == 0 else steps
                return fewer, only, run(fewer, seed, split, export, only)
        except IndexError:
            break
    return steps, None, run(steps, seed, split, export)


def listing(made: Case) -> str:
    """The program as ATen, a line a node that the result needs."""
    lines = [f"request {made.spec.request}, fanout {made.fanout}"]
    for node in made.model.graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        lines.append(f"  {node.format_node()}  # {_shown(node)}")
    return "\n".join(lines)


def _shown(node: Node) -> str:
    value = node.meta.get("value")
    return (
        str([s if isinstance(s, int) else (s.of if s.times == 1 else f"{s.times}*{s.of}") for s in value.shape])
        if isinstance(value, Value)
        else ""
    )
