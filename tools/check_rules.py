"""Which row rules are wrong, and which are missing.

Takes the sample inputs torch keeps for its own tests (needs the package `expecttest`), tries every way
the batch could lie in them, and compares what the rule says with what brute force finds on gathered rows:

    wrong     the rule says row-wise, the gather law is broken           must be none: exit status 1
    missing   the law holds, and the op has neither a rule nor a reason
    declined  the law holds on the samples, and the rule declines        for information

    python tools/check_rules.py --ops ops.txt --json
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, parts
from roo_rewrite.rules import law
from roo_rewrite.rules.registry import Rule, declined, find, registered

SAMPLES = 40  # of each op, at most
FAILURES = (RuntimeError, AssertionError, IndexError, ValueError, TypeError, NotImplementedError)


@dataclass
class Finding:
    """What was found of one op."""

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    declined: Counter[str] = field(default_factory=Counter)
    held: int = 0
    crashed: bool = False


RecordedCall = tuple[OpOverload, list[Any], pytree.TreeSpec]


# Their contents are whatever was in memory.
UNFILLED = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted"}


class Recorder(TorchFunctionMode):
    """Records the ATen ops called from Python, with their arguments."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = overload(getattr(func, "__name__", ""), args, kwargs or {})
        if op is not None:
            self.calls.append((op, *pytree.tree_flatten((args, kwargs or {}))))
        return result


def overload(name: str, args: Any, kwargs: Any) -> OpOverload | None:
    """The functional ATen op that a call of `torch.<name>` is."""
    packet = getattr(torch.ops.aten, name, None) if name and name not in UNFILLED else None
    if packet is None:
        return None
    try:
        op = getattr(packet, torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs) or "default")
    except FAILURES:
        return None
    return None if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags else op


def sample_calls(only: str) -> Iterator[RecordedCall]:
    """The ATen calls that torch's own sample inputs make."""
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        if torch.float64 not in info.dtypes or only not in info.name:
            continue
        try:
            for sample in itertools.islice(info.sample_inputs("cpu", torch.float64), SAMPLES):
                with Recorder() as recorder:
                    info.op(sample.input, *sample.args, **sample.kwargs)
                yield from recorder.calls
        except FAILURES:
            continue


def placements(leaves: Sequence[Any], limit: int) -> Iterator[list[Batching | None]]:
    """Ways the batch could lie in the tensors: in one dim of some of them, all of one size above 1."""
    choices: list[list[tuple[int, Batching] | None]] = []
    for leaf in leaves:
        plain = isinstance(leaf, Tensor) and leaf.layout is torch.strided
        dims = [(size, Rows(dim)) for dim, size in enumerate(leaf.shape)] if plain else []
        choices.append([None, *((size, rows) for size, rows in dims if size > 1)])
    count = 0
    for combination in itertools.product(*choices):
        sizes = {c[0] for c in combination if c is not None}
        if len(sizes) == 1 and count < limit:
            count += 1
            yield [c and c[1] for c in combination]


def trial_of(
    op: OpOverload, leaves: list[Any], tree: pytree.TreeSpec, where: list[Batching | None], sized: bool
) -> law.Trial:
    """The call with its batch where `where` says; sizes equal to the batch are the batch where `sized`."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    batch = next(int(leaves[i].shape[w.dim]) for i, w in enumerate(where) if isinstance(w, Rows))
    sizes = [i for i, leaf in enumerate(leaves) if sized and type(leaf) is int and leaf == batch]

    def build(n: int, *given: Tensor) -> tuple[Any, ...]:
        filled = list(leaves)
        for i, value in zip(tensors, given):
            filled[i] = value
        for i in sizes:
            filled[i] = n
        args, kwargs = pytree.tree_unflatten(filled, tree)
        return (*args, dict(kwargs))

    drawn = tuple(law.Drawn(leaves[i].detach(), where[i] or Replicated()) for i in tensors)
    return law.Trial(op, torch.zeros(batch, dtype=torch.long), drawn, build)


def trials(op: OpOverload, leaves: list[Any], tree: pytree.TreeSpec, limit: int) -> Iterator[law.Trial]:
    """The call with its batch in every place there may be."""
    for where in placements(leaves, limit):
        batch = next(leaf.shape[w.dim] for leaf, w in zip(leaves, where) if isinstance(w, Rows))
        yield trial_of(op, leaves, tree, where, sized=False)
        if any(type(leaf) is int and leaf == batch for leaf in leaves):
            yield trial_of(op, leaves, tree, where, sized=True)


def row_choices(batch: int) -> list[Tensor]:
    """Rows to gather: one, none, repeats, a permutation, more than there are."""
    last = batch - 1
    lists = [[0], [last], [], [last, last, 0], list(reversed(range(batch))), [*range(batch), 0, last // 2]]
    return [torch.tensor(rows, dtype=torch.long) for rows in lists]


def sizes_agree(trial: law.Trial, verdict: Batching) -> bool:
    """What the caller of a rule confirms by symbols: only the batch dim of the verdict follows the batch."""
    more = torch.zeros(len(trial.lengths) + 3, dtype=torch.long)
    try:
        pairs = list(zip(parts(verdict), trial.run(), trial.run(more)))
    except FAILURES:
        return False
    wanted = [law.gather(old, kind, more) if isinstance(kind, Rows) else old for kind, old, _ in pairs]
    return all(want.shape == new.shape for want, (_, _, new) in zip(wanted, pairs))


def check(rule: Rule | None, trial: law.Trial, finding: Finding, reason: str) -> None:
    """Compares the rule with brute force on one call."""
    before = trial.run()
    if not before or not all(t.numel() for t in before):
        return
    choices = row_choices(len(trial.lengths))
    what = f"{[str(d.batching) for d in trial.drawn]} of {[tuple(d.value.shape) for d in trial.drawn]}"
    try:
        verdict = law.predict(rule, trial) if rule is not None else None
        refusal = reason
    except NotRowWise as e:
        verdict, refusal = None, str(e)
    if verdict is not None and not sizes_agree(trial, verdict):
        verdict, refusal = None, "the sizes do not follow the batch"
    if verdict is not None:
        failures = [law.broken(trial, verdict, rows) for rows in choices if len(rows)]
        finding.wrong += [f"{what}: {f}" for f in failures if f and "cannot be run" not in f][:1]
        finding.held += 1
        return
    if all(law.row_wise(trial, [rows for rows in choices if len(rows)])):
        if rule is None and not reason:
            finding.missing.append(what)
        else:
            finding.declined[refusal] += 1


def gathered(only: str, per_op: int) -> dict[str, list[RecordedCall]]:
    """Different calls of each op among the sample inputs, up to a number."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, list[RecordedCall]] = defaultdict(list)
    for call in sample_calls(only):
        op, leaves, tree = call
        key = (str(op), str(tree), *(tuple(x.shape) if isinstance(x, Tensor) else repr(x) for x in leaves))
        if key not in seen and len(found[str(op)]) < per_op:
            seen.add(key)
            found[str(op)].append(call)
    return dict(found)


