"""Resizing and rearranging images: `[B, C, H, W]` and kin, the batch before the channels."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching
from roo_rewrite.rules.concat import common
from roo_rewrite.rules.families import along, batched
from roo_rewrite.rules.registry import Call, case, rule

_WITHIN = "the batch is a dim of the images"


def _resized(dims: int) -> None:
    """Interpolation over the last `dims` dims, by size and by scale."""
    image = "B 2 " + " ".join(["3"] * dims)
    kinds = {1: ["linear1d"], 2: ["bilinear2d", "bicubic2d"], 3: ["trilinear3d"]}[dims]
    nearest = [f"nearest{dims}d", f"nearest_exact{dims}d"]
    for kind in [*kinds, *nearest]:
        name = f"aten.{'_' if 'exact' in kind else ''}upsample_{kind}"
        flag = [] if "nearest" in kind else [False]
        by_size = case(image, call=lambda n, x, f=flag: (x, [5] * dims, *f))
        by_scale = case(image, call=lambda n, x, f=flag: (x, None, *f, [2.0] * dims))
        rule(f"{name}.default", cases=[by_size])(images)
        rule(f"{name}.vec", cases=[by_scale])(images)


def images(call: Call) -> Batching:
    """A function of each image."""
    x = call.operands()[0]
    return along(call, *range(1, x.ndim), what=_WITHIN)


for _dims in (1, 2, 3):
    _resized(_dims)


@rule("aten.channel_shuffle.default", cases=[case("B 4 2 2", call=lambda n, x: (x, 2))])
def channel_shuffle(call: Call) -> Batching:
    """Channels (dim 1) in another order."""
    return images(call)


@rule(
    "aten.pixel_shuffle.default",
    cases=[case("B 4 2 2", call=lambda n, x: (x, 2)), case("B 2 4 1 1", call=lambda n, x: (x, 2))],
)
@rule("aten.pixel_unshuffle.default", cases=[case("B 1 4 4", call=lambda n, x: (x, 2), empty=False)])
def pixels(call: Call) -> Batching:
    """Channels become pixels, or pixels channels, in the last three dims."""
    return along(call, -1, -2, -3, what=_WITHIN)


@rule(
    "aten.grid_sampler.default",
    "aten.grid_sampler_2d.default",
    cases=[case("B 2 3 3", "u:B 4 4 2", call=lambda n, x, grid: (x, grid, 0, 0, False))],
)
def grid_sampler(call: Call) -> Batching:
    """Each image at the points of its grid."""
    rows = common([call.operand("input"), call.operand("grid")])
    if rows is not None and rows.dim != 0:
        raise NotRowWise(_WITHIN)
    return batched(rows)
