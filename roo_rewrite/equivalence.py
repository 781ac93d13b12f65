"""What "equal" means, and verify(): the rewritten model against F(E(U), x) on drawn jagged batches.

Values and gradients are compared in float64, on one copy of each model. In lower precision a result is
judged by its distance to the float64 truth, relative to the original's own distance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from roo_rewrite.closeness import compact, compare, gradients_differ, together, tolerance
from roo_rewrite.copies import deep
from roo_rewrite.errors import EquivalenceError, InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.leaves import frozen_buffers, tensors_of
from roo_rewrite.noise import SHAKES, SteadyNoise, jittered, judged, shaken, steadied
from roo_rewrite.ops.broadcast import request_of
from roo_rewrite.purity import duplicate, seeded

if TYPE_CHECKING:
    from roo_rewrite.module import RequestModel

_BOTH = (Provenance.REQUEST, Provenance.IMPRESSION)


@dataclass(frozen=True)
class Batch:
    """A request-level batch as atoms."""

    atoms: list[Tensor]
    counts: Tensor

    def expanded(self, inputs: Inputs) -> list[Tensor]:
        """The same batch at impression level."""
        rows = request_of(self.counts, int(self.counts.sum()))
        return inputs.select(self.atoms, rows, (Provenance.REQUEST,))


def draw_counts(generator: torch.Generator, index: int) -> list[int]:
    """The counts of drawn batch `index`. The first are the corners, then random jagged ones."""
    corners = [[2, 0, 3], [1, 1, 1, 1], [5], [0, 0], [], [1], [0, 4, 0], [3, 3]]
    if index < len(corners):
        return corners[index]
    size = int(torch.randint(1, 7, (1,), generator=generator))
    return torch.randint(0, 6, (size,), generator=generator).tolist()


def draw_batch(inputs: Inputs, example: Sequence[Tensor], counts: list[int], generator: torch.Generator) -> Batch:
    """A batch with these counts whose rows are the example's, in any order; floats are moved a little."""
    rows = next(r for r in (inputs.rows(example, s) for s in _BOTH) if r is not None)
    number = torch.tensor(counts, dtype=torch.long)
    atoms = list(example)
    for side, size in zip(_BOTH, (len(counts), int(number.sum()))):
        picks = torch.randint(rows, (size,), generator=generator)
        atoms = inputs.select(atoms, picks, (side,))
    return Batch([_moved(t, generator) for t in atoms], number)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Float entries that are not whole numbers, scaled by up to a tenth; ids and flags stay valid."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    factor = 1 + 0.1 * (2 * torch.rand(tensor.shape, generator=generator) - 1)
    return torch.where(tensor == tensor.round(), tensor, tensor * factor.to(tensor)).detach()


# -- verify


def verify(original: nn.Module, rewritten: RequestModel, *, batches: int = 20, seed: int = 0) -> None:
    """Holds the rewritten model against the original on drawn batches; raises EquivalenceError if they differ.

    Values, and gradients of every parameter and float input, in float64. The batches always include
    requests without impressions, one impression each, one request with all, and an empty batch. The
    smallest failing batch found is reported. The models themselves are not changed. A model that cannot
    run in float64 (it casts to float32 somewhere) is verified in its own precision; one that runs on no
    drawn batch at all is an error. One that casts and runs is judged by the lowest precision it uses; one
    whose own backward fails (it changes in place what is saved for it) by its values alone.
    """
    if not isinstance(original, nn.Module) or not hasattr(rewritten, "_inputs"):
        raise InputError("verify takes the original model first, and then what rewrite made of it")
    if not (isinstance(batches, int) and isinstance(seed, int) and batches > 0):
        raise InputError(f"batches and seed are whole numbers, batches 1 or more; got {batches!r} and {seed!r}")
    own, other = ([(n, list(p.shape)) for n, p in m.named_parameters()] for m in (original, rewritten))
    if [shape for _, shape in own] != [shape for _, shape in other]:
        raise EquivalenceError(f"these are two models: their parameters are {own} and {other}", seed=seed)
    if _verified(original, rewritten, batches, seed, double=True):
        return
    if not _verified(original, rewritten, batches, seed, double=False):
        raise EquivalenceError(
            "nothing was verified: the original fails, or gives noise, on every drawn batch", seed=seed
        )


