"""Exceptions that a model catches itself: a trace must not take another way than a run does.

    try:
        many = bool((x > 3).any())      traced: "cannot tell", which the model catches
    except Exception:
        many = False                    and so the trace holds one way for the only one

Watching costs time, so a trace is watched only where the code that a plain run goes through catches anything.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mpmath
import sympy
import torch

from roo_rewrite.errors import CaptureError

Raised = tuple[str, int, str]
# What computes sizes in a trace is torch's own too.
_OWN = tuple(str(Path(of).parent) + os.sep for of in (torch.__file__, sympy.__file__, mpmath.__file__, __file__))
# Sizes that are symbols have no hash: what these compute then is what they would have kept. (module, function)
_PAST_A_CACHE = frozenset({("einops.einops", "_apply_recipe")})
_STDLIB = sysconfig.get_path("stdlib") + os.sep


@functools.lru_cache(4096)
def foreign(file: str) -> bool:
    """Whether a file is torch's, Python's or ours, so not the model's."""
    installed = "site-packages" in file or "dist-packages" in file
    return file.startswith((*_OWN, "<frozen")) or (file.startswith(_STDLIB) and not installed)


def asking() -> tuple[str, int]:
    """The line of the model's code that called what is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@dataclass
class Watched:
    """catches: whether the model's code has a handler. raised: file, line and type of what went through it.

    codes: that code; with `among`, the only one that is followed.
    """

    among: set[CodeType] | None = None
    catches: bool = False
    codes: set[CodeType] = field(default_factory=set)
    raised: set[Raised] = field(default_factory=set)

    def calls(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Of every new frame; follows those of the model's own code."""
        code = frame.f_code
        if foreign(code.co_filename):
            self.catches |= code.co_qualname == "suppress.__exit__"
            return None
        if self.among is not None and code not in self.among:
            return None
        self.codes.add(code)
        self.catches |= _catches(code)
        frame.f_trace_lines = False
        return self._within

    def _within(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and not _harmless(frame, arg[0]):
            self.raised.add((frame.f_code.co_filename, frame.f_lineno, arg[0].__name__))
        return self._within


def _harmless(frame: FrameType, kind: type[BaseException]) -> bool:
    """Whether the exception leaves the way as it is: a generator left early, as by any(), or a cache gone past."""
    where = (frame.f_globals.get("__name__"), frame.f_code.co_name)
    return kind is GeneratorExit or (where in _PAST_A_CACHE and issubclass(kind, TypeError))


@functools.lru_cache(4096)
def _catches(code: CodeType) -> bool:
    """Whether the code has an `except` or `finally`, or is the end of a `with`. Each `with` itself leaves by two."""
    names = [i.opname for i in dis.get_instructions(code)]
    return code.co_name == "__exit__" or names.count("POP_EXCEPT") > 2 * names.count("WITH_EXCEPT_START")


@contextlib.contextmanager
def watched(run: Watched | None = None) -> Iterator[Watched]:
    """Notes the exceptions that go through the model's own code, that is neither torch's nor Python's.

    run: what a plain run showed. Then only its code is followed, and only if that catches anything.
    """
    seen = Watched(among=run.codes if run is not None else None)
    if run is not None and not run.catches:
        yield seen
        return
    before = sys.gettrace()
    sys.settrace(seen.calls)
    try:
        yield seen
    finally:
        sys.settrace(before)


def same_way(run: Watched, trace: Watched) -> None:
    """Raises CaptureError where the model caught something in the trace that it does not meet in a run."""
    other = sorted(trace.raised - run.raised)
    if other:
        file, line, kind = other[0]
        raise CaptureError(
            f"the model catches a {kind} at {Path(file).name}:{line} that only tracing it raises, so the trace "
            "goes another way; decide by shapes or settings there, or compute both ways and use torch.where"
        )
