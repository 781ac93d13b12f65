"""Jagged pairs that a spec declares: values, and the lengths or offsets that say which row each value is of."""

from __future__ import annotations

from torch import Tensor

from roo_rewrite.atoms import Kind
from roo_rewrite.errors import SpecError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec, matches


def jagged_pairs(
    spec: FeatureSpec, features: list[str], tensors: dict[str, Tensor], sides: dict[str, Provenance]
) -> dict[str, tuple[Kind, str]]:
    """name -> (its kind, the name of its lengths or offsets), for both halves of every declared pair."""
    rows = {t.shape[0] for n, t in tensors.items() if n not in _partners(spec, features) and t.ndim}
    pairs: dict[str, tuple[Kind, str]] = {}
    for values_key, rows_key in spec.jagged.items():
        values, keeper = matches(values_key, features)[0], matches(rows_key, features)[0]
        if values == keeper:
            raise SpecError(
                f"FeatureSpec.jagged[{values!r}] names the values themselves; name their lengths or offsets"
            )
        if sides[values] is not sides[keeper]:
            raise SpecError(f"jagged pair {values!r} and {keeper!r} must lie on the same side")
        if values not in tensors and keeper not in tensors:  # of a JaggedTensor, which says so itself
            continue
        pairs[values] = ("values", keeper)
        pairs[keeper] = (_rows_kind(keeper, tensors[keeper], tensors[values], rows), keeper)
    return pairs


def _partners(spec: FeatureSpec, features: list[str]) -> set[str]:
    return {n for pair in spec.jagged.items() for key in pair for n in matches(key, features)}


def _rows_kind(name: str, keeper: Tensor, values: Tensor, rows: set[int]) -> Kind:
    """Lengths, or offsets with or without the final total; told apart by what adds up."""
    flat = keeper.tolist()
    total = values.shape[0]
    ascending = bool(flat) and flat[0] == 0 and all(a <= b for a, b in zip(flat, flat[1:]))
    if len(rows) == 1 and ascending and flat[-1] == total and len(flat) == next(iter(rows)) + 1:
        return "offsets_total"
    if sum(flat) == total and not (ascending and "offset" in name):
        return "lengths"
    if ascending and flat[-1] <= total:
        return "offsets_total" if not rows and flat[-1] == total else "offsets"
    raise SpecError(
        f"jagged {name!r} is neither lengths (they sum to {sum(flat)}) nor offsets of {total} values; check the example"
    )