def _verified(original: nn.Module, rewritten: RequestModel, batches: int, seed: int, double: bool) -> bool:
    """Whether the original could run on any of the drawn batches. Raises EquivalenceError if a result differs."""
    truth, other = duplicate(original), deep(rewritten)
    truth.train(rewritten.training)
    inputs, example = rewritten._inputs, list(rewritten._example[0])
    if double:
        truth, other = truth.double(), other.double()
        example = [t.double() if t.is_floating_point() else t for t in example]
    precision = _precision(truth, inputs, example, other._example[1])
    if precision is None:
        return False
    ran = False
    for index in range(batches):
        counts = draw_counts(torch.Generator().manual_seed(seed + index), index)
        problem = check_once(truth, other, inputs, example, counts, seed + index, precision)
        if problem:
            raise _shrunk(truth, other, inputs, example, counts, seed + index, problem, precision)
        ran = ran or (problem is not None and sum(counts) > 1)
    return ran


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the lowest floating point precision that anything is computed in."""

    lowest: torch.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.lowest = max((self.lowest, *(t.dtype for t in tensors_of(out))), key=tolerance)
        return out


def _precision(
    model: nn.Module, inputs: Inputs, example: Sequence[Tensor], statics: Sequence[Any]
) -> torch.dtype | None:
    """The lowest precision the model computes in on its example; None where it fails."""
    args, kwargs = inputs.unflatten(example, Provenance.IMPRESSION, statics)
    casts = _Casts()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]), frozen_buffers(model):
        for grad in (False, True):  # a forward that takes gradients itself runs with them alone
            with contextlib.suppress(Exception), torch.set_grad_enabled(grad):  # whatever user code raises
                model(*args, **kwargs)
                break
        else:
            return None
        try:
            with casts, torch.set_grad_enabled(grad):
                model(*args, **kwargs)
        except Exception:  # a nested tensor, say, runs under no such mode
            return max((t.dtype for t in example), key=tolerance, default=torch.float64)
    return casts.lowest


def _shrunk(
    truth: nn.Module,
    other: RequestModel,
    inputs: Inputs,
    example: list[Tensor],
    counts: list[int],
    seed: int,
    problem: str,
    precision: torch.dtype,
) -> EquivalenceError:
    """The smallest batch near the failing one that fails too."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(counts):
            found = check_once(truth, other, inputs, example, candidate, seed, precision)
            if found:
                counts, problem, smaller = candidate, found, True
                break
    return EquivalenceError(
        f"the rewritten model differs from the original: {problem}\n"
        f"num_impressions = {counts} (seed {seed}); run verify(..., batches=1, seed={seed}) again, or look at "
        "model.report and model.code for what was moved",
        num_impressions=counts,
        where=problem,
        seed=seed,
    )


