"""The two halves of a call: the request part once, the impression part as often as there are impressions to score.

What crosses belongs to one program: that of a mode, of the shapes and of the plain arguments it was built for. The
impression part runs in the same one, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roo_rewrite.atoms import has_rows
from roo_rewrite.calls import check_counts, kind
from roo_rewrite.errors import InputError
from roo_rewrite.facts import COUNTS, Provenance
from roo_rewrite.ops.extreme import rows_seen
from roo_rewrite.program import Program

if TYPE_CHECKING:
    from roo_rewrite.module import RequestModel

aten = torch.ops.aten


class Residuals(dict[str, Tensor]):
    """What crosses, by name, and the program it was computed by. Pickled, it is a plain dict.

    Where the counts went into these values they cross with them.
    """

    program: Program

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _given(
    model: RequestModel, args: Sequence[Any], kwargs: Mapping[str, Any], side: Provenance
) -> tuple[list[Tensor], list[Any], bool]:
    """All atoms, the plain values, and whether the call gave them all; else the example's on the other side."""
    inputs, (example, statics) = model._inputs, model._example
    try:
        return *inputs.flatten(args, kwargs, Provenance.REQUEST), True
    except InputError:
        mine = inputs.flatten_side(args, kwargs, side)
        taken, moved = iter(mine), _moved(example, _of(model, example, side), mine)
        return [next(taken) if a.provenance is side else t for a, t in zip(inputs.atoms, moved)], statics, False


