"""The report as one HTML page: no network, no library."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from roo_rewrite.layout import layout
from roo_rewrite.report import NodeReport, Report

BOX, LAYER, GAP = 132.0, 56.0, 14.0


def page(report: Report) -> str:
    """The page of `report`."""
    environment = Environment(loader=PackageLoader("roo_rewrite", ""), autoescape=select_autoescape(["j2"]))
    return environment.get_template("report.html.j2").render(report=report, picture=picture(report))


def picture(report: Report) -> dict[str, Any]:
    """Boxes and curves of the graph. Parameters and what is computed from them alone are left out."""
    drawn = {n.name: n for n in report.nodes if n.runs != "constant" and n.op != "parameter"}
    placed = layout({n.name: [i for i in n.inputs if i in drawn] for n in drawn.values()}, BOX, LAYER, GAP)
    boxes = [{"node": n, "x": placed.centres[k][0], "y": placed.centres[k][1]} for k, n in drawn.items()]
    curves = [
        {"path": _curve(points), "source": a, "target": b, "crosses": _crosses(drawn[a], drawn[b])}
        for (a, b), points in placed.edges.items()
    ]
    return {"boxes": boxes, "curves": curves, "width": placed.width, "height": placed.height, "box": BOX}


def _crosses(source: NodeReport, target: NodeReport) -> bool:
    return source.crosses and target.runs == "impression"


def _curve(points: list[tuple[float, float]]) -> str:
    """An SVG path through `points`, upright at each."""
    (x, y), *rest = points
    parts = [f"M{x:.0f},{y + 15:.0f}"]
    y += 15
    for i, (to_x, to_y) in enumerate(rest):
        end = to_y - 15 if i == len(rest) - 1 else to_y
        middle = (y + end) / 2
        parts.append(f"C{x:.0f},{middle:.0f} {to_x:.0f},{middle:.0f} {to_x:.0f},{end:.0f}")
        x, y = to_x, end
    return " ".join(parts)