def _smaller(counts: list[int]) -> Iterator[list[int]]:
    for i in range(len(counts)):
        yield counts[:i] + counts[i + 1 :]
    for i, count in enumerate(counts):
        for less in {0, count // 2, count - 1}:
            if 0 <= less < count:
                yield [*counts[:i], less, *counts[i + 1 :]]


def check_once(
    truth: nn.Module,
    other: RequestModel,
    inputs: Inputs,
    example: list[Tensor],
    counts: list[int],
    seed: int,
    precision: torch.dtype = torch.float64,
) -> str | None:
    """What differs on one drawn batch, an output or a gradient, in words; "" where nothing does.

    None where the original itself cannot take such a batch (an empty one, say), or gives noise on it.
    """
    noise = SteadyNoise if other.shares_masks else contextlib.nullcontext
    for gradients in (True, False):
        drawn = _Drawn.of(other, inputs, example, counts, seed, gradients)
        with contextlib.suppress(Exception), noise():  # whatever user code raises
            expected, want = drawn.run(truth, Provenance.IMPRESSION)
            break
    else:
        return None
    try:
        with noise():
            found, got = drawn.run(other, Provenance.REQUEST)
    except Exception as e:
        return f"it fails where the original does not: {type(e).__name__}: {e}"
    names = [n for n, _ in truth.named_parameters()] + [a.name for a in inputs.atoms]
    reshape = sum(counts) <= 1
    problem = compare(found, expected, reshape, precision) or gradients_differ(names, got, want, precision)
    if problem is None:
        return ""
    outs, grads = [expected, found], [want, got]
    for shake in range(SHAKES):
        for module, level in ((truth, Provenance.IMPRESSION), (other, Provenance.REQUEST)):
            values, gradients_of = drawn.run(shaken(module, shake), level, shake)
            outs.append(values)
            grads.append(gradients_of)
    total = sum(g.numel() for g in got if g is not None)
    want, got, *moved = together(*grads)
    left_out = total - sum(g.numel() for g in got if g is not None)
    limit = tolerance(precision) / (10 if precision is torch.float64 else 2)
    runs = list(zip([(expected, want), (found, got)] * SHAKES, zip(outs[2:], moved)))
    outputs = steadied(found, expected, [(a[0], b[0]) for a, b in runs], limit)
    calm = steadied(got, want, [(a[1], b[1]) for a, b in runs], limit)
    still = compare(outputs, expected, reshape, precision) or gradients_differ(names, calm, want, precision)
    if still is not None:
        return still
    return "" if judged([*found, *got], [*outputs, *calm], left_out) else None


@dataclass(frozen=True)
class _Drawn:
    """A drawn batch and how to run a model on it; without gradients where the original's backward fails."""

    inputs: Inputs
    statics: Sequence[Any]
    batch: Batch
    seed: int
    gradients: bool

    @classmethod
    def of(
        cls, other: RequestModel, inputs: Inputs, example: Sequence[Tensor], counts: list[int], seed: int, grad: bool
    ) -> _Drawn:
        batch = draw_batch(inputs, example, counts, torch.Generator().manual_seed(seed))
        for t in batch.atoms:
            t.requires_grad_(grad and t.is_floating_point())
        return cls(inputs, other._example[1], batch, seed, grad)

    def run(
        self, module: nn.Module, level: Provenance, shake: int | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs, and the gradients of a weighted sum of them by every parameter and float input, compact.

        shake: a seed by which the inputs are off by a few units in the last place.
        """
        request = level is Provenance.REQUEST
        atoms = self.batch.atoms if request else self.batch.expanded(self.inputs)
        if not self.gradients:  # then inputs may be changed in place
            atoms = [t.clone() for t in atoms]
        if shake is not None:
            atoms = jittered(atoms, shake)
        args, kwargs = self.inputs.unflatten(atoms, level, self.statics)
        if request:
            kwargs["num_impressions"] = self.batch.counts
        with seeded(self.seed), frozen_buffers(module), torch.set_grad_enabled(self.gradients):
            outputs = tensors_of(module(*args, **kwargs))
            floats, weights = weighted(outputs, self.seed)
            wanted = [*module.parameters(), *self.batch.atoms]
            asking = [t for t in wanted if t.requires_grad]
            if not (self.gradients and floats and asking):
                return [t.detach() for t in outputs], [None] * len(wanted)
            loss = sum((t * w).sum() for t, w in zip(floats, weights))
            grads = list(torch.autograd.grad(loss, asking, allow_unused=True))[::-1]  # type: ignore[arg-type]
            return [t.detach() for t in outputs], [compact(grads.pop()) if t.requires_grad else None for t in wanted]


def weighted(outputs: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that have gradients, and a random weight for each entry.

    An output keeps its weights whether or not others have gradients: a constant written over a value takes them away.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [(t, torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t)) for t in outputs]
    return [t for t, _ in drawn if t.requires_grad], [w for t, w in drawn if t.requires_grad]
