"""bench/cpu.py: the runs, prima's and llama.cpp's in turn, so that a machine that gets slower slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cpu_figures import Memory, Result, Row
from bench.cpu_llama import LlamaBench, LlamaSetting, decode_row, prefill_row, worth_another_run
from bench.cpu_models import BenchModel
from bench.cpu_prima import PrimaRun, Reader, run_prima

N_GEN, N_GEN_SHORT, N_GEN_DEEP = 64, 16, 32
PROMPTS = (16, 128, 512)
SHORT_PROMPTS = (128,)
N_GEN_LEAST = 2
"""Of a run for its prefill."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured."""

    model: BenchModel
    path: Path
    variant: str
    threads: int

    def run(self, n_prompt: int, n_gen: int) -> PrimaRun:
        return run_prima(self.path, n_prompt, n_gen, self.threads, self.variant)


@dataclass(slots=True)
class Log:
    """What the runs gave so far."""

    subject: Subject
    prima: dict[str, list[float]] = field(default_factory=dict)
    llama: dict[LlamaSetting, dict[str, list[float]]] = field(default_factory=dict)
    reading_gb_s: list[float] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)

    def add_prima(self, n_prompt: int, n_gen: int, decode: str | None = None) -> None:
        """A run for its prefill, and for the row `decode` where that is given."""
        run = self.subject.run(n_prompt, n_gen)
        if decode is not None:
            self.prima.setdefault(decode, []).append(run.decode_tok_s)
        self.prima.setdefault(prefill_row(n_prompt), []).append(run.prefill_tok_s)
        kv_bytes = self.subject.model.kv_bytes(n_prompt + n_gen)
        self.memories.append(Memory(run.peak_rss_bytes, kv_bytes, self.subject.path.stat().st_size))

    def add_llama(self, setting: LlamaSetting, rates: dict[str, float]) -> None:
        for row, rate in rates.items():
            self.llama.setdefault(setting, {}).setdefault(row, []).append(rate)

    def result(self, reader: Reader) -> Result:
        rows = [
            Row(
                what,
                tuple(runs),
                {setting: tuple(rates[what]) for setting, rates in self.llama.items() if what in rates},
            )
            for what, runs in self.prima.items()
        ]
        worst = max(self.memories, key=lambda memory: memory.own_bytes)
        subject, reading = self.subject, tuple(self.reading_gb_s)
        return Result(subject.model, subject.variant, subject.threads, tuple(rows), reader.n_bytes, reading, worst)


def in_full(
    subject: Subject,
    n_runs: int,
    depth: int,
    llama: LlamaBench | None,
    settings: Sequence[LlamaSetting],
    say: Callable[[str], None],
) -> Result:
    """Decode, all prompts, reading and llama.cpp by turns, `n_runs` times; then decode at `depth` once, unless 0."""
    log = Log(subject)
    with Reader(subject.path, subject.threads, subject.variant) as reader:
        for number in range(1, n_runs + 1):
            _round(log, reader)
            say(f"run {number} of {n_runs}: prima " + _last(log.prima) + f", reading {log.reading_gb_s[-1]:.1f} GB/s")
            if llama is None:
                continue
            rates = {setting: llama.run(subject.path, setting, PROMPTS, N_GEN) for setting in settings}
            for setting, by_row in rates.items():
                log.add_llama(setting, by_row)
                say(f"  llama.cpp with {setting}: " + ", ".join(f"{row} {rate:.1f}" for row, rate in by_row.items()))
            settings = worth_another_run(rates) if number == 1 else settings
        if depth:
            _at_depth(log, depth, llama, settings)
        return log.result(reader)


def in_short(subject: Subject) -> Result:
    """One run of a few tokens."""
    log = Log(subject)
    with Reader(subject.path, subject.threads, subject.variant) as reader:
        log.add_prima(SHORT_PROMPTS[0], N_GEN_SHORT, decode_row(0))
        log.reading_gb_s.append(reader.gb_s())
        return log.result(reader)


def _round(log: Log, reader: Reader) -> None:
    log.add_prima(PROMPTS[0], N_GEN, decode_row(0))
    log.reading_gb_s.append(reader.gb_s())
    for n_prompt in PROMPTS[1:]:
        log.add_prima(n_prompt, N_GEN_LEAST)


def _at_depth(log: Log, depth: int, llama: LlamaBench | None, settings: Sequence[LlamaSetting]) -> None:
    """Filling the context is what takes long, so each is run once."""
    log.add_prima(depth, N_GEN_DEEP, decode_row(depth))
    if llama is not None:
        for setting in settings:
            log.add_llama(setting, llama.run(log.subject.path, setting, (), N_GEN_DEEP, depth))


def _last(runs: dict[str, list[float]]) -> str:
    return ", ".join(f"{row} {rates[-1]:.1f}" for row, rates in runs.items())
