"""Matrix functions: the last two dims are a matrix, the dims before them its batch."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Several
from roo_rewrite.rules.families import along, einsum
from roo_rewrite.rules.registry import Call, case, rule

_WITHIN = "the batch is a dim of the matrices"


@rule(
    "aten.linalg_inv.default",
    "aten.inverse.default",
    "aten.linalg_inv_ex.default",
    "aten.linalg_det.default",
    "aten.det.default",
    "aten.linalg_slogdet.default",
    "aten.slogdet.default",
    "aten.logdet.default",
    "aten.linalg_cholesky.default",
    "aten.linalg_cholesky_ex.default",
    "aten.cholesky.default",
    "aten.linalg_eigh.default",
    "aten.linalg_eigvalsh.default",
    "aten.linalg_qr.default",
    "aten.linalg_svd.default",
    "aten.linalg_svdvals.default",
    "aten.linalg_lu.default",
    "aten.linalg_matrix_exp.default",
    "aten.matrix_exp.default",
    "aten.linalg_pinv.atol_rtol_float",
    "aten.linalg_diagonal.default",
    cases=[case("m:B 3 3"), case("m:2 B 3 3")],
)
@rule(
    "aten.linalg_matrix_power.default",
    "aten.matrix_power.default",
    cases=[case("B 3 3", call=lambda n, x: (x, 2))],
)
def matrix_function(call: Call) -> Batching:
    """A function of each matrix."""
    if (call.args.get("dim1", -2), call.args.get("dim2", -1)) != (-2, -1):
        raise NotRowWise("not the diagonal of the last dims")
    x = call.operands()[0]
    if x.ndim < 3:
        return along(call, *range(x.ndim), what=_WITHIN)
    found = along(call, -2, -1, what=_WITHIN)
    return Several((found,) * len(call.out)) if call.several else found


@rule(
    "aten.linalg_solve.default",
    cases=[
        case("m:B 3 3", "B 3 2"),
        case("m:B 3 3", "B 3"),
        case("m:3 3", "B 3 2"),
        case("m:B 3 3", "3 3", declines=True),
    ],
)
def solve(call: Call) -> Batching:
    """A⁻¹ B, the dims before broadcast. B is a vector for each matrix where its shape says so."""
    a, b = call.operand("A"), call.operand("B")
    vector = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
    if not call["left"] or (a.ndim - 1 == b.ndim and (a.rows is None) != (b.rows is None)):
        raise NotRowWise("a batch of as many rows as a matrix is taken for something else")
    lead = "abcdefgh"[: max(a.ndim, b.ndim) - 2]
    left, right = lead[len(lead) - (a.ndim - 2) :], lead[len(lead) - (b.ndim - 2 + vector) :]
    return einsum(f"{left}yx,{right}{'x' if vector else 'xz'}->{lead}{'y' if vector else 'yz'}", [a, b])
