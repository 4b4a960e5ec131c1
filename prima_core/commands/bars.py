"""A plan as bars of letters: what each node does in a pass, and what lies in its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from prima_core.model.visible import visible
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Span
from prima_core.plan.timeline import Lane, Timeline, memory_parts
from prima_core.plan.words import duration, size

MOST_NAME = 16
_NUMBERS = 18
"""Columns behind a bar."""


@dataclass(frozen=True, slots=True)
class _Look:
    letter: str
    ascii: str
    colour: str
    says: str


_LOOKS = {
    "compute": _Look("█", "#", "green", "computes"),
    "stall": _Look("▒", "!", "red", "waits for its disk"),
    "link": _Look("─", "-", "blue", "waits for a link"),
    "read": _Look("·", ".", "yellow", "reads meanwhile"),
    "weights": _Look("█", "#", "green", "weights"),
    "buffer": _Look("▒", "=", "yellow", "buffer for what is read"),
    "KV": _Look("░", "+", "magenta", "KV"),
    "": _Look(" ", " ", "", ""),
}


def short_name(name: str, n_columns: int = MOST_NAME) -> str:
    """As it may stand on a terminal, no wider than so many columns."""
    shown = visible(name)
    return shown if cell_len(shown) <= n_columns else set_cell_size(shown, n_columns - 1).rstrip() + "…"


class Bars:
    """Rows of the same shape: a name, a bar, a number. `ascii_only`: for terminals with no other letters."""

    def __init__(self, names: Iterable[str], width: int, ascii_only: bool) -> None:
        self._n_name = max(cell_len(short_name(name)) for name in names)
        self.n_cells = max(10, width - self._n_name - _NUMBERS - 4)
        self._ascii = ascii_only

    def row(self, name: str, kinds: Sequence[str], number: str) -> Text:
        edge = "|" if self._ascii else "│"
        text = Text(set_cell_size(short_name(name), self._n_name) + f" {edge}")
        for kind in kinds:
            text.append(self._letter(kind), style=_LOOKS[kind].colour)
        return text.append(f"{edge}{' ' * (self.n_cells - len(kinds))} {number}")

    def legend(self, kinds: Iterable[str]) -> Text:
        text = Text()
        for kind in kinds:
            text.append("  ").append(self._letter(kind), style=_LOOKS[kind].colour).append(f" {_LOOKS[kind].says}")
        return text

    def _letter(self, kind: str) -> str:
        return _LOOKS[kind].ascii if self._ascii else _LOOKS[kind].letter


# ---------------------------------------------------------------- time


def time_bars(line: Timeline, width: int, ascii_only: bool) -> list[Text]:
    """A bar for each node, with how long it computes, and a legend."""
    bars = Bars([lane.node for lane in line.lanes], width, ascii_only)
    rows = [bars.row(lane.node, _cells(lane, line.pass_s, bars.n_cells), _computing(lane)) for lane in line.lanes]
    seen = {span.kind for lane in line.lanes for span in (*lane.work, *lane.reading)}
    return [*rows, bars.legend(kind for kind in _LOOKS if kind in seen)]


def time_title(line: Timeline) -> str:
    tokens = "A token" if line.n_tokens == 1 else f"A step of {line.n_tokens} tokens"
    return f"{tokens}: {duration(line.pass_s)} from left to right"


def _computing(lane: Lane) -> str:
    return f"computes {duration(sum(span.stop_s - span.start_s for span in lane.work if span.kind == 'compute'))}"


def _cells(lane: Lane, pass_s: float, n_cells: int) -> list[str]:
    """What takes most of each cell; its work, if that takes half of it, else reading. Some computing is always seen."""
    kinds = ("compute", "stall", "link")
    works = {kind: _covered([span for span in lane.work if span.kind == kind], pass_s, n_cells) for kind in kinds}
    reads = _covered(lane.reading, pass_s, n_cells)
    cells = []
    for cell in range(n_cells):
        work = max(kinds, key=lambda kind: works[kind][cell])
        is_busy = sum(works[kind][cell] for kind in kinds) >= 0.5
        cells.append(work if is_busy else "read" if reads[cell] >= 0.5 else "")
    if "compute" not in cells and any(works["compute"]):
        cells[max(range(n_cells), key=lambda cell: works["compute"][cell])] = "compute"
    return cells


def _covered(spans: Iterable[Span], pass_s: float, n_cells: int) -> list[float]:
    """The share of each cell that spans cover."""
    covered = [0.0] * n_cells
    for span in spans:
        start, stop = (time_s / pass_s * n_cells for time_s in (span.start_s, span.stop_s))
        for cell in range(int(start), min(n_cells, int(stop) + 1)):
            covered[cell] += max(0.0, min(stop, cell + 1) - max(start, cell))
    return covered


# ---------------------------------------------------------------- memory


def memory_bars(plan: Plan, problem: Problem, width: int, ascii_only: bool) -> list[Text]:
    """A bar for each node of a completed plan, as long as the memory that it may use, on all its devices."""
    bars = Bars(plan.nodes, width, ascii_only)
    rooms = {name: problem.node(name).room_bytes for name in plan.nodes}
    largest = max(1, *rooms.values())
    parts = {name: memory_parts(plan, name) for name in plan.nodes}
    rows = [
        bars.row(
            name,
            _filled(parts[name], rooms[name], rooms[name] / largest * bars.n_cells),
            f"{size(sum(parts[name].values()))} of {size(rooms[name])}",
        )
        for name in plan.nodes
    ]
    seen = {kind for own in parts.values() for kind, n_bytes in own.items() if n_bytes}
    return [*rows, bars.legend(kind for kind in _LOOKS if kind in seen)]


def _filled(parts: dict[str, int], room_bytes: int, n_cells: float) -> list[str]:
    cells: list[str] = []
    taken = 0
    for kind, n_bytes in parts.items():
        taken += n_bytes
        cells += [kind] * (round(taken / max(1, room_bytes) * n_cells) - len(cells))
    return cells + [""] * (round(n_cells) - len(cells))
