"""FeatureSpec: which inputs, columns and keys are request-level."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roo_rewrite.errors import SpecError
from roo_rewrite.facts import Provenance

Range = tuple[int, int]
_FIELDS = ("request", "impression", "columns", "jagged")


@dataclass(frozen=True)
class FeatureSpec:
    """Which inputs are request-level (user) and which impression-level (item).

    request, impression: `fnmatch` patterns over input names. A name is the pytree path of a tensor in
    `(args, kwargs)` joined with dots (`features.user_id`); the last part alone will do where unique.
    columns: for a packed `[B, F]` tensor, the request-level column ranges, half-open; the rest is
    impression-level: `{"x": {"request": [(0, 2), (5, 18)]}}`.
    jagged: name of a values tensor -> name of its lengths or offsets.

    Source: the split into RO and NRO features of Request-Only Optimization, arXiv 2508.05640.
    """

    request: Sequence[str] = ()
    impression: Sequence[str] = ()
    columns: Mapping[str, Mapping[str, Sequence[Range]]] = field(default_factory=dict)
    jagged: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in ("request", "impression"):
            patterns = getattr(self, side)
            listed = isinstance(patterns, Iterable) and not isinstance(patterns, str)
            if not listed or not all(isinstance(p, str) for p in patterns):
                raise SpecError(f"FeatureSpec.{side} must be a list of name patterns, got {patterns!r}")
            object.__setattr__(self, side, tuple(patterns))
        for part in ("columns", "jagged"):
            if not isinstance(getattr(self, part), Mapping):
                raise SpecError(f"FeatureSpec.{part} must be a dict by input name, got {getattr(self, part)!r}")
        for name, sides in self.columns.items():
            if not isinstance(sides, Mapping) or not set(sides) <= {"request", "impression"} or not sides:
                raise SpecError(
                    f"FeatureSpec.columns[{name!r}] must be {{'request': [(start, end), ...]}}, got {sides!r}"
                )
            for ranges in sides.values():
                _check_ranges(name, ranges)
        for values, lengths in self.jagged.items():
            if not isinstance(lengths, str):
                raise SpecError(f"FeatureSpec.jagged[{values!r}] must name its lengths or offsets, got {lengths!r}")

    def request_columns(self, name: str, width: int) -> tuple[Range, ...]:
        """The request-level ranges of packed input `name` of `width` columns, sorted and disjoint."""
        sides = self.columns[name]
        given = {side: _merge(name, ranges, width) for side, ranges in sides.items()}
        request = given.get("request")
        if request is None:
            return _complement(given["impression"], width)
        if "impression" in given and given["impression"] != _complement(request, width):
            raise SpecError(
                f"columns of {name!r}: request {list(request)} and impression {list(given['impression'])} must "
                f"cover the {width} columns once each; leave one side out to have it filled in"
            )
        return request

    def assign(self, names: Iterable[str]) -> dict[str, Provenance]:
        """The side of each input. Raises one SpecError that lists every name unknown, unassigned or doubly assigned."""
        every = list(names)
        names = [n for n in every if self.column_key(n, every) is None]
        sides: dict[str, set[Provenance]] = {n: set() for n in names}
        problems: list[str] = []
        for side, patterns in ((Provenance.REQUEST, self.request), (Provenance.IMPRESSION, self.impression)):
            for pattern in patterns:
                hits = matches(pattern, names)
                if not hits:
                    problems.append(f"{side.name.lower()} pattern {pattern!r} names no input")
                for hit in hits:
                    sides[hit].add(side)
        problems += [f"{n!r} is not assigned to a side" for n in names if not sides[n]]
        problems += [f"{n!r} is assigned to both sides" for n in names if len(sides[n]) > 1]
        if problems:
            listing = "\n  ".join(problems)
            raise SpecError(
                f"the feature spec does not fit the model's inputs:\n  {listing}\n"
                f"The inputs are: {', '.join(map(repr, names)) or 'none'}. Give each a pattern in "
                f"FeatureSpec.request or FeatureSpec.impression, and only one."
            )
        return {n: next(iter(s)) for n, s in sides.items()}

    def column_key(self, name: str, names: Sequence[str]) -> str | None:
        """The key of `columns` that means input `name`, if any."""
        return next((key for key in self.columns if name in matches(key, names)), None)

    @classmethod
    def from_toml(cls, path: str | Path) -> FeatureSpec:
        """Reads a spec file. Raises SpecError with the file and the key at fault."""
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise SpecError(f"cannot read spec file {path}: {e.strerror or e}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise SpecError(f"spec file {path} is not TOML: {e}") from e
        unknown = sorted(set(table) - set(_FIELDS))
        if unknown:
            raise SpecError(f"spec file {path}: unknown key {', '.join(map(repr, unknown))}; known are {list(_FIELDS)}")
        try:
            return cls(**table)
        except (SpecError, TypeError, ValueError, AttributeError) as e:
            raise SpecError(f"spec file {path}: {e}") from e

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, as a TOML file holds them."""
        out: dict[str, Any] = {"request": list(self.request), "impression": list(self.impression)}
        if self.columns:
            out["columns"] = {
                n: {side: [list(r) for r in ranges] for side, ranges in sides.items()}
                for n, sides in self.columns.items()
            }
        if self.jagged:
            out["jagged"] = dict(self.jagged)
        return out


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that `pattern` means: the whole name, or the last part of it where that part is unique."""
    names = list(names)
    hits = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    lasts = [n.rsplit(".", 1)[-1] for n in names]
    for name, last in zip(names, lasts):
        if name not in hits and lasts.count(last) == 1 and fnmatch.fnmatchcase(last, pattern):
            hits.append(name)
    return hits


def _check_ranges(name: str, ranges: Sequence[Range]) -> None:
    for r in ranges:
        pair = isinstance(r, Sequence) and not isinstance(r, str) and len(r) == 2
        if not pair or not all(isinstance(v, int) for v in r) or not 0 <= r[0] < r[1]:
            raise SpecError(f"columns of {name!r}: {r!r} is no half-open range (start, end) with 0 <= start < end")


def _merge(name: str, ranges: Sequence[Range], width: int) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, end in sorted((r[0], r[1]) for r in ranges):
        if end > width:
            raise SpecError(f"columns of {name!r}: range ({start}, {end}) ends past its {width} columns")
        if merged and start < merged[-1][1]:
            raise SpecError(f"columns of {name!r}: range ({start}, {end}) overlaps {merged[-1]}")
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def _complement(ranges: Sequence[Range], width: int) -> tuple[Range, ...]:
    edges = [0, *(edge for r in ranges for edge in r), width]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b)
