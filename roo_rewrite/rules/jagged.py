"""Jagged values: `[N, ...]` with the lengths, or the offsets, of each row. fbgemm's ops are known by name only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Offsets, Ragged, Rows, Several
from roo_rewrite.rules.families import along, batched
from roo_rewrite.rules.registry import Call, Operand, case, no_rule, rule

_JAGGED = (Ragged, Offsets, Lengths)
_UNKNOWN = "the lengths are not known to be those of the jagged values"


def _lengths(x: Operand) -> str:
    """The name of a jagged pair, given its lengths."""
    if not isinstance(x.batching, Lengths):
        raise NotRowWise("sums over the batch")
    return x.batching.lengths


def _values(x: Operand, at: Operand | Sequence[Operand]) -> Ragged:
    """The batching of jagged values, whose offsets (with the total) or lengths are `at`."""
    if not isinstance(at, Operand):
        if len(at) != 1:
            raise NotRowWise("values jagged in several dims")
        at = at[0]
    kind = x.batching
    if not isinstance(kind, Ragged) or at.batching not in (Offsets(kind.lengths), Lengths(lengths=kind.lengths)):
        raise NotRowWise(_UNKNOWN)
    return kind


def _dense(x: Operand) -> None:
    """Declines unless x has the plain batch in dim 0."""
    if x.rows != Rows(0):
        raise NotRowWise("the dense operand has no row for each of the jagged ones")


@rule(
    "aten.cumsum.default",
    special=(Lengths,),
    cases=[
        case("B 3", call=lambda n, x: (x, -1)),
        case("3 B", call=lambda n, x: (x, 0)),
        case("2 B*3", call=lambda n, x: (x, 0)),
        case("lengths", call=lambda n, x: (x, 0)),
        case("B 3", call=lambda n, x: (x, 0), declines=True),
    ],
)
def cumsum(call: Call) -> Batching:
    """Sums so far along a dim that is not the batch; those of lengths are where each row ends."""
    x = call.operand("self")
    if isinstance(x.batching, Lengths):
        return Offsets(x.batching.lengths, first=False)
    return along(call, call["dim"], what="cumsum along the batch dim")


@rule("fbgemm.asynchronous_complete_cumsum.default", special=(Lengths,), cases=[case("lengths")])
def complete_cumsum(call: Call) -> Batching:
    """Lengths -> offsets, from 0 to the total."""
    return Offsets(_lengths(call.operand("t_in")))


@rule("fbgemm.asynchronous_exclusive_cumsum.default", special=(Lengths,), cases=[case("lengths")])
def exclusive_cumsum(call: Call) -> Batching:
    """Lengths -> where each row begins."""
    return Offsets(_lengths(call.operand("t_in")), last=False)


@rule("fbgemm.asynchronous_inclusive_cumsum.default", special=(Lengths,), cases=[case("lengths")])
def inclusive_cumsum(call: Call) -> Batching:
    """Lengths -> where each row ends."""
    return Offsets(_lengths(call.operand("t_in")), first=False)


@rule(
    "aten.diff.default",
    special=(Offsets,),
    cases=[
        case("offsets"),
        case("B 4"),
        case("B 4", "B 2", call=lambda n, x, p: (x, 1, 1, p)),
        case("4 B", declines=True),
    ],
)
def diff(call: Call) -> Batching:
    """Differences of neighbours; those of offsets are the lengths."""
    x, ends = call.operand("self"), [call[name] for name in ("prepend", "append") if call[name] is not None]
    if isinstance(x.batching, Offsets):
        if x.batching != Offsets(x.batching.lengths) or call["n"] != 1 or ends:
            raise NotRowWise("differences of offsets that are not all there")
        return Lengths(lengths=x.batching.lengths)
    if any(e.rows != x.rows for e in ends):
        raise NotRowWise("the batch lies in different dims of the operands")
    return along(call, call["dim"], what="differences of neighbouring rows")


@rule(
    "fbgemm.jagged_to_padded_dense.default",
    special=_JAGGED,
    cases=[
        case("f:R 2", "offsets", call=lambda n, v, o: (v, [o], [3], 0.0)),
        case("f:R", "offsets", call=lambda n, v, o: (v, [o], [2], -1.0)),
        case("f:R 2", "2", call=lambda n, v, o: (v, [torch.tensor([0, len(v)])], [3], 0.0), declines=True),
    ],
)
def to_padded(call: Call) -> Batching:
    """Each row's values, cut or padded to one length."""
    _values(call.operand("values"), call["offsets"])
    return Rows(0)


