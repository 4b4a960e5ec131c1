"""A plan as an SVG file of its own: what each node does in a pass, and what lies in its memory.

Text is in a font of even width, so that what fits here fits wherever it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from prima_core.commands.bars import short_name, time_title
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Span
from prima_core.plan.timeline import Lane, Timeline, memory_parts
from prima_core.plan.words import duration, headline, size

WIDTH = 960
_LEFT, _RIGHT = 150, 800
"""Where bars begin and end; names stand before, numbers behind."""
_LANE, _BAR, _DISK = 36, 18, 6
_MEMORY_ROW = 28
_MOST_TITLE = 40
_SAYS = {
    "compute": ("#3b8f4a", "computes"),
    "stall": ("#d64541", "waits for its disk"),
    "link": ("#3f6fb5", "waits for a link"),
    "read": ("#e0a526", "reads in the background"),
}
_HOLDS = {
    "weights": ("#3b8f4a", "weights"),
    "buffer": ("#e0a526", "buffer for what is read"),
    "KV": ("#8e5bb5", "KV"),
}


def svg(plan: Plan, problem: Problem, line: Timeline) -> str:
    """Of a completed plan with its forecast and explanation, and its timeline."""
    n_nodes = len(line.lanes)
    lanes_y = 106
    axis_y = lanes_y + n_nodes * _LANE
    memory_y = axis_y + 84
    height = memory_y + 40 + n_nodes * _MEMORY_ROW
    root = Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=f"{WIDTH}")
    root.set("font-family", "monospace")
    root.set("font-size", "12")
    _box(root, 0, 0, WIDTH, height, "#ffffff")
    _text(root, 16, 30, f"{short_name(problem.model.name, _MOST_TITLE)}: {headline(plan)}", points=18)
    _text(root, 16, 54, time_title(line))
    _legend(root, 80, _SAYS.values())
    _axis(root, lanes_y, axis_y, line.pass_s)
    for index, lane in enumerate(line.lanes):
        _lane(root, lanes_y + index * _LANE, lane, line.pass_s)
    _text(root, 16, memory_y - 24, "What lies in memory", points=18)
    _legend(root, memory_y + 4, _HOLDS.values())
    _memory(root, memory_y + 28, plan, problem)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


# ---------------------------------------------------------------- time


def _lane(root: Element, y: float, lane: Lane, pass_s: float) -> None:
    _text(root, 16, y + 14, short_name(lane.node))
    _box(root, _LEFT, y, _RIGHT - _LEFT, _BAR, "#eeeeee")
    for span in lane.work:
        _span(root, y, _BAR, span, pass_s)
    for span in lane.reading:
        _span(root, y + _BAR + 1, _DISK, span, pass_s)
    computing_s = sum(span.stop_s - span.start_s for span in lane.work if span.kind == "compute")
    _text(root, _RIGHT + 8, y + 14, f"computes {duration(computing_s)}")


def _span(root: Element, y: float, height: float, span: Span, pass_s: float) -> None:
    start, stop = (_LEFT + (_RIGHT - _LEFT) * min(1.0, time_s / pass_s) for time_s in (span.start_s, span.stop_s))
    colour, says = _SAYS[span.kind]
    box = _box(root, start, y, stop - start, height, colour)
    title = f"{short_name(span.node)} {says}: {duration(span.start_s)} to {duration(span.stop_s)}"
    SubElement(box, "title").text = title


def _axis(root: Element, top: float, bottom: float, pass_s: float) -> None:
    step_s = _step(pass_s)
    for number in range(int(pass_s / step_s) + 1):
        x = _LEFT + (_RIGHT - _LEFT) * number * step_s / pass_s
        _box(root, x, top - 4, 1, bottom - top + 6, "#bbbbbb")
        _text(root, x, bottom + 18, duration(number * step_s), anchor="middle")


def _step(pass_s: float) -> float:
    """1, 2 or 5 of something, so that there are about five."""
    power = 10.0 ** math.floor(math.log10(pass_s / 4))
    return max(power * factor for factor in (1, 2, 5) if power * factor <= pass_s / 4)


# ---------------------------------------------------------------- memory


def _memory(root: Element, top: float, plan: Plan, problem: Problem) -> None:
    """As long as what a node may use, on all its devices."""
    rooms = {name: problem.node(name).room_bytes for name in plan.nodes}
    largest = max(1, *rooms.values())
    for index, (name, room) in enumerate(rooms.items()):
        y, x, parts = top + index * _MEMORY_ROW, float(_LEFT), memory_parts(plan, name)
        _text(root, 16, y + 14, short_name(name))
        _box(root, x, y, (_RIGHT - _LEFT) * room / largest, _BAR, "#eeeeee")
        for kind, n_bytes in parts.items():
            width = (_RIGHT - _LEFT) * n_bytes / largest
            SubElement(_box(root, x, y, width, _BAR, _HOLDS[kind][0]), "title").text = f"{kind} {size(n_bytes)}"
            x += width
        _text(root, _RIGHT + 8, y + 14, f"{size(sum(parts.values()))} of {size(room)}")


# ---------------------------------------------------------------- shapes


def _legend(root: Element, y: float, entries: Iterable[tuple[str, str]]) -> None:
    x = 16.0
    for colour, says in entries:
        _box(root, x, y - 10, 12, 12, colour)
        _text(root, x + 18, y, says)
        x += 18 + 7.5 * len(says) + 24


def _box(root: Element, x: float, y: float, width: float, height: float, colour: str) -> Element:
    figures = {"x": x, "y": y, "width": width, "height": height}
    return SubElement(root, "rect", {name: f"{value:.2f}" for name, value in figures.items()}, fill=colour)


def _text(root: Element, x: float, y: float, text: str, points: int = 12, anchor: str = "start") -> None:
    where = {"x": f"{x:.2f}", "y": f"{y:.2f}", "font-size": f"{points}", "text-anchor": anchor}
    SubElement(root, "text", where, fill="#222222").text = text
