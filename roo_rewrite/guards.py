"""What a trace took for granted of the batch size: a batch outside of it is run by the original."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

BATCH = sympy.Symbol("B", integer=True, positive=True)
_SIZE = r"L\['(?:atoms|flat_args)'\]\[\d+\]\.size\(\)\[0\]"
_EQUAL = re.compile(f"{_SIZE} == {_SIZE}")
_MOST = 4096


@dataclass(frozen=True)
class Guards:
    """The ranges and guards that export wrote down. ranges: a size in terms of BATCH, its least and largest value.

    always: they hold for every number of rows from two on: nothing but that the inputs have the same number.
    """

    ranges: tuple[tuple[sympy.Expr, Any, Any], ...]
    codes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    batch: int
    always: bool
    _judged: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        program: torch.export.ExportedProgram,
        symbols: dict[sympy.Symbol, sympy.Expr],
        example: Sequence[Tensor],
        batch: int,
    ) -> Guards:
        """The guards of a traced program whose size symbols are `symbols`, traced on `example` of `batch` rows."""
        ranges = [(symbols[s], r.lower, r.upper) for s, r in program.range_constraints.items() if s in symbols]
        # An interpreted trace calls its inputs flat_args.
        codes = [c.replace("L['flat_args']", "L['atoms']") for c in getattr(program, "_guards_code", [])]
        free = all(lower <= 2 and upper >= torch.iinfo(torch.int64).max for _, lower, upper in ranges)
        always = free and all(_EQUAL.fullmatch(code) for code in codes)
        return cls(tuple(ranges), tuple(codes), tuple(tuple(t.shape) for t in example), batch, always)

    def __call__(self, rows: int) -> bool:
        """Whether the trace holds for a batch of this many rows; one of 0 or 1 is judged by running both."""
        if self.always and rows > 1:
            return True
        if rows not in self._judged:  # taking sizes through their formulas costs a millisecond
            if len(self._judged) >= _MOST:
                self._judged.clear()
            self._judged[rows] = self._holds(rows)
        return self._judged[rows]

    def _holds(self, rows: int) -> bool:
        for expr, lower, upper in self.ranges:
            size = int(expr.subs(BATCH, rows)) if not expr.is_Integer else int(expr)
            if (lower > 2 and size < lower) or size > upper:
                return False
        shapes = [(rows if s and s[0] == self.batch else s[0] if s else 0, *s[1:]) for s in self.shapes]
        stand_ins = [types.SimpleNamespace(size=lambda s=s: s) for s in shapes]
        inputs = {"atoms": stand_ins, "flat_args": stand_ins}  # what a trace by bytecode calls them
        try:
            return all(eval(code, {"L": inputs, "torch": torch}) for code in self.codes)
        except (AttributeError, NameError, TypeError):  # a guard on more than sizes
            return False
