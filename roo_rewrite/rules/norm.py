"""Normalisation layers: over features they are row-wise, over the batch they are not."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, CrossRow, Several
from roo_rewrite.rules.families import along, each
from roo_rewrite.rules.registry import Call, case, rule

BATCH_STATISTICS = "takes its statistics over the batch"


@rule(
    "aten.layer_norm.default",
    "aten.rms_norm.default",
    cases=[
        case("B 3", "3", call=lambda n, x, w: (x, [3], w)),
        case("2 B 3", "3", call=lambda n, x, w: (x, [3], w)),
        case("B 2 3", "2 3", call=lambda n, x, w: (x, [2, 3], w)),
        case("2*B 3", call=lambda n, x: (x, [3])),
    ],
)
@rule(
    "aten.native_layer_norm.default",
    cases=[case("B 2 3", "2 3", "2 3", call=lambda n, x, w, b: (x, [2, 3], w, b, 1e-5))],
)
@rule("aten._fused_rms_norm.default", cases=[case("B 3", "3", call=lambda n, x, w: (x, [3], w, 1e-5))])
def layer_norm(call: Call) -> Batching:
    """Normalises over the last dims."""
    call.replicated("weight", "bias")
    count = len(call["normalized_shape"])
    found = along(call, *range(-count, 0), what="normalises over the batch dim")
    return each(found, len(call.out)) if call.several else found


@rule(
    "aten.group_norm.default",
    cases=[
        case("B 4 3", "4", call=lambda n, x, w: (x, 2, w)),
        case("3 4 B", "4", call=lambda n, x, w: (x, 2, w), declines=True),
    ],
)
@rule(
    "aten.native_group_norm.default",
    sizes=("N",),
    cases=[case("B 4 3", "4", "4", call=lambda n, x, w, b: (x, w, b, n, 4, 3, 2, 1e-5))],
)
def group_norm(call: Call) -> Batching:
    """Normalises over groups of channels (dim 1) and everything after."""
    call.replicated("weight", "bias")
    x = call.operand("input")
    found = along(call, *range(1, x.ndim), what="normalises over the batch dim")
    return each(found, len(call.out)) if call.several else found


@rule(
    "aten.batch_norm.default",
    cases=[
        case("B 3", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, False, 0.1, 1e-5, True)),
        case("B 3 2", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, False, 0.1, 1e-5, True)),
        case("2 3 B", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, False, 0.1, 1e-5, True)),
        case("B 3", "3", call=lambda n, x, m: (x, m, m, None, None, True, 0.1, 1e-5, True), declines=True),
    ],
)
@rule(
    "aten.instance_norm.default",
    cases=[
        case("B 3 4", "3", call=lambda n, x, w: (x, w, w, None, None, True, 0.1, 1e-5, True), empty=False),
        case("B 3 2", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, False, 0.1, 1e-5, True), empty=False),
        case("2 3 B", "3", call=lambda n, x, w: (x, w, w, None, None, True, 0.1, 1e-5, True), declines=True),
    ],
)
def running_norm(call: Call) -> Batching:
    """Scales channels (dim 1) by running statistics; or by those of the batch, or of each instance."""
    call.replicated("weight", "bias", "running_mean", "running_var")
    if call.args.get("training"):
        raise NotRowWise(f"batch norm in training {BATCH_STATISTICS}")
    if not call.args.get("use_input_stats"):
        return along(call, 1, what="the batch is the channel dim")
    if call["running_mean"] is not None:
        raise NotRowWise(f"instance norm with running statistics {BATCH_STATISTICS}")
    return along(call, *range(1, call.operand("input").ndim), what="normalises over the batch dim")


@rule(
    "aten._native_batch_norm_legit_no_training.default",
    cases=[case("B 3", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, 0.1, 1e-5))],
)
@rule(
    "aten.native_batch_norm.default",
    cases=[
        case("B 3", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m.clone(), v.clone(), True, 0.1, 1e-5), declines=True)
    ],
)
@rule(
    "aten._native_batch_norm_legit_functional.default",
    cases=[case("B 3", "3", "p:3", call=lambda n, x, m, v: (x, m, m, m, v, True, 0.1, 1e-5), declines=True)],
)
def native_batch_norm(call: Call) -> Batching:
    """Batch norm by running statistics; the saved statistics are of no use after."""
    call.replicated("weight", "bias", "running_mean", "running_var")
    if call.args.get("training"):
        raise NotRowWise(f"batch norm in training {BATCH_STATISTICS}")
    saved = CrossRow("the saved statistics of a batch norm")
    first = along(call, 1, what="the batch is the channel dim")
    return Several((first, *(saved for _ in call.out[1:])))
