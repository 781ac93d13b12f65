"""An einsum of more than two operands, two at a time.

einsum("bfd,bgd,fg->b", T, T, w)  =  einsum("bfg,fg->b", einsum("bfd,bgd->bfg", T, T), w)
einsum("bfd,ofo->bd", T, w)       =  einsum("bfd,fo->bd", T, diagonal(w))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.forms import Blocks, Expanded, Form, Sum, Whole, provenance, same_size
from passes.split import Application, Splitter, handles
from passes.splits.products import bilinear, moves
from roo_rewrite.facts import Provenance
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten


@handles("aten.einsum.default")
def einsum(s: Splitter, app: Application) -> Form | None:
    """Two operands are a product of forms; more are products of products."""
    app = _without_diagonals(s, app)
    tensors = app["tensors"]
    if len(tensors) == 2:
        return bilinear(s, app, *tensors)
    if len(tensors) < 3 or app["path"] is not None or all(isinstance(f, Whole) for f in tensors):
        return None
    left, out = spelled_out(app["equation"], [f.ndim for f in tensors]).split("->")
    names = left.split(",")
    if not _plain(tensors, names):
        return None
    made, letters = tensors[0], names[0]
    for i in range(1, len(tensors)):
        needed = set(out).union(*names[i + 1 :])
        both = list(dict.fromkeys(letters + names[i]))
        kept = out if i == len(tensors) - 1 else "".join(c for c in both if c in needed)
        made = s.op(aten.einsum.default, f"{letters},{names[i]}->{kept}", [made, tensors[i]])
        letters = kept
    return made if isinstance(made, (Blocks, Sum, Expanded)) and moves(made) else None


def _without_diagonals(s: Splitter, app: Application) -> Application:
    """The einsum with the diagonals of its constants taken first."""
    tensors = list(app["tensors"])
    if all(isinstance(f, Whole) for f in tensors):
        return app
    left, out = spelled_out(app["equation"], [f.ndim for f in tensors]).split("->")
    names = left.split(",")
    for i, form in enumerate(tensors):
        for c in names[i]:
            if names[i].count(c) == 2 and provenance(form) is Provenance.CONSTANT:
                first, second = names[i].index(c), names[i].rindex(c)
                form = tensors[i] = s.op(aten.diagonal.default, form, 0, first, second)
                names[i] = names[i].replace(c, "") + c
    return app.replaced(equation=f"{','.join(names)}->{out}", tensors=tensors)


def _plain(tensors: Sequence[Form], names: Sequence[str]) -> bool:
    """Whether no operand repeats a letter, and a letter is one size everywhere."""
    sizes = {c: n for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape)}
    same = all(same_size(sizes[c], n) for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape))
    return same and all(len(set(letters)) == len(letters) for letters in names)
