"""Fourier transforms along dims that are not the batch."""

from __future__ import annotations

from roo_rewrite.facts import Batching
from roo_rewrite.rules.families import along, listed
from roo_rewrite.rules.registry import Call, case, rule

_OVER = "a Fourier transform over the batch"
_LINE = [
    case("B 4", empty=False),
    case("4 B", call=lambda n, x: (x, 4, 0), empty=False),
    case("B*2 4", call=lambda n, x: (x, 6), empty=False),
    case("B 4", call=lambda n, x: (x, None, 0), declines=True),
]
_PLANE = [
    case("B 4 3", empty=False),
    case("4 B 3", call=lambda n, x: (x, None, [0, 2]), empty=False),
    case("4 B 3", declines=True),
]


@rule(
    "aten.fft_fft.default",
    "aten.fft_ifft.default",
    "aten.fft_irfft.default",
    "aten.fft_hfft.default",
    cases=_LINE,
)
@rule("aten.fft_rfft.default", "aten.fft_ihfft.default", cases=_LINE)
@rule(
    "aten.fft_hfft2.default",
    "aten.fft_ihfft2.default",
    "aten.fft_fft2.default",
    "aten.fft_ifft2.default",
    "aten.fft_rfft2.default",
    "aten.fft_irfft2.default",
    cases=_PLANE,
)
@rule(
    "aten.fft_fftn.default",
    "aten.fft_ifftn.default",
    "aten.fft_rfftn.default",
    "aten.fft_irfftn.default",
    "aten.fft_hfftn.default",
    "aten.fft_ihfftn.default",
    cases=[*_PLANE[1:], case("B 4 3", call=lambda n, x: (x, [4, 3]), empty=False)],
)
@rule(
    "aten.fft_fftshift.default",
    "aten.fft_ifftshift.default",
    cases=[case("B 4", call=lambda n, x: (x, [1])), case("B 4", declines=True)],
)
def transform(call: Call) -> Batching:
    """A transform along `dim`; without it along the last dims that have a size, or all."""
    dims = listed(call["dim"])
    if dims is None:
        sizes = call.args.get("s")
        ndim = call.operand("self").ndim
        dims = list(range(-len(sizes), 0)) if sizes is not None else list(range(ndim))
    return along(call, *dims, what=_OVER)
