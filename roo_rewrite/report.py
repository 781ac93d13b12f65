"""What moved, what did not and why, what it saves."""

from __future__ import annotations

from dataclasses import dataclass

from roo_rewrite.inputs import Inputs
from roo_rewrite.program import Program


@dataclass(frozen=True)
class Report:
    """The report of one program."""

    text: str

    @classmethod
    def of(cls, program: Program, inputs: Inputs) -> Report:
        """The report of `program`."""
        lines = [
            *program.notes,
            str(program.plan) if program.plan is not None else "the original runs on broadcast inputs",
        ]
        if program.plan is not None:
            lines += [f"{n.name}: {r}" for n, r in program.plan.reasons.items()]
        return cls("\n".join(lines))

    def __str__(self) -> str:
        return self.text