def _moved(example: Sequence[Tensor], known: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The example on the device and in the float dtypes the model has moved to since, as the given side tells."""
    dtypes = {k.dtype: g.dtype for k, g in zip(known, given) if k.is_floating_point()}
    device = given[0].device if given else None
    return [t.to(device, dtypes.get(t.dtype, t.dtype)) for t in example]


def _of(model: RequestModel, atoms: Sequence[Any], side: Provenance) -> list[Any]:
    return [t for a, t in zip(model._inputs.atoms, atoms) if a.provenance is side]


def _rows(model: RequestModel, atoms: Sequence[Tensor], side: Provenance) -> int | None:
    """The rows of one side. Raises InputError where its tensors disagree."""
    return model._inputs.rows(atoms, side)


def request_part(
    model: RequestModel, counts: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """See `RequestModel.request_part`."""
    atoms, statics, _ = _given(model, args, kwargs, Provenance.REQUEST)
    rows = _rows(model, atoms, Provenance.REQUEST)
    program = model._program(atoms, statics)
    mine = _of(model, atoms, Provenance.REQUEST)
    if counts is not None:
        check_counts(counts, rows, None)
    if program.emitted is None:
        found = Residuals((a.name, t) for a, t in zip(_of(model, model._inputs.atoms, Provenance.REQUEST), mine))
    else:
        readers = _counts_read_by(program)
        if counts is None and readers:
            raise InputError(
                "the request part knows the whole batch (batch norm in training, the longest history of a batch), "
                "to which a request without impressions does not belong: pass num_impressions"
            )
        found = Residuals(zip(program.emitted.residuals, program.emitted.request(model, *mine, counts)))
        if counts is not None and readers:
            found[COUNTS] = counts.clone()
    found.program = program
    return found


def _counts_read_by(program: Program) -> set[Any]:
    """The functions of the request part that read the counts."""
    if program.emitted is None:
        return set()
    graph = program.emitted.parts[0]
    return {user.target for n in graph.nodes if n.op == "placeholder" and n.name == COUNTS for user in n.users}


def _check_counts_kept(program: Program, user: Mapping[str, Tensor], counts: Tensor) -> None:
    """The counts of the impressions must be those that went into the request part, as far as it read them."""
    if COUNTS not in user:
        return
    kept = user[COUNTS].to(counts)
    if _counts_read_by(program) <= {rows_seen, aten.sym_size.int}:  # which requests are there, not how often
        same = torch.equal(kept > 0, counts > 0)
    else:
        same = torch.equal(kept, counts)
    if not same:
        raise InputError(
            f"the request part was run with num_impressions={kept.tolist()}, and its values depend on them (batch norm "
            f"in training, the longest history of the batch); got {counts.tolist()}; run request_part with these counts"
        )


def impression_part(
    model: RequestModel, user: Any, counts: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """See `RequestModel.impression_part`."""
    if not isinstance(user, Mapping):
        raise InputError(f"the first argument must be what request_part returned, got {type(user).__name__}")
    if others := [n for n, t in user.items() if not isinstance(t, Tensor)]:
        raise InputError(f"the first argument must hold tensors as request_part returned them; {others} are none")
    atoms, statics, full = _given(model, args, kwargs, Provenance.IMPRESSION)
    given = any(has_rows(a) for a in _of(model, model._inputs.atoms, Provenance.IMPRESSION))
    rows = _rows(model, atoms, Provenance.IMPRESSION) if given else None
    if counts is None:
        if rows is None:
            raise InputError("num_impressions is missing: no impression input tells how many impressions there are")
        counts = torch.tensor([rows])
    program = _found(model, user, atoms, statics if full else None)
    requests = {t.shape[0] for n, t in user.items() if n in _rowed(model, program) and t.ndim}
    if len(requests) > 1:
        raise InputError(f"the values of the request part differ in their rows: {sorted(requests)}")
    total, _ = check_counts(counts, next(iter(requests), None), rows)
    counts = counts.to(torch.long)
    _check_counts_kept(program, user, counts)
    if program.emitted is None or program.captured is None:
        return _broadcast_first(model, program, user, atoms, counts)
    if not program.serves(total):
        raise InputError(
            f"the model does something else on {total} impressions than the parts were built for; "
            "call the model itself, with both sides"
        )
    mine = _of(model, atoms, Provenance.IMPRESSION)
    values = (user[n] for n in program.emitted.residuals)
    return program.captured.returned(program.emitted.impression(model, *values, *mine, counts))


def _broadcast_first(
    model: RequestModel, program: Program, user: Mapping[str, Tensor], atoms: Sequence[Tensor], counts: Tensor
) -> Any:
    named = {a.name: user.get(a.name, t) for a, t in zip(model._inputs.atoms, atoms)}
    return model._broadcast_first(list(named.values()), program.statics, counts)


def _rowed(model: RequestModel, program: Program) -> set[str]:
    """The names of those crossing values whose first dim is the requests."""
    if program.emitted is None:
        return {a.name for a in model._inputs.atoms if a.provenance is Provenance.REQUEST and has_rows(a)}
    return {n for n, (shape, _) in program.crossing.items() if shape and shape[0] is None}


def _found(model: RequestModel, user: Mapping[str, Tensor], atoms: Sequence[Tensor], statics: Any) -> Program:
    """The program `user` was computed by. Raises InputError where the model or the arguments are no longer its own."""
    known = user.program if isinstance(user, Residuals) else None
    if model._outlook.changed():
        model._renew()
    candidates = [p for p in model._programs.values() if known is None or p is known]
    kinds = [kind(t) for t in _of(model, atoms, Provenance.IMPRESSION)]
    fitting = [
        p
        for p in candidates
        if {*p.names(model._inputs), *((COUNTS,) if _counts_read_by(p) else ())} == set(user)
        and p.mode == model._mode()
        and p.holds(model)
        and _of(model, p.kinds, Provenance.IMPRESSION) == kinds
        and (statics is None or list(p.statics) == list(statics))
        and p.alike(user)
    ]
    if not fitting:
        raise InputError(
            "this does not belong to what request_part returned: values it did not return are there or missing "
            f"(given: {sorted(user)}), their shapes or dtypes are others, or the model, its mode, the impression "
            "inputs' shapes and dtypes or the plain arguments are not those it was run for; run request_part again, "
            "with the full arguments of the call"
        )
    if len({p.kinds for p in fitting}) > 1 or len({repr(p.statics) for p in fitting}) > 1:
        raise InputError("the values fit several request shapes; pass the very dict that request_part returned")
    return fitting[0]
