"""What can go wrong, and whose turn it is then.

RooError
├── SpecError          the FeatureSpec does not fit the model's inputs
├── InputError         a call's arguments cannot be a batch: wrong rows, wrong num_impressions
├── CaptureError       the model cannot be run or traced with the example given
├── EquivalenceError   the rewritten model differs from the original (a finding of `verify`)
├── EmitError          the rewritten model cannot be written in the form asked for
└── DataError          a data set cannot be read, grouped or written

NotRowWise is not an error of the user's: it is how a rule declines, and it never leaves the compiler.
"""

from __future__ import annotations


class RooError(Exception):
    """Base of every error this library raises on purpose. Says what, where, and what to do next."""


class SpecError(RooError):
    """The feature specification does not fit the model's inputs."""


class InputError(RooError):
    """The arguments of a call do not form a batch."""


class CaptureError(RooError):
    """The model cannot be run or traced with the example given."""


class EmitError(RooError):
    """The rewritten model cannot be written in the form asked for."""


class DataError(RooError):
    """A data set cannot be read, grouped or written."""


class EquivalenceError(RooError):
    """The rewritten model and the original differ.

    Attributes: `num_impressions`, the counts of the smallest failing batch; `where`, the output or
    gradient that differs; `seed`, what to pass to `verify` to see it again.
    """

    def __init__(self, message: str, *, num_impressions: list[int] | None = None, where: str = "", seed: int = 0):
        super().__init__(message)
        self.num_impressions = num_impressions
        self.where = where
        self.seed = seed


class NotRowWise(Exception):  # noqa: N818 - a verdict, not an error
    """A rule's verdict: this op is not row-wise in the batch here, for the reason given."""
