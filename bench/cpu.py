"""Speed of models of real shapes on this machine's CPU, by itself and beside llama.cpp.

    python -m bench.cpu [--all] [--shapes 1b 8b] [--types Q4_K_M Q8_0] [--variants all] [--runs 3] [-t N]
                        [--depth 8192] [--llama-bench PATH] [--models DIR] [--json FILE]

The shapes are those of Llama-3.2-1B and Llama-3-8B; weights are random, so the files are made on the spot (0.8 to
8.5 GB), one at a time, in the user's cache folder, and removed again. With --models they are kept in DIR and used from
there the next time.

prima runs as users run it, by `prima bench` in a process of its own; weights read a second are compared with what the
same threads read of the same mapped file in the same minutes. --llama-bench, llama.cpp's program, is run in turns with
it on the same files, with and without repacked weights and flash attention; each row is compared with the better
setting. Without --all only the 1B shape and the best CPU variant are measured: two to three minutes, with llama.cpp
ten. Of several variants the first is measured in full, the others in one short run. Leave the machine idle meanwhile.

Goals: decode at least 2.0 times llama.cpp for Q4_K_M and 1.35 times for Q8_0, prefill of 512 tokens 2.0 times; peak
memory at most 150 MB above the file and K and V.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.cpu_figures import MEMORY, MEMORY_GOAL_BYTES, Goal, Result
from bench.cpu_llama import SETTINGS, LlamaBench, LlamaSetting
from bench.cpu_machine import machine
from bench.cpu_measure import Subject, in_full, in_short
from bench.cpu_models import (
    SHAPES,
    TYPES,
    BenchModel,
    Room,
    bench_model,
    cache_folder,
    model_file,
    room,
    why_not,
    why_not_repacked,
)
from prima_core.commands.table import wide_console
from prima_core.errors import PrimaError
from prima_numpy.kernels import Kernels
from prima_numpy.threads import default_threads

ERRORS = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A model that was not measured."""

    model: BenchModel
    why: str

    @property
    def title(self) -> str:
        return f"{self.model.name} {self.model.shape.types}"

    def facts(self) -> dict[str, str]:
        return {"model": self.model.name, "types": self.model.shape.types, "why": self.why}


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        run(options)
    except PrimaError as error:
        say(f"{error.message}\n  hint: {error.hint}" if error.hint else error.message)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Kernels.variants()
    parser.add_argument("--all", action="store_true", help="both shapes, every variant of this CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"{', '.join(SHAPES)}; default 1b")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, metavar="TYPES", help=", ".join(TYPES))
    parser.add_argument(
        "--variants", nargs="+", choices=["all", *here], metavar="VARIANT", help=f"all, {', '.join(here)}"
    )
    parser.add_argument("--runs", type=positive, default=3, help="of each, by turns; medians count; default 3")
    parser.add_argument("-t", "--threads", type=positive, default=default_threads())
    parser.add_argument("--depth", type=positive, default=0, metavar="N", help="decode after N tokens too, once")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's llama-bench")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the models there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (list(SHAPES) if options.all else ["1b"])
    chosen = options.variants or (["all"] if options.all else [here[0]])
    options.variants = list(here) if "all" in chosen else chosen
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(options: argparse.Namespace) -> None:
    llama = LlamaBench(options.llama_bench, options.threads) if options.llama_bench else None
    report: dict[str, Any] = {"machine": machine(), "llama_cpp": llama.build() if llama else None}
    for name, fact in report["machine"].items():
        print(f"{name:24} {fact}")
    report |= {"results": [], "left_out": []}
    with closing(results(options, llama)) as all_found:  # at once after Ctrl-C too: it removes a model
        for found in all_found:
            if isinstance(found, LeftOut):
                report["left_out"].append(found.facts())
                print(f"\n{found.title} is left out: {found.why}")
            else:
                report["results"].append(found.facts())
                wide_console().print("", table(found))
            if options.json:  # after each, lest a run that is cut off leave nothing
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def results(options: argparse.Namespace, llama: LlamaBench | None) -> Generator[Result | LeftOut]:
    folder = options.models or cache_folder()
    for key in options.shapes:
        for types in options.types:
            yield from measured(bench_model(key, types), folder, options, llama)


def measured(
    model: BenchModel, folder: Path, options: argparse.Namespace, llama: LlamaBench | None
) -> Generator[Result | LeftOut]:
    """The first variant in full, the others in short; or why not."""
    there = room(folder)
    if why := why_not(model, there, (folder / model.file_name).exists()):
        yield LeftOut(model, why)
        return
    settings = usable_settings(model, there) if llama else ()
    with written(model, folder, keep=options.models is not None) as path:
        first, *others = (Subject(model, path, variant, options.threads) for variant in options.variants)
        yield in_full(first, options.runs, options.depth, llama, settings, say)
        for subject in others:
            yield in_short(subject)


@contextmanager
def written(model: BenchModel, folder: Path, keep: bool) -> Iterator[Path]:
    """The model's file; what it takes, where, and how far its writing is, are said."""
    path, ending = folder / model.file_name, "kept there" if keep else "removed afterwards"
    say(f"{model.name} {model.shape.types}: {model.tensor_bytes / 1e9:.2f} GB of random weights in {path}, {ending}")
    with ExitStack() as stack:
        with Progress(console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as progress:
            task = progress.add_task("writing", total=model.tensor_bytes)
            stack.enter_context(model_file(model, folder, keep, lambda n_bytes: progress.advance(task, n_bytes)))
        yield path


def usable_settings(model: BenchModel, there: Room) -> list[LlamaSetting]:
    """llama.cpp's settings; without repacked weights, which are said, where there is no memory for them."""
    why = why_not_repacked(model, there)
    if why:
        say(f"llama.cpp is not run with repacked weights: {why}")
    return [setting for setting in SETTINGS if not (why and setting.repack)]


# ---------------------------------------------------------------- what is shown


def table(result: Result) -> Table:
    shown = Table("", "prima", "llama.cpp", "ratio", "goal", "llama.cpp's better setting", title=result.title)
    for row in result.rows:
        llama = "" if row.llama_tok_s is None else f"{row.llama_tok_s:.1f} tok/s"
        ratio, goal = "" if row.ratio is None else f"{row.ratio:.2f}", result.goal(row.what)
        needed = "" if goal is None else f"{goal.wanted:g}: {verdict(goal)}"
        shown.add_row(row.what, f"{row.prima_tok_s:.1f} tok/s", llama, ratio, needed, str(row.better_setting or ""))
    reading = f"{result.share_of_reading:.0%} of {result.reading_gb_s:.1f} GB/s"
    shown.add_row("weights read by decode", f"{result.weights_gb_s:.1f} GB/s, {reading}")
    memory, goal = result.memory, result.goal(MEMORY)
    parts = f"{memory.file_bytes / 1e6:.0f} file + {memory.kv_bytes / 1e6:.0f} KV + {memory.own_bytes / 1e6:.0f}"
    wanted = f"+ {MEMORY_GOAL_BYTES / 1e6:.0f} MB: {verdict(goal)}" if goal else ""
    shown.add_row("peak resident memory", f"{memory.peak_rss_bytes / 1e6:.0f} MB = {parts}", "", "", wanted)
    return shown


def verdict(goal: Goal) -> str:
    return "met" if goal.is_met else "NOT met"


def say(text: str) -> None:
    """Beside the tables, which are for standard output."""
    ERRORS.print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
