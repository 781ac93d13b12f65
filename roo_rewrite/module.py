"""RequestModel: the rewritten model. The original's parameters under the original's names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roo_rewrite import parts
from roo_rewrite.atoms import has_rows
from roo_rewrite.calls import (
    Setting,
    Watched,
    ambient,
    check_batch,
    check_dims,
    expanded_example,
    hashable,
    kind,
    like,
    state,
    unlike,
    watched,
    without_empty,
)
from roo_rewrite.capture import Captured
from roo_rewrite.copies import deep
from roo_rewrite.errors import InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.leaves import OtherSizesError
from roo_rewrite.ops.broadcast import request_of
from roo_rewrite.ops.kept import FewRowsError
from roo_rewrite.outlook import Asked, Outlook, reads
from roo_rewrite.program import Program
from roo_rewrite.purity import kept, random_kept, twin
from roo_rewrite.report import Report
from roo_rewrite.tracing import as_written, unwatched

Build = Callable[["RequestModel", Sequence[Tensor], Sequence[Any], str], Program]
_MAX_PROGRAMS = 16
_EXAMPLE_ROWS = 64
_ORIGINAL = Program(None, None)
_SHARED = ("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set")


class RequestModel(nn.Module):
    """A request-level module equivalent to an impression-level one.

    Call it like the original, with R rows in request inputs and I in impression inputs, and
    `num_impressions: int64[R]`. Outputs have I rows and the original's structure. Parameters, buffers and
    submodules are the original's own objects: training one trains the other. Other attributes are read from
    the original, and plain ones set there.
    """

    _original: nn.Module
    _inputs: Inputs
    _example: tuple[list[Tensor], list[Any]]
    _build: Build
    _programs: dict[Any, Program]
    _current: dict[bool, Program]
    _settings: list[Setting]
    _watched: list[Watched]
    _roo: nn.Module
    _outlook: Outlook
    _built: int

    def __init__(
        self,
        original: nn.Module,
        inputs: Inputs,
        example: Sequence[Tensor],
        statics: Sequence[Any],
        build: Build,
        settings: Sequence[Setting] = (),
    ):
        """settings: path of a module and name of a plain attribute that its forward may read."""
        super().__init__()
        self.__class__ = _signed(original)
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.training = original.training
        self.__dict__["_original"] = original
        self.__dict__["_inputs"] = inputs
        self.__dict__["_example"] = (list(example), list(statics))
        self.__dict__["_build"] = build
        self.__dict__["_programs"] = dict[Any, Program]()
        self.__dict__["_current"] = dict[bool, Program]()
        self.__dict__["_settings"] = list(settings)
        self.__dict__["_watched"] = watched(original, settings)
        self.__dict__["_roo"] = nn.Module()
        self.__dict__["_outlook"] = Outlook()
        self.__dict__["_built"] = 0
        self._program(example, statics)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original")
        if original is not None and name not in self.__dict__ and name in original.__dict__:
            setattr(original, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestModel:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        memo.update({id(t): t for t in kept(self._original)})
        if self._outlook.changed():
            self._renew()
        memo[id(self._outlook)] = None
        made.__dict__.update(deep(self.__dict__, memo))
        made.__dict__["_outlook"] = self._outlook.of(made._original)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Programs hold functions and traces; they are built again where the model is loaded.
        example, statics = self._example
        return RequestModel, (self._original, self._inputs, example, statics, self._build, self._settings)

    # -- running

    def forward(self, *args: Any, num_impressions: Tensor | None = None, **kwargs: Any) -> Any:
        """Scores of all impressions. Raises InputError where the arguments do not form a batch."""
        atoms: Sequence[Tensor]
        atoms, statics = self._inputs.flatten(args, kwargs, Provenance.REQUEST)
        counts: Any = num_impressions
        if torch.compiler.is_compiling():
            program = self._inlined(atoms, statics)
            program.assert_holds(self)
        else:
            rows, least = check_batch(self._inputs, atoms, counts)
            counts = counts.to(torch.long)
            program = self._program(atoms, statics, counts)
            if not program.accepts(rows):
                return self._broadcast_first(atoms, statics, counts)
            if not least:
                atoms, counts = without_empty(self._inputs, atoms, counts)
        if program.emitted is None or program.captured is None:
            return self._broadcast_first(atoms, statics, counts)
        if torch.compiler.is_compiling() or not program.checked:
            return program.captured.returned(program.emitted.whole(self, *atoms, counts))
        before = self._written()
        try:
            return program.captured.returned(program.emitted.whole(self, *atoms, counts))
        except (
            OtherSizesError,
            FewRowsError,
        ):  # the trace is not of such a batch; the original is run, unless half a step is done
            if self._written() != before:
                raise
            return self._broadcast_first(atoms, statics, counts)

    def _written(self) -> list[int]:
        """How often each buffer was written to."""
        return [b._version for b in self._original.buffers()]

    def request_part(self, *args: Any, num_impressions: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Request inputs -> the values that cross to the impressions, by name, R rows each.

        Takes the full arguments of a call, or those of the request side alone. `num_impressions` is
        needed where the batch matters: batch norm in training, padding to the batch's longest history.
        """
        return parts.request_part(self, num_impressions, args, kwargs)

    def impression_part(
        self, user: dict[str, Tensor], *args: Any, num_impressions: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What `request_part` returned, impression inputs and their counts -> scores of all impressions.

        Without `num_impressions` all impressions belong to one request.
        """
        return parts.impression_part(self, user, num_impressions, args, kwargs)

    @property
    def shares_masks(self) -> bool:
        """Whether the impressions of a request share their dropout masks."""
        return getattr(self._build, "options", None) is not None and self._build.options.dropout == "per_request"  # type: ignore[attr-defined]

    def _whole_program(self) -> Program:
        return self._current[self.training]

    def _broadcast_first(self, atoms: Sequence[Tensor], statics: Sequence[Any], counts: Tensor) -> Any:
        """F(E(U), x): the original on broadcast inputs. Correct for every model, and saves nothing."""
        total = self._impressions(atoms)
        rows = request_of(counts, int(counts.sum()) if total is None else total)
        expanded = self._inputs.select(atoms, rows, (Provenance.REQUEST,))
        args, kwargs = self._inputs.unflatten(expanded, Provenance.IMPRESSION, statics)
        if torch.compiler.is_compiling():
            return self._original(*args, **kwargs)
        try:
            return self._original(*args, **kwargs)
        except Exception as e:  # whatever user code raises; on inputs like the example's it is the model's own error
            other = unlike(self._inputs, self._example[0], atoms)
            if not other:
                raise
            raise InputError(
                f"the model fails, {type(e).__name__}: {e}\nThe call is unlike the example: {other}"
            ) from e

    # -- programs

    def _program(self, atoms: Sequence[Tensor], statics: Sequence[Any], counts: Tensor | None = None) -> Program:
        """The program for this mode, these settings and these kinds of input, built on demand."""
        if self._outlook.changed():
            self._renew()
        mode, kinds = self._mode(), tuple([kind(t) for t in atoms])
        key = (mode, kinds, hashable(statics))
        found = self._programs.get(key)
        if found is None or not found.holds(self):
            found = self._new_program(atoms, statics, counts)
            found.mode, found.kinds, found.statics = mode, kinds, tuple(statics)
            self._programs[key] = found
        self._current[self.training] = found
        return found

    def _mode(self) -> Any:
        """The state of the model that a program is specialised to."""
        return (self.training, state(self._watched), ambient(), dist.is_available() and dist.is_initialized())

    def _inlined(self, atoms: Sequence[Tensor], statics: Sequence[Any]) -> Program:
        """The program to inline while compiling: a known one for such inputs and any batch size, or the original."""
        program = self._current[self.training]
        for known, given in zip(program.kinds, atoms):
            if known != kind(given):
                return _ORIGINAL
        rows = self._impressions(atoms)
        few = rows is not None and rows < 2 and not (program.single if rows else program.empty)
        captured = program.captured  # compiled code goes by neither the rows kept nor the numbers that a buffer holds
        looked_at = captured is not None and (captured.kept or captured.numbers)
        if few or looked_at or not program.always or list(program.statics) != list(statics):
            return _ORIGINAL
        return program

    def _impressions(self, atoms: Sequence[Tensor]) -> int | None:
        """I as an impression input tells it, known without looking at the counts."""
        for atom, tensor in zip(self._inputs.atoms, atoms):
            if atom.provenance is Provenance.IMPRESSION and has_rows(atom):
                return tensor.shape[0]
        return None

    def _new_program(self, atoms: Sequence[Tensor], statics: Sequence[Any], counts: Tensor | None) -> Program:
        if self._built >= _MAX_PROGRAMS:
            return Program(None, None, notes=(f"more than {_MAX_PROGRAMS} kinds of input; the original runs",))
        example: Sequence[Tensor] = self._example[0]
        check_dims(self._inputs, example, atoms)
        if any(kind(a) != kind(b) for a, b in zip(example, atoms)):
            own = None if counts is None else expanded_example(self._inputs, atoms, counts, _EXAMPLE_ROWS)
            example = own or [like(e, a) for e, a in zip(example, atoms)]
        self.__dict__["_built"] += 1
        with unwatched(), as_written():
            made = self._build(self, example, statics, f"p{self._built}")
            if made.captured is not None:
                self._look(made.captured, example, statics)
        return made

    def _look(self, captured: Captured, example: Sequence[Tensor], statics: Sequence[Any]) -> None:
        """Notes what a forward reads of the model beside its parameters."""
        copied = twin(self._original)
        args, kwargs = self._inputs.unflatten(example, Provenance.IMPRESSION, statics)
        with reads() as found, Asked() as asked, random_kept(), torch.no_grad(), contextlib.suppress(Exception):
            copied(*(t.clone() if isinstance(t, Tensor) else t for t in args), **kwargs)
        keys = {path: found.get(id(m), set()) for path, m in copied.named_modules()}
        leaves = (*captured.leaves, *(site.path for site in captured.sites if site.path))
        self._outlook.look(self._original, leaves, keys, statics, asked.of(copied))

    def _renew(self) -> None:
        """Forgets all programs: the model is another."""
        self._programs.clear()
        self.__dict__["_outlook"] = Outlook()
        known = dict(self._original.named_modules())
        self.__dict__["_watched"] = watched(self._original, [(p, k) for p, k in self._settings if p in known])

    def _apply(self, fn: Any, recurse: bool = True) -> RequestModel:
        nn.Module._apply(self._roo, fn, recurse)  # type: ignore[no-untyped-call]
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> RequestModel:
        """Switches both this module and the original; the program of a new mode is built here."""
        changed = mode != self.training
        self._original.training = mode
        super().train(mode)
        if changed:
            self._program(*self._example)
        return self

    # -- looking at it

    @property
    def report(self) -> Report:
        """What moved, what did not and why, what it saves."""
        return Report.of(self._whole_program(), self._inputs, type(self._original).__name__, self.training)

    @property
    def code(self) -> str:
        """The emitted Python source."""
        emitted = self._whole_program().emitted
        return emitted.source if emitted is not None else "# the original, on broadcast inputs\n"


def _signed(original: nn.Module) -> type[RequestModel]:
    """RequestModel whose `forward` shows the original's parameters and `num_impressions`: torch.export goes by it."""

    def forward(self: RequestModel, *args: Any, num_impressions: Tensor | None = None, **kwargs: Any) -> Any:
        return RequestModel.forward(self, *args, num_impressions=num_impressions, **kwargs)

    own = inspect.signature(RequestModel.forward)
    try:
        given = list(inspect.signature(original.forward).parameters.values())
    except ValueError:  # forward of a built-in or scripted module
        return RequestModel
    counts = own.parameters["num_impressions"]
    rest = [p for p in given if p.kind is p.VAR_KEYWORD]
    parameters = [own.parameters["self"], *(p for p in given if p not in rest), counts, *rest]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("RequestModel", (RequestModel,), {"forward": forward, "__module__": __name__})