@rule(
    "fbgemm.jagged_1d_to_dense.default",
    special=_JAGGED,
    cases=[case("i:R", "offsets", call=lambda n, v, o: (v, o, 3, 0))],
)
@rule(
    "fbgemm.jagged_2d_to_dense.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", call=lambda n, v, o: (v, o, 3))],
)
def to_dense(call: Call) -> Batching:
    """Each row's values, cut or padded to one length."""
    _values(call.operand("values"), call.operand("offsets"))
    return Rows(0)


@rule(
    "fbgemm.dense_to_jagged.default",
    sizes=("total_L",),
    special=_JAGGED,
    cases=[case("f:B 3 2", "offsets", call=lambda n, x, o: (x, [o]))],
)
def dense_to_jagged(call: Call) -> Batching:
    """The first values of each row, as many as its length."""
    _dense(call.operand("dense"))
    (offsets,) = call["x_offsets"]
    kind = offsets.batching
    if not isinstance(kind, Offsets) or kind != Offsets(kind.lengths):
        raise NotRowWise(_UNKNOWN)
    return Several((Ragged(kind.lengths), kind))


@rule(
    "fbgemm.jagged_dense_elementwise_add_jagged_output.default",
    "fbgemm.jagged_dense_elementwise_mul.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", "f:B 3 2", call=lambda n, v, o, y: (v, [o], y))],
)
@rule(
    "fbgemm.jagged_dense_dense_elementwise_add_jagged_output.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", "f:B 3 2", "f:B 3 2", call=lambda n, v, o, y, z: (v, [o], y, z))],
)
def jagged_with_dense(call: Call) -> Batching:
    """Jagged values combined with the dense ones in their places."""
    kind = _values(call.operand("x_values"), call["x_offsets"])
    for name in call.args:
        if name.startswith("y"):
            _dense(call.operand(name))
    return Several((kind, Offsets(kind.lengths)))


@rule(
    "fbgemm.jagged_dense_elementwise_add.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", "f:B 3 2", call=lambda n, v, o, y: (v, [o], y))],
)
def padded_with_dense(call: Call) -> Batching:
    """Jagged values, padded, plus dense ones."""
    _values(call.operand("x_values"), call["x_offsets"])
    _dense(call.operand("y"))
    return Rows(0)


@rule(
    "fbgemm.jagged_dense_bmm.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", "f:B 2 3", call=lambda n, v, o, y: (v, o, y, 4))],
)
def jagged_dense_bmm(call: Call) -> Batching:
    """Each row's values times its matrix."""
    kind = _values(call.operand("x_values"), call.operand("x_offsets"))
    _dense(call.operand("y"))
    return Several((kind, Offsets(kind.lengths)))


@rule(
    "fbgemm.jagged_jagged_bmm.default",
    special=_JAGGED,
    cases=[case("f:R 2", "f:R 3", "offsets", call=lambda n, x, y, o: (x, y, o, 4))],
)
def jagged_jagged_bmm(call: Call) -> Batching:
    """A product over each row's values."""
    _values(call.operand("x_values"), call.operand("x_offsets"))
    _values(call.operand("y_values"), call.operand("x_offsets"))
    return Rows(0)


@rule(
    "fbgemm.jagged_softmax.default",
    special=_JAGGED,
    cases=[case("f:R 2", "offsets", call=lambda n, v, o: (v, o, 4))],
)
def jagged_softmax(call: Call) -> Batching:
    """A softmax over each row's values."""
    kind = _values(call.operand("values"), call.operand("x_offsets"))
    return Several((kind, Offsets(kind.lengths)))


