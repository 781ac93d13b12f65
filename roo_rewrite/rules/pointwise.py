"""Pointwise ops, with broadcasting, and ops that return their operand in another dtype or place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._ops import OpOverload

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Offsets, Ragged, Replicated, RowIndex
from roo_rewrite.rules.families import batched, broadcasting, unary
from roo_rewrite.rules.registry import Call, Case, Operand, case, no_rule, rule

_ANY = (RowIndex, Lengths, Offsets, Ragged)

_UNARY_CASES = [case("B 3"), case("3 B"), case("B*2 3")]
_BINARY_CASES = [
    case("B 3", "B 3"),
    case("B 3", "3"),
    case("B 1 3", "B 2 1"),
    case("2 B", "B"),
    case("1 B", "B 1", declines=True),
    case("7 3", "B 3", declines=True),
]

# Pointwise by torch's tag, but not a function of the operands alone, or writing into one of them.
_NOT_POINTWISE = {"bernoulli", "rrelu_with_noise", "dropout", "native_dropout", "copy", "fill", "_to_copy", "clone"}

# Pointwise, but not by torch's tag, or not by every version's; and overloads of such names that are something else.
_UNTAGGED = {
    "__and__",
    "__or__",
    "__xor__",
    "_conj",
    "_conj_physical",
    "absolute",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "clip",
    "complex",
    "conj",
    "divide",
    "fix",
    "float_power",
    "floor_divide",
    "greater",
    "greater_equal",
    "hardswish",
    "imag",
    "isclose",
    "isreal",
    "leaky_relu",
    "less",
    "less_equal",
    "log_sigmoid",
    "log_sigmoid_forward",
    "masked_fill",
    "max",
    "min",
    "multiply",
    "negative",
    "not_equal",
    "polar",
    "positive",
    "real",
    "resolve_conj",
    "resolve_neg",
    "rsub",
    "special_digamma",
    "special_erf",
    "special_erfc",
    "special_erfinv",
    "special_exp2",
    "special_expit",
    "special_expm1",
    "special_gammainc",
    "special_gammaincc",
    "special_gammaln",
    "special_i0",
    "special_log1p",
    "special_logit",
    "special_ndtr",
    "special_polygamma",
    "special_psi",
    "special_round",
    "special_sinc",
    "special_xlogy",
    "square",
    "subtract",
    "true_divide",
    "where",
}
_OTHERWISE = {"mul.Tensor", "sub.Tensor", "max", "max.dim", "min", "min.dim", "where", "max.names_dim", "min.names_dim"}


def _tagged() -> list[OpOverload]:
    """Every functional ATen op that torch itself tags pointwise, or that is another name or kind of one."""
    found = []
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name, _, overload = full.removeprefix("aten::").partition(".")
        if (
            not full.startswith("aten::")
            or name in _NOT_POINTWISE
            or full.removeprefix("aten::") in _OTHERWISE
            or "out" in overload.split("_")
        ):
            continue
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
        functional = not op._schema.is_mutable and all(str(r.type) == "Tensor" for r in op._schema.returns)
        random = torch.Tag.nondeterministic_seeded in op.tags
        if functional and not random and (torch.Tag.pointwise in op.tags or name in _UNTAGGED):
            found.append(op)
    return found


_POLYGAMMA = [case("p:B 3", call=lambda n, x: (1, x))]
# How to call a pointwise op whose plain call of two or one tensors is not valid.
_CALLS = {
    "aten.where.self": [case("b:B 3", "B 3", "3")],
    "aten.where.ScalarSelf": [case("b:B 3", "B 1", call=lambda n, c, x: (c, 1.5, x))],
    "aten.where.ScalarOther": [case("b:B 3", "B 1", call=lambda n, c, x: (c, x, 1.5))],
    "aten.where.Scalar": [case("b:B 3", call=lambda n, c: (c, 1.5, 2.5))],
    "aten.addcmul.default": [case("B 3", "3", "B 1")],
    "aten.addcdiv.default": [case("B 3", "3", "p:B 1")],
    "aten.lerp.Tensor": [case("B 3", "B 3", "B 1")],
    "aten.lerp.Scalar": [case("B 3", "B 3", call=lambda n, x, y: (x, y, 0.25))],
    **{f"aten.{name}.default": [case("p:B 3"), case("p:3 B"), case("p:B*2 3")] for name in ("acosh", "arccosh")},
    "aten.imag.default": [case("c:B 3")],
    "aten._conj.default": [case("c:B 3")],
    "aten.polygamma.default": _POLYGAMMA,
    "aten.special_polygamma.default": _POLYGAMMA,
    "aten.clamp.default": [case("B 3", call=lambda n, x: (x, -1, 2))],
    "aten.clip.default": [case("B 3", call=lambda n, x: (x, None, 2))],
    "aten.clamp.Tensor": [case("B 3", "3", call=lambda n, x, low: (x, low))],
    "aten.clip.Tensor": [case("B 3", "B 1", call=lambda n, x, high: (x, None, high))],
    "aten.masked_fill.Scalar": [
        case("B 3", "b:B 1", call=lambda n, x, m: (x, m, 5.0)),
        case("2 B", "b:B", call=lambda n, x, m: (x, m, 5.0)),
    ],
    "aten.masked_fill.Tensor": [case("B 3", "b:B 1", "")],
    "aten.round.decimals": [case("u:B 3", call=lambda n, x: (x, {"decimals": 1}))],
    "aten.special_round.default": [case("u:B 3", call=lambda n, x: (x, {"decimals": 1}))],
    **{
        f"aten.{name}.{kind}_mode": [case("B 3", *shape, call=call)]
        for name in ("div", "divide")
        for kind, shape, call in (
            ("Tensor", ["p:B 1"], lambda n, x, y: (x, y, {"rounding_mode": "floor"})),
            ("Scalar", [], lambda n, x: (x, 2, {"rounding_mode": "trunc"})),
        )
    },
}


def _tagged_cases(op: OpOverload) -> list[Case]:
    """Cases by schema: as many tensors as it requires, 2 for each required number."""
    required = [a for a in op._schema.arguments if not a.has_default_value()]
    tensors = [a for a in required if str(a.type) == "Tensor"]
    numbers = 2 if len(required) > len(tensors) else 0

    def call(n: int, *given: torch.Tensor) -> tuple[object, ...]:
        stock = iter(given)
        return tuple(next(stock) if str(a.type) == "Tensor" else numbers for a in required)

    bitwise = "bitwise" in str(op) or "__" in str(op) or "gcd" in str(op) or "lcm" in str(op)
    kind = "i:" if bitwise else "u:"
    if len(tensors) <= 1:
        return [case(f"{kind}{shape}", call=call) for shape in ("B 3", "3 B", "B*2 3")]
    tables = case(*(f"{kind}{s}" for s in ["B 3", *["7 3"] * (len(tensors) - 1)]), call=call, declines=True)
    shapes = [["B 3"] * len(tensors), ["2 B", *["B"] * (len(tensors) - 1)], ["B 1 3", *["B 2 1"] * (len(tensors) - 1)]]
    return [*(case(*(f"{kind}{s}" for s in row), call=call) for row in shapes), tables]


def _register() -> None:
    for op in _tagged():
        name = str(op)
        rule(name, cases=_CALLS.get(name) or _tagged_cases(op))(broadcasting)


_register()


@rule(
    "aten._to_copy.default",
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
    "aten.lift.default",
    "aten.alias_copy.default",
    "aten.detach_copy.default",
    special=_ANY,
    cases=[*_UNARY_CASES, case("#B"), case("lengths"), case("offsets"), case("R 2")],
)
@rule(
    "aten.to.dtype",
    special=_ANY,
    cases=[
        case("B 3", call=lambda n, x: (x, torch.int64)),
        case("ends", call=lambda n, x: (x, torch.int32)),
        case("#B", call=lambda n, x: (x, torch.bool), declines=True),
    ],
)
@rule("aten.to.dtype_layout", special=_ANY, cases=[case("B 3", call=lambda n, x: (x, {"dtype": torch.int64}))])
@rule("aten.to.device", special=_ANY, cases=[case("B 3", call=lambda n, x: (x, torch.device("cpu"), torch.float32))])
def same(call: Call) -> Batching:
    """The operand again, in another place or dtype."""
    kind = next(iter(call.operands())).batching
    if call.args.get("dtype") in (None, torch.int64, torch.int32) or isinstance(kind, (Ragged, Replicated)):
        return kind
    return unary(call)


@rule("aten.copy.default", cases=[case("B 3", "B 3"), case("B 3", "3"), case("B 2 3", "B 1 3")])
@rule("aten.fill.Tensor", cases=[case("B 3", "")])
@rule("aten.fill.Scalar", cases=[case("B 3", call=lambda n, x: (x, 2.0))])
def written_over(call: Call) -> Batching:
    """The shape of self with the contents of another value, broadcast."""
    return broadcasting(call)


@rule(
    "aten.prelu.default",
    cases=[case("B 3", "3"), case("B", "1"), case("2 3 B", "3"), case("3 B", "1")],
)
def prelu(call: Call) -> Batching:
    """A slope for all entries, or for each of dim 1."""
    call.replicated("weight")
    x, slopes = call.operand("self"), call.operand("weight")
    if x.rows is not None and x.rows.dim == 1 and any(s != 1 for s in slopes.shape):
        raise NotRowWise("the slopes have an entry per row")
    return unary(call)


@rule("aten.to.other", "aten.type_as.default", cases=[case("B 3", "i:2")])
def like_other(call: Call) -> Batching:
    """The operand in the dtype of another, whose batch does not matter."""
    return batched(call.operand("self").rows)


@rule(
    "aten.sub.Tensor",
    special=(Offsets, Lengths),
    cases=[*_BINARY_CASES, case("ends", "starts"), case("ends", "lengths"), case("R 2", "2"), case("R 2", "R 1")],
)
def sub(call: Call) -> Batching:
    """A difference; that of ends and starts is the lengths, that of ends and lengths the starts."""
    x, y = call["self"], call["other"]
    if isinstance(x, Operand) and isinstance(x.batching, Offsets) and isinstance(y, Operand):
        starts, lengths = Offsets(x.batching.lengths, last=False), Lengths(lengths=x.batching.lengths)
        ends = x.batching == Offsets(x.batching.lengths, first=False) and call["alpha"] == 1
        if ends and y.batching in (starts, lengths):
            return lengths if y.batching == starts else starts
    return broadcasting(call)


@rule(
    "aten.mul.Tensor",
    special=(RowIndex,),
    cases=[
        *_BINARY_CASES,
        case("#B", call=lambda n, x: (x, 3)),
        case("#B", call=lambda n, x: (x, 1)),
        case("#B", call=lambda n, x: (x, -1), declines=True),
    ],
)
def mul(call: Call) -> Batching:
    """A product; that of the row numbers with an integer is every so many numbers."""
    x, y = call["self"], call["other"]
    if isinstance(x, Operand) and isinstance(x.batching, RowIndex) and isinstance(y, int) and y > 0:
        return replace(x.batching, step=x.batching.step * y)
    return broadcasting(call)


@rule(
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
    cases=[
        case("B 3", call=lambda n, x: (x, 0.5, False)),
        case("B 3", call=lambda n, x: (x, 0.5, True), declines=True),
    ],
)
def dropout(call: Call) -> Batching:
    """The identity in eval or at p = 0; in training it draws an own mask for every impression."""
    if call["train"] and call["p"] > 0:
        raise NotRowWise("dropout draws its own mask for every impression (dropout='per_request' shares it)")
    return unary(call)


no_rule(
    "draws random numbers for every impression",
    "aten.bernoulli.default",
    "aten.rand_like.default",
    "aten.randn_like.default",
    "aten.randint_like.default",
    "aten.multinomial.default",
    "aten.rand.default",
    "aten.randn.default",
    "aten.randint.default",
    "aten.randint.low",
    "aten.randperm.default",
    "aten.normal.Tensor_Tensor",
    "aten.poisson.default",
    "aten.exponential.default",
    "aten.bernoulli.p",
    "aten.randint.low_generator",
    "aten.rand.generator",
    "aten.randn.generator",
    "aten.normal.Tensor_float",
    "aten.normal.float_Tensor",
    "aten.normal_functional.default",
    "aten.uniform.default",
    "aten.native_dropout.default",
    "aten.rrelu.default",
    "aten.rrelu_with_noise_functional.default",
    "aten.randint_like.low_dtype",
)
