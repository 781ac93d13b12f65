"""A product for each field, of many operands, or in windows: blocks in any operand fall apart all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from law_parts import Model, few, fields, parameter, side_by_side
from torch import Tensor

STACKED: dict[str, Callable[[Any, Tensor], Tensor]] = {  # [F, B, D] with a weight for each field
    "bmm": lambda m, t: torch.bmm(t, m.w),
    "matmul": lambda m, t: t @ m.w,
    "baddbmm": lambda m, t: torch.baddbmm(m.b, t, m.w),
    "baddbmm scaled": lambda m, t: torch.baddbmm(m.b, t, m.w, beta=0.5, alpha=2.0),
    "einsum": lambda m, t: torch.einsum("fbd,fdn->fbn", t, m.w),
    "einsum turned": lambda m, t: torch.einsum("fdn,fbd->fbn", m.w, t),
}


@few
@given(st.permutations(["u0", "x0", "u1"]), st.sampled_from(sorted(STACKED)))
def test_fields_stacked_before_the_batch(law: Any, order: list[str], name: str) -> None:
    def run(m: Model, **inputs: Tensor) -> Tensor:
        return STACKED[name](m, torch.stack([inputs[n] for n in order])).tanh().sum(0)

    found = law(Model(run, w=parameter(3, 4, 2), b=parameter(3, 1, 2)), **dict.fromkeys(sorted(order), (4,)))
    assert found.flops() == (2 * 12 * 3 * 4 * 2, 2 * 4 * 2 * (3 * 2 + 12))


def _crossed(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row with itself and a matrix of each expert."""
    return x, m.experts[:, : x.shape[1], : x.shape[1]], x


OPERANDS = {
    "weights of pairs": lambda m, t: torch.einsum("bfd,bgd,fg->b", t, t, m.pairs[: t.shape[1], : t.shape[1]]),
    "a weight first": lambda m, t: torch.einsum("fg,bfd,bgd->b", m.pairs[: t.shape[1], : t.shape[1]], t, t),
    "a matrix between": lambda m, t: torch.einsum("bfd,de,bge->bfg", t, m.between, t).sum(2),
    "a matrix for each expert": lambda m, t: torch.einsum("bi,eij,bj->bei", *_crossed(m, t.flatten(1))),
    "a diagonal": lambda m, t: torch.einsum("bfd,ofo->bdo", t, m.cube[:, : t.shape[1]]),
    "gates": lambda m, t: torch.einsum("bfd,d,f->bd", t, m.between[0], m.pairs[0, : t.shape[1]]),
}


@few
@given(fields(1, 3), st.sampled_from(sorted(OPERANDS)))
def test_many_operands(law: Any, drawn: dict[str, int], name: str) -> None:
    names = list(drawn)

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return OPERANDS[name](m, side_by_side(inputs, names, 1))

    weights = {"pairs": parameter(12, 12), "between": parameter(3, 3), "cube": parameter(2, 12, 2)}
    weights["experts"] = parameter(2, 36, 36)
    law(Model(run, **weights), **{f: (w, 3) for f, w in drawn.items()})