@rule("fbgemm.segment_sum_csr.default", special=_JAGGED, cases=[case("offsets", "f:R", call=lambda n, o, v: (1, o, v))])
def segment_sum_csr(call: Call) -> Batching:
    """The sum of each row's values."""
    if call["batch_size"] != 1:
        raise NotRowWise("segments of several values each")
    _values(call.operand("values"), call.operand("csr_seg"))
    return Rows(0)


@rule(
    "fbgemm.pack_segments.default",
    special=_JAGGED,
    cases=[case("f:R 2", "lengths", call=lambda n, v, lengths: (v, lengths, 3))],
)
def pack_segments(call: Call) -> Batching:
    """Each row's values, cut or padded to one length."""
    _values(call.operand("t_in"), call.operand("lengths"))
    return Rows(0)


@rule(
    "aten.segment_reduce.default",
    special=_JAGGED,
    cases=[
        case("R 2", "lengths", call=lambda n, v, lengths: (v, "sum", {"lengths": lengths}), empty=False),
        case("R", "offsets", call=lambda n, v, o: (v, "max", {"offsets": o, "initial": 0})),
    ],
)
def segment_reduce(call: Call) -> Batching:
    """The sum, mean, max, min or product of each row's values."""
    at = call["lengths"] if call["offsets"] is None else call["offsets"]
    if call["axis"] != 0 or call["indices"] is not None or at is None:
        raise NotRowWise(_UNKNOWN)
    _values(call.operand("data"), at)
    return Rows(0)


@rule(
    "aten.repeat_interleave.self_Tensor",
    sizes=("output_size",),
    special=_JAGGED,
    cases=[
        case("B 2", "lengths", call=lambda n, x, lengths: (x, lengths, 0)),
        case("B 2", call=lambda n, x: (x, torch.tensor([1, 2]), 1)),
        case("B 2", "i:B", call=lambda n, x, r: (x, r, 0), declines=True),
    ],
)
def repeat_interleave(call: Call) -> Batching:
    """Every row as often as its length: jagged values. Or entries of another dim, by constants."""
    x, repeats = call.operand("self"), call.operand("repeats")
    if isinstance(repeats.batching, Lengths) and call["dim"] == 0 and x.rows == Rows(0):
        return Ragged(repeats.batching.lengths)
    if repeats.rows is not None or call["dim"] is None:
        raise NotRowWise("how often a row is repeated depends on other rows")
    return along(call, call["dim"], what="repeats some rows of the batch")


def _permutation(n: int, x: Tensor) -> tuple[Any, ...]:
    """Two tables of 2 and 3 columns change places."""
    order = torch.tensor([1, 0])
    return x, torch.tensor([0, 2, 5]), order, torch.tensor([0, 3, 5]), order


_PERMUTED = [case("B 5", call=_permutation)]


@rule("fbgemm.permute_pooled_embs.default", "fbgemm.permute_pooled_embs_auto_grad.default", cases=_PERMUTED)
def permute_pooled(call: Call) -> Batching:
    """The columns of each table, in another order of the tables."""
    call.replicated(*(name for name in call.args if name != "pooled_embs"))
    x = call.operand("pooled_embs")
    if x.rows is not None and x.rows.dim != 0:
        raise NotRowWise("permutes the batch")
    return batched(x.rows)


no_rule(
    "the row numbers of all values count over the batch",
    "aten.repeat_interleave.Tensor",
    "fbgemm.offsets_range.default",
    "fbgemm.lengths_range.default",
)
no_rule(
    "cuts or joins the jagged values of several keys",
    "fbgemm.stacked_jagged_1d_to_dense.default",
    "fbgemm.stacked_jagged_2d_to_dense.default",
    "fbgemm.permute_2D_sparse_data.default",
    "fbgemm.permute_1D_sparse_data.default",
    "fbgemm.expand_into_jagged_permute.default",
    "fbgemm.keyed_jagged_index_select_dim1.default",
    "fbgemm.jagged_index_select.default",
)
