"""Model -> fx graph over ATen, with the batch dim symbolic.

The model is exported on its atoms (see `inputs`), at a batch size that equals no other size in it, so
that two equal sizes are never confused. It is run to be traced; where that fails its bytecode is interpreted,
which also follows `len(x)`, `int(x.size(0))` and NumPy. What the trace took for granted of the batch size
(guards) is kept: a batch outside them is run by the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
import torch.fx
from torch import Tensor, nn
from torch.export.dynamic_shapes import Dim
from torch.utils import _pytree as pytree

from roo_rewrite.adapter import Adapter, rehearsed
from roo_rewrite.branches import Branches, Place, on_data
from roo_rewrite.data_sizes import not_fixed
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import Provenance
from roo_rewrite.guards import BATCH, Guards
from roo_rewrite.inputs import Inputs
from roo_rewrite.kept import Masked, settled
from roo_rewrite.kjt import looked_up
from roo_rewrite.leaves import LeafSite, frozen_buffers, observed, opaque, outermost, tensors_of
from roo_rewrite.lifted import unlifted
from roo_rewrite.methods import Leaf, Unfit, confirm, failed_in, named
from roo_rewrite.nested import at_padding, nests, padding_apart
from roo_rewrite.outputs import unflatten_output
from roo_rewrite.packed import padded_sequences
from roo_rewrite.pieces import Pieces
from roo_rewrite.purity import DRAWS, random_kept, twin, untraceable
from roo_rewrite.python_draws import drop_unread, symbolic_draws
from roo_rewrite.read_numbers import ReadNumbers, WrittenError, settled_buffers
from roo_rewrite.swallowed import same_way, watched
from roo_rewrite.tracing import (
    Traceable,
    assignments_allowed,
    brief,
    no_lost_calls,
    python_only,
    silent,
    size_fixed,
    sizes_kept,
    symbolic_len,
    without_vmap,
)

_BOTH = (Provenance.REQUEST, Provenance.IMPRESSION)


@dataclass
class Captured:
    """A traced model. The graph's placeholders are the atoms, in order; its output is a flat tuple.

    bodies: holds the bodies of higher-order ops by name. sites: what each `roo::leaf` node calls.
    symbols: the trace's size symbols -> the same in terms of `BATCH`.
    accepts: whether a batch of this many rows is one the trace is valid for. model: the copy that was traced.
    assumed: buffers whose values the passes built on (masks, index vectors): see `Program.holds`.
    steady: sizes known only at run time that are the same at both rates -> the node that makes each (`annotate`).
    branches: where forward asked whether any or all of a mask is true; the graph's last outputs are what it asked.
    again: the trace that goes the other way at some of them.
    kept: whether rows that a mask removes are among all others in the graph (see `kept`).
    numbers: whether forward reads numbers off buffers of `assumed` (see `read_numbers`).
    """

    model: nn.Module
    graph: torch.fx.Graph
    bodies: nn.Module
    constants: dict[str, Tensor]
    out_tree: pytree.TreeSpec
    out_values: list[Any]
    batch: int
    symbols: dict[sympy.Symbol, sympy.Expr]
    accepts: Guards
    sites: list[LeafSite] = field(default_factory=list)
    leaves: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    assumed: dict[str, Tensor] = field(default_factory=dict)
    steady: dict[sympy.Symbol, torch.fx.Node] = field(default_factory=dict)
    branches: tuple[Place, ...] = ()
    again: Callable[[Set[Place]], Captured] | None = None
    kept: bool = False
    numbers: bool = False

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """The flat outputs of the graph in the structure of the original's."""
        return unflatten_output(self.out_values, self.out_tree, tensors)

    def expr(self, size: int | torch.SymInt) -> sympy.Expr:
        """A size in terms of `BATCH`."""
        if isinstance(size, torch.SymInt):
            return sympy.sympify(size.node.expr).subs(self.symbols)
        return sympy.Integer(size)


def trace_batch(model: nn.Module, atoms: Sequence[Tensor]) -> int:
    """A prime that divides no size in sight, so that no size can be mistaken for the batch."""
    sizes = {s for t in (*model.parameters(), *model.buffers()) for s in t.shape}
    sizes |= {s for t in atoms for s in t.shape[1:]}
    primes = (p for p in range(61, 10**6) if all(p % d for d in range(2, int(p**0.5) + 1)))
    return next(p for p in primes if all(s % p or s == 0 for s in sizes))


def one_level(inputs: Inputs, atoms: Sequence[Tensor]) -> int:
    """The rows of an impression-level example. Raises CaptureError where it is none."""
    counts = [inputs.rows(atoms, side) for side in _BOTH]
    known = {c for c in counts if c is not None}
    if len(known) > 1:
        raise CaptureError(f"the example must be impression-level: request and impression inputs have {counts} rows")
    if not known or not max(known):
        raise CaptureError("the example has no rows; give at least one impression (two or more are better)")
    return max(known)


