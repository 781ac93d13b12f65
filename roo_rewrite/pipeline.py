"""rewrite(): the passes in order. Read this first.

    capture    model -> graph over ATen, batch symbolic
    normalize  one way to say each thing
    annotate   provenance and batching on every node
    split      operators that mix both sides, part by part
    partition  where to broadcast
    hoist      request nodes first, one broadcast for each value that crosses
    lower      one implementation of each jagged operator
    emit       graph -> functions of a RequestModel

What cannot be captured or fails its check runs as F(E(U), x): the original on broadcast inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils import _pytree as pytree

import passes.annotate
import passes.branches
import passes.drawn
import passes.hoist
import passes.kept_regions
import passes.lower
import passes.mask_gain
import passes.normalize
import passes.own_columns
import passes.partition
import passes.sorted_rows
import passes.split
from roo_rewrite import legality
from roo_rewrite.capture import Captured, capture, one_level
from roo_rewrite.emit import emit, rename
from roo_rewrite.equivalence import draw_batch
from roo_rewrite.errors import CaptureError, EquivalenceError, SpecError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Inputs, bind_inputs
from roo_rewrite.lazies import give_parameters, give_shapes, refuse_parameters
from roo_rewrite.leaves import default_leaves
from roo_rewrite.module import RequestModel
from roo_rewrite.program import Program, holder
from roo_rewrite.purity import random_kept, settings, twin
from roo_rewrite.tracing import as_written
from roo_rewrite.trial import Stages, Trial, furnished

DEFAULT_FANOUT = 16.0


@dataclass(frozen=True)
class Options:
    """How to rewrite; see `rewrite`."""

    fanout: float
    dropout: str
    leaves: tuple[str, ...]
    check: bool
    split: passes.split.Mode = "priced"
    otherwise: frozenset[tuple[str, str]] = frozenset()
    kept: bool = True


def rewrite(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: FeatureSpec,
    fanout: float | None = None,
    dropout: Literal["per_impression", "per_request"] = "per_impression",
    leaves: Sequence[str] = (),
    check: bool = False,
    split: passes.split.Mode = "priced",
) -> RequestModel:
    """An equivalent request-level model, sharing the parameters of `model`.

    args, kwargs: one impression-level example, all tensors with the same number of rows.
    spec: which inputs are request-level. fanout: impressions a request, a hint (default 16).
    dropout: "per_request" lets the impressions of a request share one mask.
    leaves: paths of submodules to call as they are; naming one also declares it row-wise.
    split: "priced" splits a mixed operator where that pays; "always" and "never" are for experiments.
    check: verify after every pass, and raise EquivalenceError instead of falling back.

    Raises SpecError, CaptureError (the model cannot be run on the example), EquivalenceError (check).
    """
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model must be an nn.Module, got {type(model).__name__}; wrap a function in a module")
    if isinstance(model, torch.jit.ScriptModule) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise CaptureError(
            f"model is compiled, a {type(model).__name__}; rewrite the module it was made from, and compile that"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CaptureError(f"model is a {type(model).__name__}; rewrite the module it holds, and wrap the result")
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, (Mapping, type(None))):
        raise CaptureError("the example is a tuple of positional arguments and a dict of those by name")
    if split not in get_args(passes.split.Mode):
        raise SpecError(f"split must be one of {get_args(passes.split.Mode)}, got {split!r}")
    kwargs = dict(kwargs or {})
    inputs = bind_inputs(model.forward, args, kwargs, spec)
    atoms, statics = inputs.flatten(args, kwargs, Provenance.IMPRESSION)
    options = Options(_fanout(fanout), _dropout(dropout), _paths(model, leaves), check, split)
    give_shapes(model, args, kwargs)
    copied = _called(model, args, kwargs)
    if give_parameters(model, copied, args, kwargs):
        copied = _called(model, args, kwargs)
        refuse_parameters(model, copied)
    one_level(inputs, atoms)
    return RequestModel(model, inputs, atoms, statics, Builder(options), settings(model, copied))


def _fanout(fanout: float | None) -> float:
    value = DEFAULT_FANOUT if fanout is None else fanout
    if not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
        raise SpecError(f"fanout is impressions a request, 1 or more; got {fanout!r}")
    return float(value)


def _dropout(dropout: str) -> str:
    if dropout not in ("per_impression", "per_request"):
        raise SpecError(f"dropout must be 'per_impression' or 'per_request', got {dropout!r}")
    return dropout


def _paths(model: nn.Module, leaves: Sequence[str]) -> tuple[str, ...]:
    known = dict(model.named_modules())
    if isinstance(leaves, str):
        raise SpecError(f"leaves must be a list of paths, got {leaves!r}; write [{leaves!r}]")
    unknown = [p for p in leaves if p not in known or not p]
    if unknown:
        raise SpecError(f"leaves {unknown} name no submodule; the submodules are {[p for p in known if p]}")
    return tuple(leaves)


def _called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """A copy of the model that has run on the example; that comes before anything else is said about the model."""
    for grad in (False, True):  # a forward that takes gradients itself runs with them alone
        copied = twin(model)
        given = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
        try:
            with torch.set_grad_enabled(grad), random_kept(), as_written():
                copied(*given[0], **given[1])
            break
        except Exception as e:
            if grad:
                raise CaptureError(f"the model cannot be called with the example: {type(e).__name__}: {e}") from e
    return copied


@dataclass(frozen=True)
class Builder:
    """Builds the program of a RequestModel for one mode and kind of input."""

    options: Options

    def __call__(self, model: RequestModel, example: Sequence[Tensor], statics: Sequence[Any], name: str) -> Program:
        """The program; one without functions where nothing could be proved, its notes say why."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return _build(self.options, model, example, statics, name)
        except CaptureError as e:
            return Program(None, None, notes=(str(e),))
        except EquivalenceError:
            raise
        except Exception as e:  # a fault of ours must not keep a model from running
            if self.options.check:
                raise
            return Program(None, None, notes=(f"internal error, please report it: {type(e).__name__}: {e}",))


