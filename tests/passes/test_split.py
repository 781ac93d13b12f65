"""split: a tiny graph in, the graph out; what is left alone; and that both are equal on one impression-level batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.annotate import Policy, annotate
from passes.normalize import normalize
from passes.split import HANDLERS, Split, handles, split

Function = Callable[..., Any]


def split_of(captured: Function, function: Function, mode: str = "always", fanout: float = 16.0) -> tuple[Any, ...]:
    """The trace, its graph before and after, and what was considered."""
    trace, inputs = captured(function)
    normalize(trace)
    annotate(trace, inputs, trace.model, Policy())
    before = trace.graph
    found: Split = split(trace, fanout, mode)  # type: ignore[arg-type]
    return trace, before, trace.graph, found


@pytest.fixture
def after(captured: Function, same: Function, printed: Callable[..., str]) -> Callable[..., str]:
    """after(function): the split graph, in text; equal to the graph it came from."""

    def make(function: Function) -> str:
        trace, before, graph, _ = split_of(captured, function)
        same(trace, before, graph)
        return printed(graph)

    return make


def wide(m: nn.Module, *parts: Tensor) -> Tensor:
    return F.linear(torch.cat(parts, 1), torch.cat([m.w] * (sum(p.shape[1] for p in parts) // 4), 1))


def test_a_linear_over_both_sides(after: Callable[..., str]) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x[:, :2], u[:, :2]], 1), m.w)

    assert after(model).splitlines()[-6:] == [
        "slice_tensor = slice(w, 1, 2, 4)",
        "linear_default = linear(slice_4, slice_tensor)",
        "slice_tensor_1 = slice(w, 1, 0, 2)",
        "linear_default_1 = linear(slice_2, slice_tensor_1)",
        "add_tensor = add(linear_default, linear_default_1)",
        "return [add_tensor]",
    ]


def test_interleaved_columns_become_one_block_a_side(after: Callable[..., str]) -> None:
    text = after(lambda m, u, x: wide(m, u, x, u, x))
    assert text.count("linear(") == 2


@pytest.mark.parametrize(
    ("order", "linears", "cats"),
    [("uxux", 4, 0), ("uuxu", 3, 1), ("xuxxu", 4, 1), ("uxuxux", 6, 0), ("uxuxuxux", 2, 2), ("ux", 2, 0)],
)
def test_few_runs_of_columns_are_multiplied_where_they_lie(
    after: Callable[..., str], order: str, linears: int, cats: int
) -> None:
    """Up to three a side: no operand, and no columns of the weight, are put together for one product."""

    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        parts = [(u if side == "u" else x) * (i + 2) for i, side in enumerate(order)]
        columns = [m.w.t() * (i + 1.0) for i in range(len(order))]
        return F.linear(torch.cat([p.relu() for p in parts], 1), torch.cat(columns, 1), m.m)

    text = after(model)
    assert text.count("linear(") == linears
    assert text.count(" = cat([relu") == cats


def test_a_sum_crosses_once(after: Callable[..., str]) -> None:
    assert after(lambda m, u, x: ((u + x) + u.relu()).tanh()).splitlines() == [
        "relu = relu(u)",
        "add_tensor = add(u, relu)",
        "add_tensor_1 = add(add_tensor, x)",
        "tanh = tanh(add_tensor_1)",
        "return [tanh]",
    ]


def test_a_pointwise_op_goes_block_by_block(after: Callable[..., str]) -> None:
    assert after(lambda m, u, x: torch.cat([u, x], 1).relu()).splitlines() == [
        "relu_default = relu(u)",
        "relu_default_1 = relu(x)",
        "cat_default = cat([relu_default, relu_default_1], 1)",
        "return [cat_default]",
    ]


LEFT_ALONE = {
    "one side": lambda m, u, x: F.linear(torch.cat([u[:, :2], u[:, 2:]], 1), m.w) * x,
    "cat along the batch": lambda m, u, x: F.linear(torch.cat([u, x], 0), m.w),
    "integers": lambda m, u, x: (u.long() + x.long()) + u.long(),
    "softmax": lambda m, u, x: torch.cat([u, x], 1).softmax(1),
}


@pytest.mark.parametrize("name", sorted(LEFT_ALONE))
def test_left_alone(captured: Function, same: Function, printed: Callable[..., str], name: str) -> None:
    trace, before, graph, _ = split_of(captured, LEFT_ALONE[name])
    same(trace, before, graph)
    calls = [sorted(str(n.target) for n in g.nodes if n.op == "call_function") for g in (before, graph)]
    assert calls[0] == calls[1]


EQUAL = {
    "pairs": lambda m, u, x: (t := torch.stack([u, x, u * x], 1)) @ t.transpose(1, 2),
    "square": lambda m, u, x: torch.stack([u, x], 1).sum(1) ** 2 - (torch.stack([u, x], 1) ** 2).sum(1),
    "norm": lambda m, u, x: wide(m, *F.layer_norm(torch.cat([u, x], 1), (8,)).chunk(2, 1)),
    "expand": lambda m, u, x: F.linear(x.unsqueeze(1).expand(-1, 3, -1), m.w) * u.unsqueeze(1),
    "attention": lambda m, u, x: F.scaled_dot_product_attention(
        t := torch.stack([u, u * 2, x], 1), t, t, is_causal=True
    ),
    "views": lambda m, u, x: torch.cat([u, x], 1).view(-1, 2, 2, 2).transpose(1, 2).flatten(2) @ m.w,
    "a batch that is matched": lambda m, u, x: F.linear(torch.cat([u, x], 1), torch.cat([x, x], 1)).softmax(1),
    "rows in another order": lambda m, u, x: F.linear((u + x).flip(0), m.w),
    "statistics of the batch": lambda m, u, x: wide(m, u - u.mean(0), x),
    "written in place": lambda m, u, x: wide(m, torch.cat([u, x], 1).add_(1).mul_(2)[:, :4], x),
    "picks": lambda m, u, x: torch.cat([u, x], 1)[:, [0, -1, 3, 3]] @ m.w,
    "narrow": lambda m, u, x: torch.narrow(torch.cat([u, x], 1), 1, -6, 4) @ m.w,
    "unbound": lambda m, u, x: torch.stack(torch.cat([u, x], 1).unbind(1)[2:6], 1) @ m.w,
    "two results": lambda m, u, x: torch.ops.aten.log_sigmoid_forward(u[:, :1].expand(-1, 4))[0] * x,
    "sums of cut parts": lambda m, u, x: torch.cat([torch.stack([u, x], 1), torch.stack([x, u * 2], 1)], 2).sum(2),
    "the largest of cut parts": lambda m, u, x: torch.cat([torch.stack([u, x], 1), torch.stack([x, u * 2], 1)], 2).amax(
        2
    ),
    "nothing picked": lambda m, u, x: torch.cat(torch.cat([u, x], 1).split([0, 5, 0, 3], 1)[:2], 1).sum(
        1, keepdim=True
    ),
    "nothing but nothing": lambda m, u, x: torch.cat([u, x], 1)[:, []].sum(1),
    "picked by 32 bit": lambda m, u, x: (
        torch.cat([u, x], 1).index_select(1, torch.tensor([7, 0, 0, 5], dtype=torch.int32)) @ m.w
    ),
    "rows and places in one dim": lambda m, u, x: (
        F.layer_norm(F.linear(torch.stack([u, x, u * x], 1).reshape(-1, 4) * m.w[0], m.w).relu() + m.w[:1], (4,))
        .softmax(-1)
        .view(-1, 3, 4)
        .sum(1)
    ),
    "entries side by side": lambda m, u, x: F.linear(
        torch.cat([*(u * x).view(-1, 2, 2).split(1, 1), u.unsqueeze(1), x.view(-1, 2, 2)[:, 1:]], 2),
        torch.cat([m.w, m.w, m.w[:, :2]], 1),
    ),
    "two in one dim": lambda m, u, x: (
        (torch.stack([u, x], 1).flatten(0, 1) - torch.stack([x, u], 1).view(-1, 4)).mean(1).view(-1, 2)
    ),
    "in one dim with a tensor": lambda m, u, x: (
        (torch.stack([u, x], 1).flatten(0, 1) + (u * x).view(-1, 2).repeat(1, 2)).view(-1, 2, 4).select(1, 1)
    ),
    "rows compared in one dim": lambda m, u, x: torch.stack([u, x], 1).view(-1, 4).softmax(0).view(-1, 2, 4),
    "rows shifted in one dim": lambda m, u, x: torch.stack([u, x], 1).view(-1, 4)[1:].sum(0, keepdim=True) * u,
    "other places in one dim": lambda m, u, x: torch.stack([u, x], 1).view(-1, 4).exp().view(-1, 4, 2) @ m.w[:2],
    "copies side by side": lambda m, u, x: (x.repeat(1, 3).view(-1, 3, 4) * u.unsqueeze(1)) @ m.w,
    "copies in another order": lambda m, u, x: (x.repeat(1, 3).view(-1, 4, 3) * u.unsqueeze(2)).sum(1),
    "copies of copies": lambda m, u, x: (x.unsqueeze(1).repeat(1, 2, 2).view(-1, 4, 4) * u.unsqueeze(1)) @ m.w,
    "an expand in one dim": lambda m, u, x: F.linear(
        torch.cat([x.unsqueeze(1).expand(-1, 3, -1), torch.stack([u, u + 1, u * 2], 1)], 2).view(-1, 8),
        torch.cat([m.w, m.w], 1),
    ).view(-1, 3, 4),
    "reduced to nothing": lambda m, u, x: (torch.cat([u, x], 1) @ torch.cat([m.w, m.w])).sum(),
}


@pytest.mark.parametrize("name", sorted(EQUAL))
def test_equal_on_any_batch(captured: Function, same: Function, name: str) -> None:
    trace, before, graph, _ = split_of(captured, EQUAL[name])
    same(trace, before, graph)


def test_never_leaves_the_graph(captured: Function) -> None:
    _, before, graph, found = split_of(captured, lambda m, u, x: wide(m, u, x), mode="never")
    assert graph is before
    assert not found.candidates


@pytest.mark.parametrize("fanout", [1.0, 1000.0])
def test_the_price_decides(captured: Function, same: Function, fanout: float) -> None:
    """At fan-out 1 nothing is gained; a wide product pays at a high one."""

    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        h = torch.cat([*((u * i).sin() for i in range(32)), x], 1)
        return F.linear(h, torch.cat([m.w] * 33, 1).repeat(64, 1))

    trace, before, graph, found = split_of(captured, model, mode="priced", fanout=fanout)
    same(trace, before, graph)
    assert [c.taken for c in found.candidates] == [fanout > 1]
    assert all(c.gain > 1 for c in found.candidates if c.taken)


def test_a_size_of_a_value_does_not_carry_it_out(
    captured: Function, same: Function, printed: Callable[..., str]
) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return wide(m, x.tanh(), u.tanh()), torch.ones(x.shape[0], 2)

    trace, inputs = captured(model)
    normalize(trace)
    size, *_ = trace.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    joined, *_ = trace.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    size.args = (joined, 0)
    joined.append(size)
    annotate(trace, inputs, trace.model, Policy())
    before = trace.graph
    split(trace, 16.0, "always")
    same(trace, before, trace.graph)
    assert "cat([tanh" not in printed(trace.graph)


def test_a_second_handler_is_an_error() -> None:
    split_handlers = dict(HANDLERS)
    with pytest.raises(ValueError, match=r"aten\.cat\.default has a form handler already"):
        handles("aten.cat.default")(lambda s, app: None)
    assert split_handlers == HANDLERS


def test_a_part_read_whole_twice_beside_two_picks(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        part = x[:, :2]
        return torch.cat([u, u.sin()[:, :2]], 1) * torch.cat([part, u[:, :2], part], 1)

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.amax])
def test_a_reduction_over_parts_of_one_side_that_cannot_be_joined(
    captured: Function, same: Function, reduce: Function
) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return reduce(torch.cat([x, x[:, :1].expand(-1, 4)], 1), 1)

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


def test_an_attention_over_parts_of_one_side_that_cannot_be_joined(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        wide = x[:, :1].unsqueeze(1).expand(-1, 4, -1)
        return torch.bmm(u.unsqueeze(1), torch.cat([wide, wide * 2, x.unsqueeze(2)], 2))

    def contracted(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        wide = torch.cat([x[:, :1].expand(-1, 2), x[:, 1:2].expand(-1, 2)], 1)
        return torch.bmm(wide.unsqueeze(1), torch.stack([u, u * 2], 2))

    for function in (model, contracted):
        trace, before, graph, _ = split_of(captured, function)
        same(trace, before, graph)


def test_padding_parts_does_not_take_the_traced_batch_for_a_number(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return torch.lerp(F.pad(torch.cat([u, x], 1), [1, 1]), u[:, :1], x[:, :1])

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


@pytest.mark.parametrize("name", ["rows and places in one dim", "copies side by side", "an expand in one dim"])
def test_a_view_that_is_undone_hides_nothing(captured: Function, printed: Callable[..., str], name: str) -> None:
    _, _, graph, _ = split_of(captured, EQUAL[name])
    assert "reshape" not in printed(graph)


def test_entries_of_one_tensor_side_by_side_are_not_cut_out(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([(u * x).view(-1, 2, 2), u.view(-1, 2, 2)], 1)
        return F.linear(torch.cat(both.split(1, 1), 2), torch.cat([m.w, m.w], 1))

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)
    assert not any("slice" in str(n.target) and n.meta["val"].ndim == 3 for n in graph.nodes)


@pytest.mark.parametrize("name", ["rows compared in one dim", "rows shifted in one dim"])
def test_a_view_whose_rows_meet_is_carried_out(captured: Function, printed: Callable[..., str], name: str) -> None:
    _, _, graph, _ = split_of(captured, EQUAL[name])
    assert "reshape" in printed(graph)


def test_entries_of_a_sum_whose_terms_have_fewer_dims(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return F.linear((u + x - m.m)[:, 1:3], m.w[:, :2]) + ((u - x) + m.m)[:, [2, 0]][:, :1]

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


@pytest.mark.parametrize("index", [[1], [1, 0], [0, 0, 1]])
def test_entries_of_a_sum_with_a_term_of_one_entry(captured: Function, same: Function, index: list[int]) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        two = u.unsqueeze(1) * m.w[:2]
        return F.linear((two + x.unsqueeze(1) * m.w[2:] - x.unsqueeze(1))[:, index], m.w)

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


def test_a_rule_that_asks_for_the_shape_of_the_result(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return torch.addr(torch.cat([u[:, :2], x[:, :2]], 1), u[:, 0], m.m)

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


def test_a_cut_value_times_one_that_is_expanded_beyond_it(captured: Function, same: Function) -> None:
    def model(m: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        fields = torch.cat([u[:, :2], x[:, :2]], 1).unsqueeze(2)
        return F.linear((fields * x[:, :1].expand(-1, 2).unsqueeze(1)).flatten(1), torch.cat([m.w, m.w], 1))

    trace, before, graph, _ = split_of(captured, model)
    same(trace, before, graph)


SUM_READERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "another linear map": (lambda h, w: F.linear(h, 2 * w), True),
    "a sum, through a view": (lambda h, w: (h.unsqueeze(1) * 2.0 + 1.0).sum(-1), True),
    "a product of both": (lambda h, w: h * h, False),
    "a pointwise op": (lambda h, w: h.unsqueeze(1).relu().sum(-1), False),
}


@pytest.mark.parametrize("name", sorted(SUM_READERS))
def test_a_sum_that_is_carried_out_anyway_is_mapped_as_one(captured: Function, name: str) -> None:
    """Term by term it is more work, which only a sum that is never made repays."""
    read, taken = SUM_READERS[name]

    def model(m: nn.Module, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([(u * i).sin() for i in range(32)], 1) + torch.cat([(x * i).sin() for i in range(32)], 1)
        w = torch.cat([m.w] * 32, 1)[:2]
        return F.linear(h, w).relu(), read(h, w)

    found = split_of(captured, model, mode="priced")[-1]
    assert [c.taken for c in found.candidates if c.where == "linear"] == [taken], found.candidates
