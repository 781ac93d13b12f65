"""A fresh program held against the original before anyone sees it, on copies, in the model's own precision.

`verify` is the user's check, and sharper; this one keeps a program that is wrong on plain batches from being used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from roo_rewrite.calls import ambient, without_empty
from roo_rewrite.capture import Captured
from roo_rewrite.closeness import compare, distance, gradients_differ, noise, off_by, tolerance
from roo_rewrite.emit import runnable
from roo_rewrite.equivalence import Batch, draw_batch, weighted
from roo_rewrite.errors import EquivalenceError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.leaves import tensors_of
from roo_rewrite.noise import SHAKES, SteadyNoise, jittered, judged, shaken, steadied
from roo_rewrite.ops.kept import FewRowsError
from roo_rewrite.program import Program, holder
from roo_rewrite.purity import random_kept, twin

_COUNTS = ([2, 0, 3], [4, 1, 2, 0, 3], [6])
_LARGE = 1_000_000
_LOOSER = {torch.float64: torch.float32, torch.float32: torch.float16}


class _OriginalFailsError(Exception):
    """The original cannot run the batch."""


class Trial:
    """Two copies of a model: one runs the original's code, one the program. Parameters are the model's own."""

    def __init__(
        self,
        original: nn.Module,
        program: Program,
        inputs: Inputs,
        statics: Sequence[Any],
        name: str,
        shared_masks: bool = False,
    ):
        """shared_masks: dropout is drawn per request, which no seed makes equal to the original's."""
        assert program.captured is not None
        self.truth, self.other = twin(original), _with_store(original, program.captured, name)
        self.program, self.inputs, self.statics = program, inputs, statics
        self.noise = SteadyNoise if shared_masks else contextlib.nullcontext
        self.precision = _precision(program.captured)

    def mismatch(self, example: Sequence[Tensor]) -> str | None:
        """What differs on small batches, in words: outputs, buffers after the call, gradients.

        A batch that the original cannot run says nothing. Where that is so for all of them, the example itself is
        tried, every row of it a request.
        """
        generator = torch.Generator().manual_seed(0)
        drawn = [draw_batch(self.inputs, example, c, generator) for c in _COUNTS if self.program.accepts(sum(c))]
        failure: str | None = None
        noise, sharp = "", False
        for batches in (drawn, [self._example(example)]):
            ran = not batches
            for index, batch in enumerate(batches):
                try:
                    found, most = self._found(batch, index == 0)
                except _OriginalFailsError as e:
                    failure = str(e)
                    continue
                ran = True
                if found is not None and most:
                    return f"{found}, num_impressions={batch.counts.tolist()}"
                noise, sharp = noise or found or "", sharp or most
            if ran:
                return None if sharp else noise or None
        return failure

    def _found(self, batch: Batch, gradients: bool) -> tuple[str | None, bool]:
        """What differs on one batch, and whether that is to be believed: else most of it may be noise."""
        found = self._differ(batch, gradients, self.precision)
        if found is None:
            return None, True
        try:
            still, most = self._beyond_noise(batch, gradients, found)
        except Exception:  # what fails is no noise
            return found, True
        return (still, True) if still is not None or most else (f"{found}, which may be noise", False)

    def _example(self, example: Sequence[Tensor]) -> Batch:
        """Every row of the example is a request of two impressions, its own and the next."""
        rows = self.inputs.rows(example, Provenance.IMPRESSION) or self.inputs.rows(example, Provenance.REQUEST) or 0
        twice = (torch.arange(2 * rows) // 2 + torch.arange(2 * rows) % 2) % max(rows, 1)
        atoms = self.inputs.select(example, twice, [Provenance.IMPRESSION])
        return Batch([t.detach().clone() for t in atoms], torch.full((rows,), 2))

    def fails_empty(self, example: Sequence[Tensor]) -> bool:
        """Whether the original runs on an empty batch, where the trace, which never saw one, may differ."""
        batch = draw_batch(self.inputs, example, [0], torch.Generator().manual_seed(1))
        with random_kept(), torch.no_grad():
            try:
                self._original(batch)
            except Exception:  # whatever user code raises
                return False
        return True

    def same_on_one(self, example: Sequence[Tensor]) -> bool:
        """Whether one impression gives the original's numbers, which the trace, that never saw one, may not."""
        batch = draw_batch(self.inputs, example, [1], torch.Generator().manual_seed(1))
        with random_kept(), torch.no_grad(), self.noise():
            try:
                return compare(self._program(batch), self._original(batch), True, self.precision) is None
            except Exception:  # whatever user code raises
                return False

    def _original(self, batch: Batch, shake: int | None = None) -> list[Tensor]:
        atoms = batch.expanded(self.inputs)
        if not torch.is_grad_enabled():  # then the model may change them in place
            atoms = [t.clone() for t in atoms]
        if shake is not None:
            atoms = jittered(atoms, shake)
        args, kwargs = self.inputs.unflatten(atoms, Provenance.IMPRESSION, self.statics)
        torch.manual_seed(0)
        return tensors_of(self.truth(*args, **kwargs))

    def _program(self, batch: Batch) -> list[Tensor]:
        assert self.program.emitted is not None
        torch.manual_seed(0)
        atoms, counts = without_empty(self.inputs, batch.atoms, batch.counts)
        try:
            return tensors_of(self.program.emitted.whole(self.other, *atoms, counts))
        except FewRowsError:  # such a batch runs on the original
            torch.manual_seed(0)
            return self._original(batch)

    def _differ(self, batch: Batch, gradients: bool, precision: torch.dtype) -> str | None:
        atoms = [t.detach().clone().requires_grad_(gradients and t.is_floating_point()) for t in batch.atoms]
        batch = Batch(atoms, batch.counts)
        with random_kept(), self.noise(), torch.set_grad_enabled(gradients):
            try:
                expected = self._original(batch)
            except Exception as e:  # whatever user code raises
                if gradients:  # inputs that are changed in place, say
                    return self._differ(batch, False, precision)
                raise _OriginalFailsError(f"the original fails on a batch: {type(e).__name__}: {e}") from e
            try:
                found = self._program(batch)
            except Exception as e:
                return f"the rewritten model fails: {type(e).__name__}: {e}"
        return (
            compare(_detached(found), _detached(expected), precision=precision)
            or self._buffers(precision)
            or (self._gradients(batch, found, expected, precision) if gradients else None)
        )

    def _beyond_noise(self, batch: Batch, gradients: bool, found: str) -> tuple[str | None, bool]:
        """What differs in the entries that are no noise, and whether that is most of them.

        An entry is noise where it moves as much when the parameters of either copy are shaken.
        """
        loose = _LOOSER.get(self.precision, self.precision)
        precision = loose if self._differ(batch, gradients, loose) is not None else self.precision
        runs = [self._shaken(batch, gradients, name, shake) for shake in range(SHAKES) for name in ("truth", "other")]
        limit = tolerance(precision) / (10 if precision is torch.float64 else 2)
        (expected, want), (outputs, grads) = runs[0][0], runs[1][0]
        calm = steadied(outputs, expected, [(a[0], b[0]) for a, b in runs], limit)
        flat = steadied(grads, want, [(a[1], b[1]) for a, b in runs], limit)
        names = [str(i) for i in range(len(grads))]
        if all(a is b or a is None or torch.equal(a, b) for a, b in zip([*outputs, *grads], [*calm, *flat])):
            return found, True
        still = compare(calm, expected, precision=precision) or gradients_differ(names, flat, want, precision)
        return still or self._buffers(loose), judged([*outputs, *grads], [*calm, *flat])

    def _shaken(
        self, batch: Batch, gradients: bool, name: str, shake: int
    ) -> list[tuple[list[Tensor], list[Tensor | None]]]:
        """Outputs and gradients of one copy, and of the same copy with its parameters shaken."""
        model = getattr(self, name)
        results: list[tuple[list[Tensor], list[Tensor | None]]] = []
        for tried, seed in ((model, None), (shaken(model, shake), shake)):
            setattr(self, name, tried)
            try:
                with random_kept(), self.noise(), torch.set_grad_enabled(gradients):
                    made = self._original(batch, seed) if name == "truth" else self._program(batch)
            finally:
                setattr(self, name, model)
            parameters = [p for p in tried.parameters() if p.requires_grad and p.numel() < _LARGE]
            results.append((_detached(made), _backward(made, parameters) if gradients else []))
        return results

    def _buffers(self, precision: torch.dtype) -> str | None:
        others = dict(self.other.named_buffers())
        for name, want in self.truth.named_buffers():
            if distance(others[name], want) > max(tolerance(want.dtype), tolerance(precision)):
                return f"buffer {name!r} is left with other contents"
        return None

    def _gradients(
        self, batch: Batch, found: list[Tensor], expected: list[Tensor], precision: torch.dtype
    ) -> str | None:
        named: list[tuple[str, Tensor]] = [
            (n, p) for n, p in self.truth.named_parameters() if p.requires_grad and p.numel() < _LARGE
        ]
        named += [(a.name, t) for a, t in zip(self.inputs.atoms, batch.atoms) if t.requires_grad]
        wanted = [t for _, t in named]
        try:
            truth = _backward(expected, wanted)
        except RuntimeError:  # reentrant checkpointing, for one, cannot be asked for gradients
            return None
        floor = noise(truth, precision)
        for (name, wrt), got, want in zip(named, _backward(found, wanted), truth):
            got, want = (torch.zeros_like(wrt) if g is None else g.to_dense() for g in (got, want))
            if off_by(got, want, floor) > max(1e-6, 50 * tolerance(wrt.dtype), 10 * tolerance(precision)):
                return f"the gradient of {name!r} is off"
        return None


def _with_store(original: nn.Module, captured: Captured, name: str) -> nn.Module:
    """A copy of the model with what its RequestModel will have for program `name`, and no more."""
    made = twin(original)
    made.add_module("_roo", nn.Module())
    made.get_submodule("_roo").add_module(name, holder(made, captured))
    return made


def furnished(original: nn.Module, captured: Captured, name: str) -> nn.Module:
    """A copy of the model with what the code of program `name` looks up in it after any pass."""
    made = _with_store(original, captured, name)
    bodies = dict(captured.bodies.named_children())
    for node in captured.graph.nodes:
        if node.op == "get_attr" and node.target in bodies:  # of `no_grad` and kin, before they are inlined
            made.add_module(str(node.target), bodies[str(node.target)])
    return made


class Stages:
    """With `check=True`: the graph is run after every pass, on one batch, against the original."""

    def __init__(self, trial_of: Callable[[], nn.Module], captured: Captured, batch: Batch, inputs: Inputs, name: str):
        """trial_of: makes a fresh copy of the model, with what leaves and constants need under `_roo`."""
        self.trial_of, self.inputs, self.name = trial_of, inputs, name
        self.precision = _precision(captured)
        self.levels = {
            Provenance.IMPRESSION: batch.expanded(inputs),
            Provenance.REQUEST: [*(flat := without_empty(inputs, batch.atoms, batch.counts))[0], flat[1]],
        }
        self.expected: list[Tensor] | None
        try:
            self.expected = self._run(captured.graph, Provenance.IMPRESSION)
            self.shaken = self._run(captured.graph, Provenance.IMPRESSION, shake=True)
        except RuntimeError:  # a batch that the trace, and so the model, does not take
            self.expected = None

    def _run(self, graph: Graph, level: Provenance, shake: bool = False) -> list[Tensor]:
        run = runnable(graph, self.name)
        model = shaken(self.trial_of()) if shake else self.trial_of()
        atoms = [t.detach().clone() for t in self.levels[level]]
        atoms = jittered(atoms, 0) if shake else atoms
        with random_kept(), torch.no_grad(), SteadyNoise():
            torch.manual_seed(0)
            return tensors_of(run(model, *atoms))

    def after(self, stage: str, graph: Graph, level: Provenance) -> None:
        """Raises EquivalenceError where `graph`, which `stage` left behind, gives something else than the trace."""
        if self.expected is None:
            return
        try:
            outputs = self._run(graph, level)
        except FewRowsError:
            return
        found = compare(outputs, self.expected, precision=self.precision)
        if found is None:
            return
        loose = _LOOSER.get(self.precision, self.precision)
        far = compare(outputs, self.expected, precision=loose) is not None
        precision = loose if far else self.precision
        runs = (self._run(graph, level, shake=True), outputs), (self.shaken, self.expected)
        if all(compare(again, first, precision=precision) is None for again, first in runs):
            raise EquivalenceError(f"{stage} changed the result: {found}", where=found)


def _precision(captured: Captured) -> torch.dtype:
    """The lowest floating point precision of the trace."""
    bodies = (m.graph for m in captured.bodies.modules() if isinstance(m, GraphModule))
    values = (n.meta.get("val") for graph in (captured.graph, *bodies) for n in graph.nodes)
    lowered = (d for d in ambient() if d is not None)
    found: set[torch.dtype] = {torch.float64, *lowered, *(v.dtype for v in values if isinstance(v, Tensor))}
    return max(found, key=tolerance)


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def _backward(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a weighted sum of the outputs."""
    floats, weights = weighted(outputs, 2)
    if not floats or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad(floats, wanted, weights, allow_unused=True))
