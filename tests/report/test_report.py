"""The report says what was done: sides, reasons, lines, costs; the three forms hold the same."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.layout import layout

SPEC = roo.FeatureSpec(request=["user"], impression=["item"])
WIDE = 64


class Model(nn.Module):
    """A heavy request tower, something that ranks the batch, and a head over both."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE + 3, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        tower = torch.relu(self.tower(user))
        ranked = user.sort(dim=0).values.sum(1)
        return self.head(torch.cat([tower, item], 1)).squeeze(1) + ranked


def rewritten(fanout: float = 16) -> roo.RequestModel:
    torch.manual_seed(0)
    return roo.rewrite(Model().eval(), (torch.randn(7, WIDE), torch.randn(7, 3)), spec=SPEC, fanout=fanout)


@pytest.fixture(scope="module")
def report() -> roo.Report:
    return rewritten().report


def test_nodes_say_where_they_ran(report: roo.Report) -> None:
    nodes = {n.name: n for n in report.nodes}
    assert (nodes["user"].depends, nodes["user"].runs) == ("request", "request")
    assert (nodes["item"].depends, nodes["item"].runs) == ("impression", "impression")
    relu = next(n for n in report.nodes if n.op == "relu")
    assert (relu.depends, relu.runs) == ("request", "request")
    assert {n.runs for n in report.nodes if n.op == "parameter"} == {"constant"}


def test_what_stays_has_a_reason_and_the_line_of_the_source(report: roo.Report) -> None:
    sort = next(n for n in report.kept if n.op.startswith("sort"))
    assert sort.runs == "impression"
    assert "batch" in sort.reason
    assert sort.where.startswith("test_report.py:")
    assert sort.code == "ranked = user.sort(dim=0).values.sum(1)"
    assert sort.code in report.text


def test_costs_are_those_of_the_ops(report: roo.Report) -> None:
    """The tower is one product of WIDE by WIDE; at fan-out 16 it costs a sixteenth for each impression."""
    tower = next(n for n in report.nodes if n.op == "linear" and n.shape == f"[B, {WIDE}] f32")
    assert tower.before.flops == 2 * WIDE * WIDE
    assert tower.after.flops == pytest.approx(2 * WIDE * WIDE / 16)
    assert report.original.flops >= 2 * WIDE * WIDE + 2 * (WIDE + 3)
    assert report.rewritten.flops < report.original.flops


def test_the_bound_is_the_formula_and_holds(report: roo.Report) -> None:
    u, i, x = report.request, report.impression, report.both
    assert report.bound == pytest.approx((u + i + x) / (u / 16 + i + x))
    assert 1 < report.hoisting <= report.bound + 1e-9
    assert report.hoisting * report.regrouping == pytest.approx(report.original.flops / report.rewritten.flops)


def test_nothing_is_saved_at_fan_out_1() -> None:
    report = rewritten(1).report
    assert report.hoisting == pytest.approx(1)
    assert report.bound == pytest.approx(1)
    assert report.rewritten.flops <= report.original.flops


def test_json_holds_what_the_report_holds(report: roo.Report) -> None:
    read = json.loads(report.to_json())
    assert read["crossing"] == [n.name for n in report.crossing]
    assert len(read["nodes"]) == len(report.nodes)
    assert read["bound"] == report.bound
    assert all(s["what"] in report.text for s in read["splits"])


def test_a_model_that_cannot_be_rewritten_says_why() -> None:
    class Branching(nn.Module):
        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return user * 2 + item if float(user.sum()) > 0 else user - item

    report = roo.rewrite(Branching(), (torch.rand(5, 3), torch.rand(5, 3)), spec=SPEC).report
    assert report.fallback
    assert report.notes
    assert report.notes[0] in str(report)
    assert report.notes[0][:20] in json.loads(report.to_json())["notes"][0]
    assert "<h1>Branching</h1>" in report.to_html()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.boxes: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.outside += [str(given[k]) for k in ("src", "href", "xlink:href") if k in given]
        self.outside += [tag] * (tag in ("link", "iframe", "img"))
        if "box" in (given.get("class") or "").split():
            self.boxes.append(str(given["data-name"]))
        self.rows += tag == "tr" and "data-runs" in given


def test_the_page_is_whole_and_needs_no_network(report: roo.Report) -> None:
    page = _Page()
    text = report.to_html()
    page.feed(text)
    assert page.outside == []
    assert not re.search(r"url\(|@import|https?://", text)
    drawn = [n.name for n in report.nodes if n.runs != "constant" and n.op != "parameter"]
    assert sorted(page.boxes) == sorted(drawn)
    assert page.rows == sum(n.op != "parameter" for n in report.nodes)


def test_names_cannot_break_out_of_the_page() -> None:
    report = roo.Report("<script>alert(1)</script>", "eval", 1.0, True, ("<b>note</b>",))
    assert "<script>alert" not in report.to_html()
    assert "<b>note" not in report.to_html()


def test_a_drawing_has_no_overlaps_and_reads_downwards() -> None:
    reads = {"a": [], "b": [], "c": ["a", "b"], "d": ["a"], "e": ["c", "d", "a"], "f": ["e", "e"], "lone": []}
    drawn = layout(reads, width=10, height=5, gap=2)
    for node, sources in reads.items():
        assert all(drawn.centres[s][1] < drawn.centres[node][1] for s in sources)
    by_layer: dict[float, list[float]] = {}
    for x, y in drawn.centres.values():
        by_layer.setdefault(y, []).append(x)
        assert 5 <= x <= drawn.width - 5 + 1e-9
    for xs in by_layer.values():
        assert all(b - a >= 12 - 1e-9 for a, b in zip(sorted(xs), sorted(xs)[1:]))
    assert drawn.edges["a", "e"][0] == drawn.centres["a"]
    assert drawn.edges["a", "e"][-1] == drawn.centres["e"]


def test_an_empty_graph_can_be_drawn() -> None:
    assert layout({}, 10, 5, 2).centres == {}
