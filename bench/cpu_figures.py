"""bench/cpu.py: what follows from the runs: medians, ratios, goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.cpu_llama import LlamaSetting, decode_row, prefill_row
from bench.cpu_models import BenchModel

DECODE_GOALS = {"Q4_K_M": 2.0, "Q8_0": 1.35}
PREFILL_ROW, PREFILL_GOAL = prefill_row(512), 2.0
MEMORY, MEMORY_GOAL_BYTES = "memory", 150_000_000
"""Of prima itself, beside the model's file and its K and V."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was timed, in tokens a second of each run. llama.cpp's are empty where it was not asked for."""

    what: str
    prima: tuple[float, ...]
    llama: Mapping[LlamaSetting, tuple[float, ...]]

    @property
    def prima_tok_s(self) -> float:
        return median(self.prima)

    @property
    def better_setting(self) -> LlamaSetting | None:
        """llama.cpp's, by the median of its runs."""
        return max(self.llama, key=lambda setting: median(self.llama[setting]), default=None)

    @property
    def llama_tok_s(self) -> float | None:
        return None if self.better_setting is None else median(self.llama[self.better_setting])

    @property
    def ratio(self) -> float | None:
        return self.prima_tok_s / self.llama_tok_s if self.llama_tok_s else None


@dataclass(frozen=True, slots=True)
class Memory:
    """The peak of the run that went furthest beyond its model and its K and V."""

    peak_rss_bytes: int
    kv_bytes: int
    file_bytes: int

    @property
    def own_bytes(self) -> int:
        """What is neither the model nor K and V: the interpreter, the vocabulary, activations."""
        return self.peak_rss_bytes - self.file_bytes - self.kv_bytes


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    wanted: float
    reached: float
    is_met: bool


@dataclass(frozen=True, slots=True)
class Result:
    """A model with a variant. `bytes_per_token`: what a decode step reads of the weights; reading is that of the same
    bytes and nothing else."""

    model: BenchModel
    variant: str
    threads: int
    rows: tuple[Row, ...]
    bytes_per_token: int
    reading_gb_s_runs: tuple[float, ...]
    memory: Memory

    @property
    def title(self) -> str:
        size = self.memory.file_bytes / 1e9
        return f"{self.model.name} {self.model.shape.types}, {size:.2f} GB, {self.variant}, {self.threads} thread(s)"

    @property
    def weights_gb_s(self) -> float:
        [decode] = (row for row in self.rows if row.what == decode_row(0))
        return self.bytes_per_token * decode.prima_tok_s / 1e9

    @property
    def reading_gb_s(self) -> float:
        return median(self.reading_gb_s_runs)

    @property
    def share_of_reading(self) -> float:
        return self.weights_gb_s / self.reading_gb_s

    def goal(self, what: str) -> Goal | None:
        """The goal of a row, or of MEMORY, where there is one and what it takes was measured."""
        return next((goal for goal in self.goals() if goal.what == what), None)

    def goals(self) -> Iterator[Goal]:
        wanted = {decode_row(0): DECODE_GOALS[self.model.shape.types], PREFILL_ROW: PREFILL_GOAL}
        for row in self.rows:
            if row.what in wanted and row.ratio is not None:
                yield Goal(row.what, wanted[row.what], row.ratio, row.ratio >= wanted[row.what])
        own = self.memory.own_bytes
        yield Goal(MEMORY, MEMORY_GOAL_BYTES, own, own <= MEMORY_GOAL_BYTES)

    def facts(self) -> dict[str, Any]:
        """For JSON; each figure's unit is in its name."""
        return {
            "model": self.model.name,
            "types": self.model.shape.types,
            "variant": self.variant,
            "threads": self.threads,
            "rows": [_row_facts(row) for row in self.rows],
            "weight_bytes_per_token": self.bytes_per_token,
            "weights_gb_s": self.weights_gb_s,
            "reading_gb_s": self.reading_gb_s,
            "reading_gb_s_runs": self.reading_gb_s_runs,
            "share_of_reading": self.share_of_reading,
            "file_bytes": self.memory.file_bytes,
            "kv_bytes": self.memory.kv_bytes,
            "peak_rss_bytes": self.memory.peak_rss_bytes,
            "own_bytes": self.memory.own_bytes,
            "goals": [
                {"what": goal.what, "wanted": goal.wanted, "reached": goal.reached, "met": goal.is_met}
                for goal in self.goals()
            ],
        }


def _row_facts(row: Row) -> dict[str, Any]:
    return {
        "what": row.what,
        "prima_tok_s": row.prima_tok_s,
        "prima_tok_s_runs": row.prima,
        "llama_cpp_tok_s": row.llama_tok_s,
        "llama_cpp_setting": None if row.better_setting is None else str(row.better_setting),
        "llama_cpp_tok_s_runs": {str(setting): runs for setting, runs in row.llama.items()},
        "ratio": row.ratio,
    }