def test_request_pairs_run_once(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return OPERANDS["weights of pairs"](m, torch.cat([u, x], 1))

    before, after = law(Model(run, pairs=parameter(5, 5)), u=(4, 3), x=(1, 3)).flops()
    assert after <= before - 2 * (12 - 3) * 16 * 3


def test_experts_meet_each_side_by_itself(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij,bj->bei", *_crossed(m, torch.cat([u, x], 1))).tanh()

    found = law(Model(run, experts=parameter(2, 36, 36)), u=(32,), x=(4,))
    assert found.flops() == (2 * 12 * 2 * 36 * 36, 2 * 2 * 36 * (3 * 32 + 12 * 4))


def test_no_order_of_operands_helps_what_is_of_one_side(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij,bj->bei", *_crossed(m, x)) + u.sum(1)[:, None, None]

    assert not law(Model(run, experts=parameter(2, 4, 4)), u=(5,), x=(4,)).took()


def test_fields_meet_a_diagonal_by_side(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return OPERANDS["a diagonal"](m, torch.cat([u, x], 1)).tanh()

    found = law(Model(run, cube=parameter(2, 5, 2)), u=(4, 3), x=(1, 3))
    assert any("einsum" in str(t) for t in found.moved())


CONVOLUTIONS = {
    "window": ((), lambda m, t: F.conv1d(t, m.wide[:, : t.shape[1]], m.b, padding=1)),
    "same": ((), lambda m, t: F.conv1d(t, m.wide[:, : t.shape[1]], m.b, padding="same")),
    "stride": ((), lambda m, t: F.conv1d(t, m.wide[:, : t.shape[1]], m.b, stride=2, dilation=2)),
    "image": ((3,), lambda m, t: F.conv2d(t, m.image[:, : t.shape[1]], m.b, padding=(1, 0))),
    "beside": ((3,), lambda m, t: F.conv2d(t.transpose(1, 2), m.beside, m.b)),
    "beside, padded": ((3,), lambda m, t: F.conv2d(t.transpose(1, 2), m.beside, m.b, padding=(1, 0))),
    "beside, in steps": ((3,), lambda m, t: F.conv2d(t.transpose(1, 2), m.beside, m.b, stride=(2, 1))),
    "across": ((3,), lambda m, t: F.conv2d(t.transpose(1, 2), m.image[:, :6], m.b, padding=1)),
}


@few
@given(fields(1, 3), st.sampled_from(sorted(CONVOLUTIONS)))
def test_windows(law: Any, drawn: dict[str, int], name: str) -> None:
    names, (shape, convolve) = list(drawn), CONVOLUTIONS[name]

    def run(m: Model, **inputs: Tensor) -> Tensor:
        return convolve(m, side_by_side(inputs, names, 1)).flatten(1).sum(1).tanh()

    weights = {"wide": parameter(2, 12, 3), "image": parameter(2, 12, 3, 2), "beside": parameter(2, 6, 1, 2)}
    law(Model(run, b=parameter(2), **weights), **{f: (w, 6, *shape) for f, w in drawn.items()})


MOVED = {"window": 1, "same": 1, "stride": 1, "image": 1, "across": 1}
MOVED |= {"beside": 1, "beside, padded": 2, "beside, in steps": 1}


@pytest.mark.parametrize(("name", "parts"), MOVED.items())
def test_windows_within_a_piece_move(law: Any, name: str, parts: int) -> None:
    shape, convolve = CONVOLUTIONS[name]

    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        return convolve(m, torch.cat([x, u], 1)).flatten(1).sum(1)

    weights = {"wide": parameter(2, 12, 3), "image": parameter(2, 12, 3, 2), "beside": parameter(2, 6, 1, 2)}
    found = law(Model(run, b=parameter(2), **weights), u=(7, 6, *shape), x=(2, 6, *shape))
    assert sum("conv" in str(t) for t in found.moved()) == parts


def test_low_precision_is_as_good_as_the_original(law: Any) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        y = F.conv1d(h, m.w, m.b, padding=1).mean(2) + torch.addmm(m.b, h.mean(2), m.w[..., 0].t(), alpha=0.3)
        return y + torch.einsum("bfd,bgd,fg->b", h, h, m.w[0, :, :1] * m.w[1, :, 0]).unsqueeze(1)

    law(Model(run, w=parameter(4, 24, 3), b=parameter(4)), u=(16, 3), x=(8, 3)).precise()


@pytest.mark.parametrize("case", ["groups", "a repeated letter", "weights of the batch"])
def test_declines(law: Any, case: str) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([u, x], 1)
        if case == "groups":
            return F.conv1d(h, m.w[:, :1], groups=6)
        if case == "a repeated letter":
            return torch.einsum("bff,f->b", h[:, :3], m.w[:3, 0, 0])
        return F.conv1d(h[:2], x[:3].flatten()[:6].view(1, 6, 1)).sum() + u[:, 0]

    law(Model(run, w=parameter(6, 6, 1)), u=(3, 3), x=(3, 3))
