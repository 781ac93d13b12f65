"""Where in the user's source a node comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@dataclass(frozen=True)
class Place:
    """A line of source. `module` is the path of the submodule whose forward was running, "" for the model itself."""

    module: str
    file: str = ""
    line: int = 0
    code: str = ""

    def __str__(self) -> str:
        where = f"{Path(self.file).name}:{self.line}" if self.file else ""
        return where or self.module


def place_of(node: Node) -> Place:
    """The innermost line of `node`'s stack that belongs neither to torch nor to this library."""
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "") if _is_users(m["file"])]
    module = _module(node)
    if not frames:
        return Place(module)
    last = frames[-1]
    return Place(module, last["file"], int(last["line"]), last["code"].strip())


def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_THE_USERS)


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("model").removeprefix(".")