def _build(
    options: Options, model: RequestModel, example: Sequence[Tensor], statics: Sequence[Any], name: str
) -> Program:
    original, inputs = model._original, model._inputs
    leaves = [*options.leaves, *(p for p in default_leaves(original) if p not in options.leaves)]
    captured = capture(original, inputs, example, statics, leaves, kept=options.kept)
    if captured.branches and captured.kept:  # both ways of a condition are compared on the rows as they are
        captured = capture(original, inputs, example, statics, leaves, kept=False)
    if captured.branches and not passes.branches.settled(captured):
        captured = capture(original, inputs, example, statics, leaves, against=None, kept=options.kept)
    stages = _stages(options, captured, inputs, original, example, name)
    passes.normalize.normalize(captured)
    legality.normalized(captured.graph)
    if not _rows_back(captured, inputs, options):
        return _build(replace(options, kept=False), model, example, statics, name)
    program = _compile(captured, inputs, options, name, stages)
    trial = Trial(original, program, inputs, statics, name, options.dropout == "per_request")
    found = trial.mismatch(example)
    if found is not None:
        if options.check:
            raise EquivalenceError(f"the rewritten model differs from the original: {found}", where=found)
        if captured.kept:
            return _build(replace(options, kept=False), model, example, statics, name)
        if options.split != "never":
            plainer = _build(replace(options, split="never"), model, example, statics, name)
            return replace(plainer, notes=(*plainer.notes, f"nothing was split, the result failed its check: {found}"))
        return Program(None, None, notes=(f"the rewritten model failed its check and is not used: {found}",))
    model._roo.add_module(name, holder(model, captured))
    return replace(
        program, empty=not trial.fails_empty(example), single=trial.same_on_one(example), notes=tuple(captured.notes)
    )