def check_op(name: str, calls: Sequence[RecordedCall], ways: int) -> Finding:
    """The finding over some calls of one op."""
    finding = Finding()
    for op, leaves, tree in calls:
        for trial in trials(op, leaves, tree, ways):
            try:
                check(find(name), trial, finding, declined().get(name, ""))
            except FAILURES:
                continue
    return finding


def isolated(work: Callable[[], Finding]) -> Finding:
    """Does the work in a child process: some ops read memory by indices that they do not check."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(work(), pipe)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    found = pickle.loads(answer) if status == 0 else Finding(crashed=True)
    assert isinstance(found, Finding)
    return found


def listed(path: Path) -> list[str]:
    """The ATen and fbgemm ops named in a file, whatever stands around them."""
    return sorted(set(re.findall(r"\b(?:aten|fbgemm)\.\w+\.\w+", path.read_text(encoding="utf-8"))))


def functional(op: str) -> str:
    """The name of the op that an in-place op becomes: `aten.add_.Tensor` -> `aten.add.Tensor`."""
    return re.sub(r"(\w)_\.", r"\1.", op) if not re.search(r"__\.", op) else op


def uncovered(ops: Sequence[str]) -> list[str]:
    """Ops with neither a rule nor a reason."""
    known = registered().keys() | declined().keys()
    return [op for op in ops if op not in known and functional(op) not in known]


def tagged() -> list[str]:
    """Functional ops that torch tags as core or pointwise."""
    found = []
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name, _, kind = full.removeprefix("aten::").partition(".")
        if full.startswith("aten::") and "out" not in kind.split("_"):
            op = getattr(getattr(torch.ops.aten, name), kind or "default")
            if {torch.Tag.core, torch.Tag.pointwise} & set(op.tags) and not op._schema.is_mutable:
                found.append(str(op))
    return found


def as_table(findings: dict[str, Finding], absent: list[str]) -> str:
    """The findings as text."""
    lines = []
    for name, finding in sorted(findings.items()):
        lines += [f"crashed   {name}"] if finding.crashed else []
        lines += [f"wrong     {name}  {text}" for text in finding.wrong]
    for name, finding in sorted(findings.items()):
        lines += [f"missing   {name}  {len(finding.missing)} ways, as {finding.missing[0]}"] if finding.missing else []
    lines += [f"uncovered {name}" for name in absent]
    for name, finding in sorted(findings.items()):
        lines += [f"declined  {name}  {count} ways: {why}" for why, count in finding.declined.most_common()]
    wrong = sum(bool(f.wrong) for f in findings.values())
    missing = sum(bool(f.missing) for f in findings.values())
    held = sum(f.held for f in findings.values())
    lines.append(
        f"{len(registered())} rules, {len(findings)} ops tried, {held} verdicts confirmed; "
        f"{wrong} wrong, {missing} missing, {len(absent)} uncovered"
    )
    return "\n".join(lines)


def as_json(findings: dict[str, Finding], absent: list[str]) -> str:
    """The findings for machines."""
    ops = {
        n: {"wrong": f.wrong, "missing": f.missing, "declined": f.declined, "held": f.held} for n, f in findings.items()
    }
    return json.dumps({"rules": len(registered()), "uncovered": absent, "ops": ops}, indent=1)


@click.command(help=__doc__)
@click.option("--ops", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file that names ops.")
@click.option("--only", default="", help="Only samples of ops whose name contains this.")
@click.option("--per-op", default=12, show_default=True, help="Calls to try of each op.")
@click.option("--ways", default=12, show_default=True, help="Places of the batch to try in each call.")
@click.option("--json", "machine", is_flag=True, help="Print JSON.")
def main(ops: Path | None, only: str, per_op: int, ways: int, machine: bool) -> None:
    """See the module's docstring."""
    warnings.simplefilter("ignore")
    names = [*tagged(), *(listed(ops) if ops else [])] if not only else []
    try:
        samples = gathered(only, per_op)
    except ModuleNotFoundError as e:
        raise click.UsageError(f"torch's sample inputs cannot be imported: {e}; pip install expecttest") from e
    torch.set_num_threads(1)
    findings = {name: isolated(partial(check_op, name, calls, ways)) for name, calls in sorted(samples.items())}
    absent = uncovered(names)
    click.echo(as_json(findings, absent) if machine else as_table(findings, absent))
    sys.exit(1 if any(f.wrong for f in findings.values()) else 0)


if __name__ == "__main__":
    main()
