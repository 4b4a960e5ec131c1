"""bench/paper.py: every figure that it starts from, with where it is from, and what was published to compare with.

"paper" is arXiv 2504.08791 (v2) and the README of its implementation. A source that begins with "assumption" is one.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Fact:
    value: float
    unit: str
    source: str

    @property
    def is_assumed(self) -> bool:
        return self.source.startswith("assumption")


_PAPER = "paper, its table of devices"
_CORES = "assumption: of the machine that the paper's name and number of cores fit:"

FACTS: dict[str, Fact] = {
    "D1 RAM": Fact(2.4 * GIB, "bytes", f"{_PAPER} (available)"),
    "D2 RAM": Fact(4.1 * GIB, "bytes", f"{_PAPER} (available)"),
    "D3 RAM": Fact(9.7 * GIB, "bytes", f"{_PAPER} (available)"),
    "D4 RAM": Fact(1.9 * GIB, "bytes", f"{_PAPER} (available)"),
    "D5 RAM": Fact(5.1 * GIB, "bytes", f"{_PAPER} (available)"),
    "D6 RAM": Fact(6.8 * GIB, "bytes", f"{_PAPER} (available)"),
    "D2 VRAM": Fact(8 * GIB, "bytes", f"{_PAPER} (available, RTX 3070); all of it for weights and KV"),
    "D3 VRAM": Fact(11 * GIB, "bytes", f"{_PAPER} (available, RTX 2080 Ti); all of it for weights and KV"),
    "D1 disk": Fact(0.72e9, "bytes/s", f"{_PAPER} (random reads, as macOS does)"),
    "D2 disk": Fact(2.98e9, "bytes/s", f"{_PAPER} (sequential)"),
    "D3 disk": Fact(3.17e9, "bytes/s", f"{_PAPER} (sequential)"),
    "D4 disk": Fact(1.37e9, "bytes/s", f"{_PAPER} (sequential)"),
    "D5 disk": Fact(2.0e9, "bytes/s", f"{_PAPER}"),
    "D6 disk": Fact(0.4e9, "bytes/s", f"{_PAPER}"),
    "D1 memory bandwidth": Fact(68.3e9, "bytes/s", "Apple M1: 128 bits of LPDDR4X-4266"),
    "D2 memory bandwidth": Fact(51.2e9, "bytes/s", f"{_CORES} i9, 8 cores, 2 channels of DDR4-3200"),
    "D3 memory bandwidth": Fact(76.8e9, "bytes/s", f"{_CORES} i9, 16 cores, 2 channels of DDR5-4800"),
    "D4 memory bandwidth": Fact(44e9, "bytes/s", f"{_CORES} Kirin 9000, 64 bits of LPDDR5-5500"),
    "D5 memory bandwidth": Fact(
        51.2e9, "bytes/s", f"{_CORES} a tablet whose flash reads 2 GB/s, 64 bits of LPDDR5-6400"
    ),
    "D6 memory bandwidth": Fact(59.7e9, "bytes/s", f"{_CORES} i5, 4 cores, 128 bits of LPDDR4X-3733"),
    "D2 GPU bandwidth": Fact(448e9, "bytes/s", "RTX 3070: 256 bits of GDDR6 at 14 Gbit/s"),
    "D3 GPU bandwidth": Fact(616e9, "bytes/s", "RTX 2080 Ti: 352 bits of GDDR6 at 14 Gbit/s"),
    "decode share": Fact(
        0.7,
        "of the bandwidth",
        "assumption: GPUs and cooled CPUs; llama.cpp's 8B Q4_K_M has 0.74 on an RTX 2080 (71.9 tok/s, 448 GB/s; llmfit"
        " pull request 773) and 0.68 on an RTX 3080 (112 tok/s, 760 GB/s; LLM-inference-speed-benchmarks issue 12)",
    ),
    "decode share of ARM": Fact(0.4, "of the bandwidth", "assumption: phones and tablets, a few large cores, no fan"),
    "decode share of D6": Fact(0.2, "of the bandwidth", "assumption: an i5 of 10 W is held up by its cores"),
    "D3 GPU prefill": Fact(
        11.8e12,
        "bytes x tokens/s",
        "llama.cpp, 13B Q4_K_M (7.87 GB): 1494 tok/s on an RTX 2080 Ti (ai-benchmarks issue 46)",
    ),
    "D2 GPU prefill": Fact(8.0e12, "bytes x tokens/s", "assumption: the 2080 Ti's by cores of matrices, 46 to 68"),
    "D3 CPU prefill": Fact(
        0.2e12, "bytes x tokens/s", "llama.cpp, 7B (3.8 GB): 55 tok/s on a 13900K (llama.cpp issue 34)"
    ),
    "D2 CPU prefill": Fact(0.1e12, "bytes x tokens/s", "assumption: half of D3's, with half its cores"),
    "D1 Metal prefill": Fact(0.4e12, "bytes x tokens/s", "assumption: twice that of D3's CPU"),
    "prefill without a fan": Fact(0.05e12, "bytes x tokens/s", "assumption: a quarter of D3's CPU; D1's CPU too"),
    "link latency": Fact(5e-3, "s", "paper: Wi-Fi, 3 to 7 ms; the middle, for a message of one token"),
    "link rate": Fact(465e6 / 8, "bytes/s", "paper: Wi-Fi, 320 to 610 Mbit/s; the middle"),
    "context": Fact(1024, "tokens", "README: -c 1024; K and V in f16"),
    "prompt": Fact(8, "tokens", "assumption: README's prompt, which is a short question"),
}


def value(name: str) -> float:
    return FACTS[name].value


def integer(name: str) -> int:
    return int(FACTS[name].value)


# ---------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the Llama family. `mix`: llama.cpp's of types; `file_bytes`: what was published of its file, which the
    sizes that follow from shape and mix are checked against."""

    name: str
    n_layers: int
    d_model: int
    d_ff: int
    d_kv: int
    n_vocab: int
    mix: str
    file_bytes: float
    source: str


