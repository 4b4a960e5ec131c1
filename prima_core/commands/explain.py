"""`prima plan --explain` and `--svg`: a plan in words and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from prima_core.commands.bars import memory_bars, time_bars, time_title
from prima_core.commands.picture import svg
from prima_core.commands.setup import console as error_console
from prima_core.errors import ConfigError
from prima_core.model.visible import visible
from prima_core.plan.explain import Solve, explain
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.timeline import timeline
from prima_core.plan.words import told

MOST_COLUMNS = 100
_PATIENCE_S = 1.0


def explained(plan: Plan, problem: Problem, solve: Solve | None, guesses: tuple[str, ...] = ()) -> Plan:
    """With who was left out, and, by `solve`, what would help; a bar on standard error where finding that takes
    longer."""
    with closing(Progressing()) as progress:
        known = explain(plan, problem, solve, progress.show)
    return msgspec.structs.replace(plan, explanation=msgspec.structs.replace(known, guesses=guesses))


class Progressing:
    """A bar, after some time, where standard error is a terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._bar = Progress(
            TextColumn("trying what would help"), BarColumn(), TextColumn("{task.completed} of {task.total}"),
            console=error_console, transient=True, disable=not error_console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("")

    def show(self, done: int, of: int) -> None:
        self._bar.update(self._task, completed=done, total=of)
        if self._clock() - self._began_s > _PATIENCE_S:
            self._bar.start()

    def close(self) -> None:
        self._bar.stop()


def print_explained(plan: Plan, problem: Problem) -> None:
    """Of a plan with an explanation; bars of time where there is a forecast."""
    console = Console()
    console = Console(width=min(console.width, MOST_COLUMNS), highlight=False)
    for title, sentences in told(plan):
        console.print(Text(title, style="bold"))
        for sentence in sentences:
            console.print(Padding(Text(visible(sentence)), (0, 0, 0, 2)))
    width, is_plain = console.width, console.options.ascii_only
    if plan.forecast is not None:
        line = timeline(plan, problem)
        _print_bars(console, time_title(line), time_bars(line, width, is_plain))
    _print_bars(console, "Memory", memory_bars(plan, problem, width, is_plain))


def _print_bars(console: Console, title: str, bars: list[Text]) -> None:
    console.print(Text(title, style="bold"))
    for bar in bars:
        console.print(bar, no_wrap=True, overflow="crop")


def write_svg(file: str, plan: Plan, problem: Problem) -> None:
    """Raises PlanError where a plan cannot be foretold, ConfigError where the file cannot be written."""
    text = svg(plan, problem, timeline(plan, problem))
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the picture {file}: {error.strerror}", hint="check --svg") from error