def trace_rows(inputs: Inputs, atoms: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The example at `batch` rows, its rows taken in turn."""
    rows = one_level(inputs, atoms)
    return inputs.select(atoms, torch.arange(batch) % rows, _BOTH)


def capture(
    model: nn.Module,
    inputs: Inputs,
    atoms: Sequence[Tensor],
    statics: Sequence[Any],
    leaves: Sequence[str],
    against: Set[Place] | None = frozenset(),
    kept: bool = True,
) -> Captured:
    """Traces a copy of `model` in its present mode. A module that cannot be traced becomes a leaf, and is noted.

    against: where the trace takes the less general way of a condition on values (`branches`); None to take neither.
    kept: rows that a mask removes are traced among all others, where that can be done.

    Raises CaptureError when the model cannot be run on the example, or not be traced at all.
    """
    batch = trace_batch(model, atoms)
    example = trace_rows(inputs, atoms, batch)
    drawn = _pure(model, inputs, example, statics)
    masked = Masked(kept)
    try:
        captured = _capture(model, inputs, example, statics, leaves, batch, masked, drawn, against)
    except CaptureError:
        if not masked.used:
            raise
        captured = _capture(model, inputs, example, statics, leaves, batch, Masked(False), drawn, against)
    captured.again = lambda places: capture(model, inputs, atoms, statics, leaves, places, kept and captured.kept)
    return captured


def _capture(
    model: nn.Module,
    inputs: Inputs,
    example: list[Tensor],
    statics: Sequence[Any],
    leaves: Sequence[str],
    batch: int,
    masked: Masked,
    drawn: int,
    against: Set[Place] | None,
) -> Captured:
    chosen, notes, unfit = list[Leaf](outermost(leaves)), dict[Leaf, str](), set[Leaf]()
    if any(map(nests, model.modules())):
        chosen.append(cast(Leaf, at_padding))
    written: Set[str] = set()
    seeking, branching = False, None if against is None else bool(against)
    for attempt in range(48):
        copied = twin(model)
        try:
            with sizes_kept() if seeking else contextlib.nullcontext():
                asked = Branches(against or frozenset()) if branching else None
                captured = _export(
                    copied, inputs, example, statics, chosen, batch, masked, False, drawn, asked, written
                )
        except WrittenError as e:
            written = written | e.names
        except Unfit as e:
            if e.leaf not in notes:
                raise
            unfit.add(e.leaf)
            chosen.remove(e.leaf)
            del notes[e.leaf]
        except CaptureError:
            raise
        except Exception as e:  # whatever user code raises while it is traced
            if not attempt and not chosen and not drawn and python_only(e):
                interpreted = _interpreted(model, inputs, example, statics, batch)
                if interpreted is not None:
                    return interpreted
            if branching is not None and on_data(e):
                branching = None if branching else True
                continue
            if size_fixed(e) and not seeking:
                seeking = True
                continue
            leaf = next((p for p in failed_in(copied, e) if p not in unfit and p not in chosen), None)
            if leaf is None:
                raise CaptureError(f"the model cannot be traced: {brief(e)}") from e
            chosen = [p for p in chosen if not _under(p, leaf)] + [leaf]
            notes[leaf] = f"{named(leaf)} is kept as an opaque leaf: {brief(e)}"
        else:
            captured.notes = [text for leaf, text in notes.items() if _used(leaf, captured.sites)]
            return captured
    raise CaptureError("the model needs more than 48 leaf modules; name its untraceable modules with leaves=[...]")


def _under(leaf: Leaf, other: Leaf) -> bool:
    """Whether a module lies within another."""
    return isinstance(leaf, str) and isinstance(other, str) and leaf.startswith(f"{other}.")


def _used(leaf: Leaf, sites: list[LeafSite]) -> bool:
    return any(leaf == site.leaf() for site in sites)


def _pure(model: nn.Module, inputs: Inputs, example: list[Tensor], statics: Sequence[Any]) -> int:
    """How many numbers a call draws from Python's generator. Raises CaptureError where one trace cannot do."""

    def call(order: Tensor) -> Callable[[nn.Module], list[Tensor]]:
        def run(copied: nn.Module) -> list[Tensor]:
            args, kwargs = inputs.unflatten(inputs.select(example, order, _BOTH), Provenance.IMPRESSION, statics)
            return tensors_of(copied(*args, **kwargs))

        return run

    rows = inputs.rows(example, Provenance.IMPRESSION) or inputs.rows(example, Provenance.REQUEST) or 0
    other = torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(3))
    try:
        reason, drawn = untraceable(model, call(torch.arange(rows)), call(other))
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(f"the model fails on {rows} rows: {brief(e)}") from e
    if reason is not None:
        raise CaptureError(reason)
    return drawn


