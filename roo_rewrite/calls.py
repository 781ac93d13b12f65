"""What a call of a RequestModel must look like: its counts, the kinds of its tensors; and what it is made under."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from roo_rewrite.errors import InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs

_DEPTH = 5
Setting = tuple[str, str]
Watched = tuple[nn.Module, tuple[str, ...], Callable[[dict[str, Any]], Any]]


def check_batch(inputs: Inputs, atoms: Sequence[Tensor], counts: Any) -> tuple[int, int]:
    """I, the number of impressions, and the least of a request. Raises InputError where rows and counts disagree."""
    requests = inputs.rows(atoms, Provenance.REQUEST)
    impressions = inputs.rows(atoms, Provenance.IMPRESSION)
    if isinstance(counts, Tensor) and atoms and counts.device != atoms[0].device:
        raise InputError(f"num_impressions lies on {counts.device}, the inputs on {atoms[0].device}; move it there")
    return check_counts(counts, requests, impressions)


def check_counts(counts: Any, requests: int | None, impressions: int | None) -> tuple[int, int]:
    """I, and the least count (0 of none). `counts` must be an integer vector `[R]`, not negative, and sum to I."""
    if counts is None:
        raise InputError("num_impressions is missing: pass an int64 tensor [requests], the impressions of each request")
    if not isinstance(counts, Tensor) or counts.dtype not in (torch.int64, torch.int32) or counts.ndim != 1:
        what = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
        raise InputError(f"num_impressions must be an int64 tensor [requests], got {what}")
    if requests is not None and counts.shape[0] != requests:
        raise InputError(
            f"num_impressions has {counts.shape[0]} entries, the request inputs have {requests} rows; "
            "give one count a request (request inputs come with R rows, not I)"
        )
    least, most = (int(n) for n in counts.aminmax()) if counts.shape[0] else (0, 0)
    if least < 0:
        raise InputError(f"num_impressions has a negative count at request {int(counts.argmin())}")
    total = int(counts.sum())
    if impressions is not None and (total != impressions or most > impressions):  # a sum of such counts may wrap
        raise InputError(
            f"num_impressions sums to {sum(counts.tolist())}, the impression inputs have {impressions} rows"
        )
    return total, least


def without_empty(inputs: Inputs, atoms: Sequence[Tensor], counts: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """The batch without its requests that have no impression.

    The original never sees those: a NaN or an id out of range in one must not reach a gradient or a statistic.
    """
    if not counts.numel() or int(counts.min()) > 0:
        return atoms, counts
    kept = counts.nonzero().squeeze(1)
    return inputs.select(atoms, kept, (Provenance.REQUEST,)), counts.index_select(0, kept)


def check_dims(inputs: Inputs, example: Sequence[Tensor], atoms: Sequence[Tensor]) -> None:
    """Raises InputError where a tensor has more or fewer dims than in the example."""
    for atom, known, given in zip(inputs.atoms, example, atoms):
        if known.ndim != given.ndim:
            raise InputError(
                f"input {atom.name!r} has {given.ndim} dims {list(given.shape)}, in the example it has {known.ndim}"
            )


def unlike(inputs: Inputs, example: Sequence[Tensor], atoms: Sequence[Tensor]) -> str:
    """How the tensors of a call differ from the example's in more than their rows, in words."""
    return "; ".join(
        f"input {atom.name!r} is {given.dtype} {['rows', *given.shape[1:]]} on {given.device}, "
        f"in the example {known.dtype} {['rows', *known.shape[1:]]} on {known.device}"
        for atom, known, given in zip(inputs.atoms, example, atoms)
        if kind(known) != kind(given)
    )


def kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a program is specialised to."""
    return (tensor.dtype, tensor.device, *tensor.shape[1:])


def like(example: Tensor, given: Tensor) -> Tensor:
    """The example in the dtype, device and sizes of what is given: cut, or repeated from its start."""
    made = example
    for dim in range(1, min(example.ndim, given.ndim)):
        made = made.index_select(dim, torch.arange(given.shape[dim], device=made.device) % max(made.shape[dim], 1))
    return made.to(dtype=given.dtype, device=given.device)


def expanded_example(inputs: Inputs, atoms: Sequence[Tensor], counts: Tensor, rows: int) -> list[Tensor] | None:
    """The first `rows` impressions of a request-level batch, at impression level; None where there are none."""
    requests = torch.repeat_interleave(counts)[:rows]
    if not requests.numel():
        return None
    detached = [t.detach() for t in atoms]
    cut = inputs.select(detached, torch.arange(len(requests), device=requests.device), (Provenance.IMPRESSION,))
    return inputs.select(cut, requests, (Provenance.REQUEST,))


def ambient() -> tuple[Any, ...]:
    """What of the surroundings a trace depends on: autocast."""
    return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda"))


def watched(model: nn.Module, settings: Sequence[Setting]) -> list[Watched]:
    """Every module with those of its attributes that a program depends on: its mode and its settings, by path."""
    keys = {path: ["training"] for path, _ in model.named_modules()}
    for path, key in settings:
        keys[path].append(key)
    return [(model.get_submodule(path), tuple(found), itemgetter(*found)) for path, found in keys.items()]


def state(modules: Sequence[Watched]) -> tuple[Any, ...]:
    """The watched attributes as they are now, and the precision of the model."""
    floating = (p for m, _, _ in modules for p in m._parameters.values() if p is not None and p.is_floating_point())
    dtype = next((p.dtype for p in floating), None)
    try:
        return dtype, tuple([read(m.__dict__) for m, _, read in modules])
    except KeyError:  # one was deleted since
        return dtype, tuple([m.__dict__.get(k) for m, keys, _ in modules for k in keys])


def hashable(statics: Sequence[Any]) -> Any:
    """The values that are not tensors, as part of a key: equal where a trace cannot tell them apart."""
    return tuple(_key(v, _DEPTH) for v in statics)


def _key(value: Any, depth: int) -> Any:
    """What is in a value, in its order: what its class calls equal, or prints alike, may differ (2 and 2.0, 0.0 and
    -0.0, fields left out)."""
    kind = type(value)
    if kind in (float, complex):
        return (kind, repr(value))
    if isinstance(value, dict) and depth:
        return (kind, tuple((_key(k, depth - 1), _key(v, depth - 1)) for k, v in value.items()))
    if isinstance(value, (list, tuple, set, frozenset)) and depth:
        inner = (_key(v, depth - 1) for v in value)
        return (kind, frozenset(inner) if isinstance(value, (set, frozenset)) else tuple(inner))
    if isinstance(value, (int, str, bytes, type, enum.Enum)) or (not hasattr(value, "__dict__") and _hashes(value)):
        return (kind, value)
    if isinstance(value, (FunctionType, nn.Module, Tensor)) or not hasattr(value, "__dict__") or not depth:
        return _Same(value)
    return (kind, _key(vars(value), depth - 1))


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class _Same:
    """Equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value  # kept, so that no other takes its place in memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
