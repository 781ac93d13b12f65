"""Attention as one op."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching
from roo_rewrite.rules.families import einsum
from roo_rewrite.rules.registry import Call, Operand, case, rule


@rule(
    "aten.scaled_dot_product_attention.default",
    cases=[
        case("B 2 3", "B 4 3", "B 4 2"),
        case("B 2 4 3", "B 2 5 3", "B 2 5 3"),
        case("B 2 4 3", "B 2 5 3", "B 2 5 3", "b:B 1 1 5"),
        case("B 2 4 3", "B 2 5 3", "B 2 5 3", "4 5"),
        case("2 B 4 3", "2 B 4 3", "2 B 4 3", call=lambda n, q, k, v: (q, k, v, None, 0.0, True)),
        case("B 4 3", "1 5 3", "1 5 3"),
        case("B 3", "5 3", "5 3"),
        case("2 B 3", "2 5 3", "2 5 3", "B 5"),
        case("B 4 2 3", "B 2 5 3", "B 2 5 3", call=lambda n, q, k, v: (q, k, v, {"enable_gqa": True})),
        case("2 B 4 3", "2 1 5 3", "2 1 5 3", call=lambda n, q, k, v: (q, k, v, {"enable_gqa": True})),
        case("B 3", "5 3", "5 3", call=lambda n, q, k, v: (q, k, v, None, 0.0, True), declines=True),
        case("B 3", "B 3", "B 3", declines=True),
        case("B 2 3", "7 4 3", "7 4 3", declines=True),
        case("B 2 3", "B 4 3", "B 4 3", "7 1 4", declines=True),
        case("2 B 3", "2 5 3", "2 5 3", "7 5", declines=True),
        case("B 2 3", "B 4 3", "B 4 2", call=lambda n, q, k, v: (q, k, v, None, 0.5), declines=True),
    ],
)
def attention(call: Call) -> Batching:
    """softmax(q kᵀ + mask) v: row-wise in the dims before, and in the queries where none is masked by position."""
    if call["dropout_p"] > 0:
        raise NotRowWise("attention dropout draws its own mask for every impression")
    q, k, v, mask = call.operand("query"), call.operand("key"), call.operand("value"), call["attn_mask"]
    lead = "abcdefgh"[: max(o.ndim for o in (q, k, v)) - 2]
    operands = [(q, "qe"), (k, "ke"), (v, "kv")] + ([(mask, "qk")] if mask is not None else [])
    if call["is_causal"] and q.rows is not None and q.rows.dim == q.ndim - 2:
        raise NotRowWise("causal attention over the batch")
    terms = [_letters(o, lead, last) for o, last in operands]
    return einsum(f"{','.join(terms)}->{lead}qv", [o for o, _ in operands])


def _letters(x: Operand, lead: str, last: str) -> str:
    """The dims of x, aligned at the end."""
    letters = lead + last
    return letters[len(letters) - x.ndim :]