def _rows_back(captured: Captured, inputs: Inputs, options: Options) -> bool:
    """Drops the order of rows that are sorted and put back. Whether all rows may be among those that a mask keeps."""
    if not captured.kept and not passes.sorted_rows.sorts(captured.graph):
        return True
    passes.own_columns.own_columns(captured.graph)
    passes.annotate.annotate(captured, inputs, captured.model, _policy(options))
    if passes.sorted_rows.find(captured):
        passes.annotate.annotate(captured, inputs, captured.model, _policy(options))
        passes.sorted_rows.settle(captured.graph, passes.kept_regions.unproved(captured.graph))
        passes.annotate.annotate(captured, inputs, captured.model, _policy(options))
    return not captured.kept or not passes.kept_regions.unproved(captured.graph)


def _policy(options: Options) -> passes.annotate.Policy:
    return passes.annotate.Policy(options.dropout, frozenset(options.leaves))


def _split(captured: Captured, options: Options) -> passes.split.Split:
    """Splits the graph; where that fails it stays as it is."""
    try:
        return passes.split.split(captured, options.fanout, options.split, options.otherwise)
    except Exception as e:  # a fault of ours must not keep a model from being hoisted
        if options.check:
            raise
        captured.notes.append(f"nothing was split, please report it: {type(e).__name__}: {e}")
        return passes.split.Split()


def _stages(
    options: Options, captured: Captured, inputs: Inputs, original: nn.Module, example: Sequence[Tensor], name: str
) -> Callable[[str, Graph, Provenance], None]:
    """What is done with the graph after each pass: it is run against the trace where `check` asks for it."""
    if not options.check:
        return lambda stage, graph, level: None
    batch = draw_batch(inputs, example, [2, 0, 3], torch.Generator().manual_seed(0))
    stages = Stages(lambda: furnished(original, captured, name), captured, batch, inputs, name)
    return lambda stage, graph, level: stages.after(stage, passes.drawn.ordered(graph), level)


def _note_masks(
    captured: Captured,
    unsplit: Graph,
    found: passes.split.Split,
    plan: passes.partition.Partition,
    inputs: Inputs,
    options: Options,
) -> None:
    """A note of what a mask would gain; a fault in it changes nothing else."""
    try:
        note = passes.mask_gain.mask_gain(captured, unsplit, found.unmasked, plan, lambda c: _plan(c, inputs, options))
    except Exception as e:
        if options.check:
            raise
        note = f"what a mask would gain is not known, please report it: {type(e).__name__}: {e}"
    captured.notes += [] if note is None else [note]


def _plan(captured: Captured, inputs: Inputs, options: Options) -> passes.partition.Partition:
    """The plan of a graph, for comparison."""
    policy = _policy(options)
    passes.annotate.annotate(captured, inputs, captured.model, policy)
    _split(captured, options)
    passes.annotate.annotate(captured, inputs, captured.model, policy)
    return passes.partition.partition(captured, options.fanout)


def _compile(
    captured: Captured, inputs: Inputs, options: Options, name: str, after: Callable[[str, Graph, Provenance], None]
) -> Program:
    policy = _policy(options)
    after("normalize", captured.graph, Provenance.IMPRESSION)
    passes.annotate.annotate(captured, inputs, captured.model, policy)
    unsplit = captured.graph
    found = _split(captured, options)
    after("split", captured.graph, Provenance.IMPRESSION)
    passes.annotate.annotate(captured, inputs, captured.model, policy)
    legality.annotated(captured.graph)
    plan = passes.partition.partition(captured, options.fanout)
    _note_masks(captured, unsplit, found, plan, inputs, options)
    graph = passes.hoist.hoist(captured, inputs, plan)
    legality.hoisted(graph)
    after("hoist", graph, Provenance.REQUEST)
    passes.lower.lower(graph)
    after("lower", graph, Provenance.REQUEST)
    rename(graph, name)
    return Program(captured, emit(graph), plan=plan, candidates=tuple(found.candidates))