def _interpreted(
    model: nn.Module, inputs: Inputs, example: list[Tensor], statics: Sequence[Any], batch: int
) -> Captured | None:
    """The model traced by interpreting its bytecode; None where that fails too."""
    with contextlib.suppress(Exception), torch.compiler.set_stance("default"):
        return _export(twin(model), inputs, example, statics, [], batch, Masked(False), strict=True)
    return None


def _export(
    model: nn.Module,
    inputs: Inputs,
    example: list[Tensor],
    statics: Sequence[Any],
    leaves: Sequence[Leaf],
    batch: int,
    masked: Masked,
    strict: bool = False,
    drawn: int = 0,
    branches: Branches | None = None,
    written: Set[str] = frozenset(),
) -> Captured:
    sites, paths = list[LeafSite](), [p for p in leaves if isinstance(p, str)]
    with watched() as run:
        _observe(twin(model), inputs, example, statics, leaves, sites, batch, masked)
    if strict and (sites or run.raised):
        raise CaptureError("an autograd.Function, and what catches exceptions, is not interpreted")
    pieces = Pieces(inputs.atoms)
    adapter = Adapter(model, inputs, statics, branches, None if strict else masked, pieces.see)
    numbers = ReadNumbers(model, written)
    adapter.training = model.training
    shapes = {"atoms": tuple({0: Dim.DYNAMIC} if t.ndim else None for t in example)}
    around = contextlib.ExitStack()
    with around, random_kept(), torch.enable_grad(), silent(), assignments_allowed():
        if strict:  # nothing may be patched then; what a trace would lose shows when the model is run
            out_values, out_tree = rehearsed(model, inputs, example, statics, batch)
        else:
            for patch in (no_lost_calls(), opaque(model, leaves, sites), looked_up(model, paths, sites, pieces)):
                around.enter_context(patch)
            trace = around.enter_context(watched(run))
            around.enter_context(symbolic_len())
            around.enter_context(padded_sequences())
            around.enter_context(padding_apart(tracing=True))
            around.enter_context(Traceable())
            around.enter_context(numbers)
            around.enter_context(branches or contextlib.nullcontext())
            draws = around.enter_context(symbolic_draws())
            around.enter_context(masked.rows(batch, tracing=True))
        program = without_vmap(torch.export.export(adapter, tuple(example), dynamic_shapes=shapes, strict=strict))
    if not strict:
        same_way(run, trace)
        out_values, out_tree = adapter.returned
    graph, constants = unlifted(program, model)
    not_fixed(graph)
    settled_buffers(graph, numbers.read)
    if drawn and (sites or draws.count != drawn or not drop_unread(graph)):
        raise CaptureError(DRAWS)
    symbols = _batch_symbols(program, inputs, graph)
    accepts = Guards.of(program, symbols, example, batch)
    rows = next((s for s, e in symbols.items() if e == BATCH), None)
    kept = settled(graph, program.graph_module, rows, batch)
    return Captured(
        model,
        graph,
        program.graph_module,
        constants,
        out_tree,
        out_values,
        batch,
        symbols,
        accepts,
        sites,
        tuple(paths),
        assumed=numbers.read,
        branches=tuple(branches.asked) if branches else (),
        kept=kept,
        numbers=bool(numbers.read),
    )


def _observe(
    model: nn.Module,
    inputs: Inputs,
    example: list[Tensor],
    statics: Sequence[Any],
    leaves: Sequence[Leaf],
    sites: list[LeafSite],
    batch: int,
    masked: Masked,
) -> None:
    second, fresh = batch + 2, twin(model)
    with torch.no_grad(), random_kept(), frozen_buffers(model):
        for size, again in ((batch, False), (second, True)):
            order = torch.arange(size) % batch
            rows = inputs.select(example, order.flip(0) if again else order, _BOTH)
            args, kwargs = inputs.unflatten(rows, Provenance.IMPRESSION, statics)
            with padding_apart(tracing=False), observed(model, leaves, sites, again), masked.rows(size, tracing=False):
                model(*args, **kwargs)
        for site in sites:
            site.batches = (batch, second)
            if site.called:
                confirm(site, (fresh, model))


def _batch_symbols(
    program: torch.export.ExportedProgram, inputs: Inputs, graph: torch.fx.Graph
) -> dict[sympy.Symbol, sympy.Expr]:
    """Each input's first dim, as the trace calls it, in terms of BATCH."""
    symbols: dict[sympy.Symbol, sympy.Expr] = {}
    for atom, node in zip(inputs.atoms, (n for n in graph.nodes if n.op == "placeholder")):
        shape = node.meta["val"].shape
        if atom.kind in ("shared", "values") or not isinstance(shape[0], torch.SymInt):
            continue
        expr = shape[0].node.expr
        if isinstance(expr, sympy.Symbol):
            symbols[expr] = BATCH + int(atom.kind == "offsets_total")
    return symbols
