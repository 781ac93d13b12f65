"""RequestModel: the rewritten model. The original's parameters under the original's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roo_rewrite.capture import unflatten_output
from roo_rewrite.errors import InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.ops.broadcast import request_of
from roo_rewrite.program import Program
from roo_rewrite.report import Report

Build = Callable[["RequestModel", Sequence[Tensor], Sequence[Any], str], Program]
_MAX_PROGRAMS = 16
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")


class RequestModel(nn.Module):
    """A request-level module equivalent to an impression-level one.

    Call it like the original, with R rows in request inputs and I in impression inputs, and
    `num_impressions: int64[R]`. Outputs have I rows and the original's structure. Parameters, buffers and
    submodules are the original's own objects: training one trains the other.
    """

    _original: nn.Module
    _inputs: Inputs
    _example: tuple[list[Tensor], list[Any]]
    _build: Build
    _programs: dict[Any, Program]
    _current: dict[bool, Program]
    _members: list[nn.Module]
    _roo: nn.Module

    def __init__(
        self, original: nn.Module, inputs: Inputs, example: Sequence[Tensor], statics: Sequence[Any], build: Build
    ):
        super().__init__()
        self.__class__ = _signed(original)
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_modules"] = dict(original._modules)
        self.training = original.training
        self.__dict__["_original"] = original
        self.__dict__["_inputs"] = inputs
        self.__dict__["_example"] = (list(example), list(statics))
        self.__dict__["_build"] = build
        self.__dict__["_programs"] = dict[Any, Program]()
        self.__dict__["_current"] = dict[bool, Program]()
        self.__dict__["_members"] = list(original.modules())
        self.add_module("_roo", nn.Module())
        self._program(example, statics)

    # -- running

    def forward(self, *args: Any, num_impressions: Tensor, **kwargs: Any) -> Any:
        """Scores of all impressions. Raises InputError where the arguments do not form a batch."""
        atoms, statics = self._inputs.flatten(args, kwargs, Provenance.REQUEST)
        if torch.compiler.is_compiling():
            program = self._current[self.training]
        else:
            program = self._program(atoms, statics)
            rows = check_batch(self._inputs, atoms, num_impressions)
            if not program.accepts(rows):
                return self._broadcast_first(atoms, statics, num_impressions)
        if program.emitted is None or program.captured is None:
            return self._broadcast_first(atoms, statics, num_impressions)
        return unflatten_output(program.captured, program.emitted.whole(self, *atoms, num_impressions))

    def request_part(self, *args: Any, num_impressions: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Request inputs -> the values that cross to the impressions, by name, R rows each.

        Takes the full arguments of a call, or those of the request side alone. `num_impressions` is
        needed only in training, where batch norm counts impressions.
        """
        emitted = self._whole_program().emitted
        atoms = self._inputs.flatten_side(args, kwargs, Provenance.REQUEST)
        if emitted is None:
            return {a.name: t for a, t in zip(self._side(Provenance.REQUEST), atoms)}
        return dict(zip(emitted.residuals, emitted.request(self, *atoms, num_impressions)))

    def impression_part(
        self, user: dict[str, Tensor], *args: Any, num_impressions: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What `request_part` returned, impression inputs and their counts -> scores of all impressions.

        Without `num_impressions` all impressions belong to one request.
        """
        program = self._whole_program()
        atoms = self._inputs.flatten_side(args, kwargs, Provenance.IMPRESSION)
        rows = next((int(t.shape[0]) for a, t in zip(self._side(Provenance.IMPRESSION), atoms) if a.kind == "dense"), 0)
        counts = torch.tensor([rows]) if num_impressions is None else num_impressions
        if program.emitted is None or program.captured is None:
            stocks = {Provenance.REQUEST: iter(user.values()), Provenance.IMPRESSION: iter(atoms)}
            whole = [next(stocks[a.provenance]) for a in self._inputs.atoms]
            return self._broadcast_first(whole, self._example[1], counts)
        if atoms:
            check_counts(counts, len(counts), rows)
        outputs = program.emitted.impression(self, *(user[n] for n in program.emitted.residuals), *atoms, counts)
        return unflatten_output(program.captured, outputs)

    def _side(self, side: Provenance) -> list[Any]:
        return [a for a in self._inputs.atoms if a.provenance is side]

    def _whole_program(self) -> Program:
        return self._current[self.training]

    def _broadcast_first(self, atoms: Sequence[Tensor], statics: Sequence[Any], counts: Tensor) -> Any:
        """F(E(U), x): the original on broadcast inputs. Correct for every model, and saves nothing."""
        self._original._modules.update({n: m for n, m in self._modules.items() if n != "_roo"})
        rows = request_of(counts.to(torch.long), int(counts.sum()))
        expanded = self._inputs.select(atoms, rows, (Provenance.REQUEST,))
        args, kwargs = self._inputs.unflatten(expanded, Provenance.IMPRESSION, statics)
        return self._original(*args, **kwargs)

    # -- programs

    def _program(self, atoms: Sequence[Tensor], statics: Sequence[Any]) -> Program:
        """The program for this mode and these kinds of input, built on demand."""
        modes = tuple(m.training for m in self._members)
        key = (self.training, modes, _dtype(self), tuple(_kind(t) for t in atoms), _hashable(statics))
        found = self._programs.get(key)
        if found is None:
            found = self._new_program(atoms, statics)
            self._programs[key] = found
        self._current[self.training] = found
        return found

    def _new_program(self, atoms: Sequence[Tensor], statics: Sequence[Any]) -> Program:
        if len(self._programs) >= _MAX_PROGRAMS:
            return Program(None, None, notes=(f"more than {_MAX_PROGRAMS} kinds of input; the original runs",))
        example, _ = self._example
        fits = [_kind(a) == _kind(b) for a, b in zip(example, atoms)]
        if not all(fits):
            example = [_like(e, a) for e, a in zip(example, atoms)]
        name = f"p{len(self._programs)}"
        return self._build(self, example, statics, name)

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

    def forward(self: RequestModel, *args: Any, num_impressions: Tensor, **kwargs: Any) -> Any:
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


def check_batch(inputs: Inputs, atoms: Sequence[Tensor], counts: Tensor) -> int:
    """I, the number of impressions. Raises InputError where rows and counts disagree."""
    requests = inputs.rows(atoms, Provenance.REQUEST)
    impressions = inputs.rows(atoms, Provenance.IMPRESSION)
    return check_counts(counts, requests, impressions)


def check_counts(counts: Tensor, requests: int | None, impressions: int | None) -> int:
    """I. `counts` must be an integer vector `[R]`, not negative, and sum to I."""
    if not isinstance(counts, Tensor) or counts.dtype not in (torch.int64, torch.int32) or counts.ndim != 1:
        what = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
        raise InputError(f"num_impressions must be an int64 tensor [requests], got {what}")
    if requests is not None and counts.shape[0] != requests:
        raise InputError(
            f"num_impressions has {counts.shape[0]} entries, the request inputs have {requests} rows; "
            "give one count a request (request inputs come with R rows, not I)"
        )
    if counts.numel() and int(counts.min()) < 0:
        raise InputError(f"num_impressions has a negative count at request {int(counts.argmin())}")
    total = int(counts.sum())
    if impressions is not None and total != impressions:
        raise InputError(f"num_impressions sums to {total}, the impression inputs have {impressions} rows")
    return total


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.device, tuple(tensor.shape[1:]))


def _like(example: Tensor, given: Tensor) -> Tensor:
    """The example in the dtype, device and sizes of what is given: cut, or repeated from its start."""
    made = example
    for dim in range(1, min(example.ndim, given.ndim)):
        made = made.index_select(dim, torch.arange(given.shape[dim], device=made.device) % max(made.shape[dim], 1))
    return made.to(dtype=given.dtype, device=given.device)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _hashable(statics: Sequence[Any]) -> Any:
    try:
        hash(tuple(statics))
        return tuple(statics)
    except TypeError:
        return repr(statics)
