"""Convolutions, pooling and resizing: windows over the last dims."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching
from roo_rewrite.rules.families import along, batched, each
from roo_rewrite.rules.registry import Call, case, rule


@rule(
    "aten.conv1d.default",
    cases=[
        case("B 2 5", "3 2 3"),
        case("B*2 2 5", "3 2 3", "3"),
        case("4 2 B", "3 2 1", empty=False),
        case("4 2 B", "3 2 3", declines=True),
        case("2 B", "3 2 3", declines=True),
        case("2 B 5", "3 7 3", declines=True),
        case("B 2 5", "B 2 3", declines=True),
    ],
)
@rule("aten.conv1d.padding", cases=[case("B 2 5", "3 2 3", call=lambda n, x, w: (x, w, None, [1], "same"))])
@rule(
    "aten.conv2d.default",
    cases=[
        case("B 2 5 4", "3 2 3 2"),
        case("4 2 B 4", "3 2 1 2", empty=False),
        case("4 2 B 4", "3 2 1 2", call=lambda n, x, w: (x, w, None, [1, 1], [1, 0]), declines=True),
        case("4 2 B 4", "3 2 1 2", call=lambda n, x, w: (x, w, None, [2, 1]), declines=True),
        case("4 2 B 4", "3 2 1 2", call=lambda n, x, w: (x, w, None, [1], [0]), empty=False),
        case("4 2 4 B", "3 2 2 1", call=lambda n, x, w: (x, w, None, [2, 1], [1, 0]), empty=False),
        case("2 B 4", "3 2 1 2", empty=False),
    ],
)
@rule("aten.conv2d.padding", cases=[case("B 2 5 4", "3 2 3 2", call=lambda n, x, w: (x, w, None, [1], "valid"))])
@rule("aten.conv3d.default", cases=[case("B 2 3 4 3", "3 2 3 2 1")])
@rule("aten.conv3d.padding", cases=[case("B 2 3 4 3", "3 2 3 2 1", call=lambda n, x, w: (x, w, None, [1], "valid"))])
@rule("aten.conv_transpose1d.default", cases=[case("B 2 5", "2 3 3"), case("4 2 B", "2 3 3", declines=True)])
@rule("aten.conv_transpose2d.input", cases=[case("B 2 5 3", "2 3 3 2")])
@rule("aten.conv_transpose3d.input", cases=[case("B 2 5 3 3", "2 3 3 2 1")])
@rule(
    "aten.convolution.default",
    cases=[case("B 2 5", "3 2 3", call=lambda n, x, w: (x, w, None, [1], [0], [1], False, [0], 1))],
)
def convolution(call: Call) -> Batching:
    """The batch before the channels; or along a window of one entry, moved by one."""
    call.replicated("weight", "bias")
    x, windows = call.operand("input"), call.operand("weight").ndim - 2
    rows = x.rows
    if rows is None or (rows.dim == 0 and x.ndim == windows + 2):
        return batched(rows)
    at = rows.dim - (x.ndim - windows)
    if at < 0:
        raise NotRowWise("the batch is the channel dim")
    sizes = [call.operand("weight").shape[2 + at], *(_entry(call.args[name], at) for name in ("stride", "padding"))]
    if "transpose" in call.name or call.args.get("transposed") or sizes != [1, 1, 0]:
        raise NotRowWise("a convolution over the batch")
    return batched(rows)


def _entry(sizes: object, at: int) -> object:
    """Entry `at` of a size per dim, or the one for all."""
    if not isinstance(sizes, list):
        return sizes
    return sizes[at] if len(sizes) > 1 else sizes[0]


_POOL = "takes windows over the batch"


def _pool(dims: int) -> None:
    """Pooling over the last `dims` dims."""
    x = " ".join(["4"] * dims)
    over = [case(f"B 2 {x}", call=lambda n, x: (x, [2] * dims)), case(f"B*2 2 {x}", call=lambda n, x: (x, [2] * dims))]
    bad = case(f"2 {'4 ' * (dims - 1)}B", call=lambda n, x: (x, [2] * dims), declines=True)

    def pool(call: Call) -> Batching:
        found = along(call, *range(-dims, 0), what=_POOL)
        return each(found, len(call.out)) if call.several else found

    plain = [f"aten.max_pool{dims}d.default", f"aten.avg_pool{dims}d.default"]
    rule(*plain, f"aten.max_pool{dims}d_with_indices.default", cases=[*over, bad])(pool)
    adaptive = [f"aten.adaptive_avg_pool{dims}d.default", f"aten.adaptive_max_pool{dims}d.default"]
    rule(*adaptive, cases=over)(pool)


for _dims in (1, 2, 3):
    _pool(_dims)


@rule(
    "aten.im2col.default",
    cases=[
        case("B 2 4 4", call=lambda n, x: (x, [2, 2], [1, 1], [0, 0], [1, 1])),
        case("2 B 4 4", call=lambda n, x: (x, [2, 2], [1, 1], [0, 0], [1, 1]), declines=True),
    ],
)
@rule("aten.col2im.default", cases=[case("B 8 9", call=lambda n, x: (x, [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]))])
def columns(call: Call) -> Batching:
    """Windows as columns, and back; the batch comes first."""
    x = call.operand("self")
    if x.rows is not None and (x.rows.dim != 0 or x.ndim != (3 if "col2im" in call.name else 4)):
        raise NotRowWise(_POOL)
    return batched(x.rows)
