"""Models larger than memory, in the cages of `prima bench --cluster`: what is promised beside what was measured.

    sudo python -m bench.larger MODEL.gguf [--llama-bench PATH] [--peer-s 5.0] [--gen 16]
                                [--only one,four,rounds] [--json]

one: a node with memory for 60 % of the weights; with --llama-bench llama.cpp too, with as much memory in the same cage.
four: four nodes with 0.8 of the model together (`four-equal`); --peer-s is another system's time per token there.
rounds: four nodes whose disks do not disturb each other (`four-disks`), visited once and four times for a token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prima_core.arch.families import open_model
from prima_core.cage.bench import bench_cluster
from prima_core.cage.cage import model_files
from prima_core.cage.cluster import Cluster, Measure, Node, load_cluster
from prima_core.cage.figures import Figures
from prima_core.cage.limits import Workload
from prima_core.commands.generate import touched_bytes
from prima_core.config import SETTINGS
from prima_core.errors import PrimaError
from prima_core.memory.system import host
from prima_core.node.measure import disk_rate

MEMORY, BASE = "60% of model", "225MB"
"""Beside the weights a process needs some 150 MB, and prima leaves a group the fiftieth part of it."""
ROUNDS, N_DISK = 4, 3
CASES = ("one", "four", "rounds")
LLAMA = ("-m", "{model}", "-p", "0", "-n", "{gen}", "-r", "1", "-lm", "mmap", "--repack", "0", "--progress")


@dataclass(frozen=True, slots=True)
class Bar:
    """`is_at_most`: whether `measured` may not be more than `wanted`, or not less."""

    what: str
    measured: float
    wanted: float
    is_at_most: bool

    @property
    def holds(self) -> bool:
        return self.measured <= self.wanted if self.is_at_most else self.measured >= self.wanted

    def line(self) -> str:
        sign = "<=" if self.is_at_most else ">="
        return f"{'ok  ' if self.holds else 'MISS'} {self.measured:6.2f} {sign} {self.wanted:<4g} {self.what}"


@dataclass(frozen=True, slots=True)
class Bench:
    model: Path
    work: Workload

    def run(
        self, cluster: Cluster, when_idle: Callable[[], None] = lambda: None, **changed: Any
    ) -> Figures:  # Any: values of `config.TABLE`
        settings: Mapping[str, Any] = {name: setting.default for name, setting in SETTINGS.items()} | changed
        figures = bench_cluster(cluster, self.model, self.work, settings, say, when_idle)
        foretold = "" if figures.forecast_s is None else f", {figures.forecast_s:.3f} s were foretold"
        read = figures.read_bytes_per_token / 1e9
        say(f"{cluster.name}: {figures.tpot_s:.3f} s and {read:.3f} GB read per token{foretold}")
        return figures

    def disk_rates(self) -> list[float]:
        """Of direct reads: disks, virtual ones above all, are not always as fast."""
        return [disk_rate(model_files(self.model), 0, host()) for _ in range(N_DISK)]


def one(bench: Bench, n_bytes: int, llama_bench: str | None) -> Iterator[Bar]:
    rates: list[float] = []
    cluster = Cluster(name="one", nodes=(Node(name="a", memory=MEMORY, base=BASE),))
    figures = bench.run(cluster, lambda: rates.extend(bench.disk_rates()))
    node, disk_bytes_s = figures.nodes[0], fmean(rates)
    if node.forecast is None or figures.forecast_s is None:
        raise SystemExit("the node made no forecast")
    must_bytes = n_bytes - node.budget_bytes + node.forecast.buffer_bytes
    least_s = max(figures.read_bytes_per_token / disk_bytes_s, node.forecast.compute_s)
    say(f"direct reads: {disk_bytes_s / 1e9:.2f} GB/s; N - R + B = {must_bytes / 1e9:.3f} GB")
    yield Bar("one node: bytes per token / (N - R + B)", figures.read_bytes_per_token / must_bytes, 1.1, True)
    yield Bar("one node: time per token / reading or computing", figures.tpot_s / least_s, 1.15, True)
    yield Bar("one node: time per token / foretold", figures.tpot_s / figures.forecast_s, 1.2, True)
    if llama_bench is not None:
        other = bench.run(llama(llama_bench))
        yield Bar("one node: times as fast as llama.cpp with mmap", other.tpot_s / figures.tpot_s, 2.0, False)


def llama(program: str, memory: str = MEMORY, *options: str) -> Cluster:
    """llama.cpp's llama-bench with so much memory, and more options."""
    node = Node(name="a", memory=memory, base=BASE, command=(program, *LLAMA, *options))
    measure = Measure(begin="generation run 1/1", tokens_per_s=r"tg\d+(?: @ d\d+)? \|\s+([0-9.]+)")
    return Cluster(name="llama-cpp", nodes=(node,), measure=measure)


def four(bench: Bench, peer_s: float | None) -> Iterator[Bar]:
    figures = bench.run(load_cluster("four-equal"))
    yield from _foretold("four-equal", figures)
    if peer_s is not None:
        yield Bar(f"four-equal: times as fast as {peer_s:g} s per token", peer_s / figures.tpot_s, 3.0, False)


def rounds(bench: Bench) -> Iterator[Bar]:
    once, often = (bench.run(load_cluster("four-disks"), rounds=n) for n in (1, ROUNDS))
    yield from _foretold("four-disks, one visit", once)
    yield from _foretold(f"four-disks, {ROUNDS} visits", often)
    yield Bar(f"four-disks: {ROUNDS} visits, times as fast as one", once.tpot_s / often.tpot_s, 1.3, False)


def _foretold(what: str, figures: Figures) -> Iterator[Bar]:
    if figures.forecast_s is None:
        raise SystemExit(f"{what}: no forecast was made")
    yield Bar(f"{what}: time per token / foretold", figures.tpot_s / figures.forecast_s, 1.2, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench")
    parser.add_argument("--peer-s", type=float)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--gen", type=int, default=16)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with open_model(asked.model) as model:  # not while it is measured: its files have to get out of the page cache
        n_bytes = touched_bytes(model)
    del model
    bench, cases = Bench(asked.model, Workload(asked.prompt, asked.gen)), asked.only.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--only {unknown.pop()}: there are {', '.join(CASES)}")
    ways = {
        "one": lambda: one(bench, n_bytes, asked.llama_bench),
        "four": lambda: four(bench, asked.peer_s),
        "rounds": lambda: rounds(bench),
    }
    try:
        bars = [bar for case in cases for bar in ways[case]()]
    except PrimaError as error:
        raise SystemExit(f"{error}") from error
    if asked.json:
        print(json.dumps([{**asdict(bar), "holds": bar.holds} for bar in bars]))
    else:
        print("\n".join(bar.line() for bar in bars))
    sys.exit(not all(bar.holds for bar in bars))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
