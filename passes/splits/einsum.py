"""An einsum of more than two operands, two at a time.

einsum("bfd,bgd,fg->b", T, T, w)  =  einsum("bfg,fg->b", einsum("bfd,bgd->bfg", T, T), w)
einsum("bi,eij,bj->bei", x, w, x) =  einsum("bei,bi->bei", einsum("eij,bj->bei", w, x), x)
einsum("bfd,ofo->bd", T, w)       =  einsum("bfd,fo->bd", T, diagonal(w))
einsum("bfd,ofx->bod", T, w)      =  einsum("bfd,of->bod", T, sum(w, 2))
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from passes.forms import Blocks, Expanded, Form, Sum, Whole, dtype_of, provenance, same_size
from passes.split import Application, Splitter, handles
from passes.splits.products import bilinear, moves
from roo_rewrite.facts import Provenance
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten


@handles("aten.einsum.default")
def einsum(s: Splitter, app: Application) -> Form | None:
    """Two operands are a product of forms; more are products of products."""
    app = _constants_alone(s, app)
    tensors = app["tensors"]
    if len(tensors) == 2:
        return bilinear(s, app, *tensors)
    if len(tensors) < 3 or app["path"] is not None or all(isinstance(f, Whole) for f in tensors):
        return None
    left, out = spelled_out(app["equation"], [f.ndim for f in tensors]).split("->")
    names = left.split(",")
    if not _plain(tensors, names):
        return None
    left_over, moved = list(zip(tensors, names)), False
    while len(left_over) > 1:
        first, second, kept = _next_pair(left_over, out)
        made = s.op(aten.einsum.default, f"{first[1]},{second[1]}->{kept}", [first[0], second[0]])
        moved = moved or (isinstance(made, (Blocks, Sum, Expanded)) and moves(made))
        left_over = [pair for pair in left_over if pair is not first and pair is not second] + [(made, kept)]
    return left_over[0][0] if moved else None


def _next_pair(operands: Sequence[tuple[Form, str]], out: str) -> tuple[tuple[Form, str], tuple[Form, str], str]:
    """The first two operands that share what no other has, and the letters of their product: outer products wait."""
    found = []
    for first, second in combinations(operands, 2):
        rest = [pair[1] for pair in operands if pair is not first and pair is not second]
        both = sorted(dict.fromkeys(first[1] + second[1]), key=lambda c: out.index(c) if c in out else len(out))
        needed = set(out).union(*rest)
        kept = "".join(c for c in both if c in needed) if rest else out
        if any(c not in needed for c in both):
            return first, second, kept
        found.append((first, second, kept))
    return found[0]


def _constants_alone(s: Splitter, app: Application) -> Application:
    """The einsum with the diagonals of its constants taken first, and what they alone have summed."""
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
        lone = [c for c in names[i] if c not in out and not any(c in n for j, n in enumerate(names) if j != i)]
        rest = "".join(c for c in names[i] if c not in lone)
        if lone and rest and provenance(form) is Provenance.CONSTANT and dtype_of(form).is_floating_point:
            tensors[i] = s.op(aten.sum.dim_IntList, form, [names[i].index(c) for c in lone])
            names[i] = rest
    return app.replaced(equation=f"{','.join(names)}->{out}", tensors=tensors)


def _plain(tensors: Sequence[Form], names: Sequence[str]) -> bool:
    """Whether no operand repeats a letter, and a letter is one size everywhere."""
    sizes = {c: n for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape)}
    same = all(same_size(sizes[c], n) for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape))
    return same and all(len(set(letters)) == len(letters) for letters in names)