_70B = "70B's shape with"
SHAPES: dict[str, Shape] = {
    "8B": Shape("Llama-3-8B", 32, 4096, 14336, 1024, 128256, "Q4_K_M", 4.92e9, "its configuration; file 4.92 GB"),
    "14B": Shape(
        "Llama-3-14B", 60, 4096, 14336, 1024, 128256, "Q4_K_M", 8.58e9,
        "8B's layers, as many as its 14.1 B parameters are; file 8.58 GB (RDson, GGUF)",
    ),
    "30B": Shape(
        "Llama-1-30B", 60, 6656, 17920, 6656, 32000, "Q4_K_S", 18.44e9,
        "its configuration; file 18.44 GB (upstage-llama-30b-instruct-2048, GGUF)",
    ),
    "45B": Shape(
        "Llama-3-45B", 50, 8192, 28672, 1024, 128256, "Q4_K_S", 25.6e9,
        f"{_70B} as many layers as its 44.9 B parameters are (Drobeta-Turnu-Severin); file: between its Q4_0 (25.5 GB)"
        " and IQ4_NL (25.8 GB)",
    ),
    "60B": Shape(
        "Llama-3-60B", 68, 8192, 28672, 1024, 128256, "Q4_K_S", 34.4e9,
        f"{_70B} as many layers as its 60.3 B parameters are (nyun); file 34.4 GB",
    ),
    "65B": Shape(
        "Llama-1-65B", 80, 8192, 22016, 8192, 32000, "Q4_K_S", 36.9e9,
        "its configuration; file 36.9 GB (LLaMA-65B, GGUF)",
    ),
    "70B": Shape(
        "Llama-3-70B", 80, 8192, 28672, 1024, 128256, "Q4_K_S", 40.35e9, "its configuration; file 40.35 GB"
    ),
}  # fmt: skip


# ---------------------------------------------------------------- what was published

SYSTEMS = ("llama.cpp", "exo", "dllama", "prima.cpp, no Halda", "prima.cpp, no prefetch", "prima.cpp")
Published = float | str | None
"""Milliseconds, "OOM", or None: not run."""

TPOT_MS: dict[str, tuple[Published, ...]] = {
    "8B": (15, 263, 459, 78, 15, 15),
    "14B": (20, None, None, 131, 20, 20),
    "30B": (202, None, None, 258, 79, 72),
    "45B": (328, None, None, 409, 263, 233),
    "60B": (7965, None, None, 7053, 532, 468),
    "65B": (8807, None, None, 12253, 688, 569),
    "70B": (10120, "OOM", "OOM", 20848, 755, 674),
}
TTFT_MS: dict[str, float] = {"8B": 18, "14B": 25, "30B": 214, "45B": 440, "60B": 990, "65B": 1770, "70B": 1793}
"""Of prima.cpp."""
MEMORY_PROPORTIONAL, COMPUTE_PROPORTIONAL = 3.3, 1.6
"""How many times Halda's time these splits took with the 70B model."""
BEST_SUBSET = ("D2", "D3", "D5")
