"""Proof and speed of the torch backend on one NVIDIA GPU: are its kernels right, and how near do they come to the
machine's own limits?

    python bench/gpu.py [--json FILE] [--profile] [--only PART ...] [--tiny]

Needs torch, triton, numpy and this repository, nothing installed and no network; under 8 minutes. Every part runs in
processes of its own with a time limit, so that a kernel that hangs or spoils its process costs that part alone, and of
that part what it had not said yet. `compile`, which goes before `kernels` and `model`, compiles what these measure.

linear     every tensor type: products with 1 to 8 tokens and dequantised tensors against the numpy reference
attention  attention and the writing of K and V, in every KV type
ops        the other operations: norms, rope, gates, mixtures
graphs     whole tiny models: CUDA graphs against eager steps and against numpy, while sequences come and go
machine    what the GPU can do: bytes read a second, bf16 products a second
kernels    each type's matrix-vector product, as a share of reading the same bytes
model      a Llama-3-8B shape in Q4_K_M of random weights: decode as a share of reading its weights once for each step,
           prefill of 512 tokens as a share of the bf16 rate. Goals: 35 % and 25 %, better 60 % and 50 %

The exit code tells whether all results are right and all parts ran; slow is not wrong. `--profile` adds the time of
each kind of kernel in a decode step. `--tiny`: tiny shapes on the CPU in Triton's interpreter, to try the script out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (str(ROOT), str(ROOT / "backends"))
PARTS = ("linear", "attention", "ops", "graphs", "machine", "kernels", "model")
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
CHECKS_BY_S = 250
MEASURED_BY_S = {"machine": 280, "kernels": 370, "model": 470}
"""When a part is stopped, in seconds after the start of all."""

Section = Mapping[str, Any]  # from JSON: part, rows, right, seconds, error


@dataclass(frozen=True)
class Job:
    """Parts that run in one process."""

    parts: tuple[str, ...]  # "linear:Q4_K,Q6_K" for some types of a part
    by_s: float  # after the start of all, it is stopped


def main() -> int:
    options = parse()
    if options.job:
        return work(options)
    start = time.monotonic()
    sections: list[Section] = []
    for stage in stages(options):
        # Only checks run side by side; what is measured has the machine for itself.
        limits = machine(sections)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) * 3 // 4)) as pool:
            done = joined(
                chain.from_iterable(pool.map(partial(run, options=options, start=start, limits=limits), stage))
            )
        for section in done:
            show(section)
        sections += done
        if options.json:  # after each stage, lest a run that is cut off leave nothing
            Path(options.json).write_text(json.dumps({"sections": sections}, indent=1) + "\n")
    failed = [str(section["part"]) for section in sections if not section["right"]]
    print(f"\n{time.monotonic() - start:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all results right"))
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    parser.add_argument("--profile", action="store_true", help="time of each kind of kernel in a decode step")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)  # the rest is for processes of this script
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--machine", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def stages(options: argparse.Namespace) -> Iterator[Sequence[Job]]:
    """Jobs of a stage may run at once."""
    parts = options.only
    if options.tiny:  # starting torch is what takes long there, and each type takes seconds
        in_full = {"linear": ("linear:Q4_K",), "kernels": ("compile:F16", "kernels")}
        yield [Job(tuple(chain.from_iterable(in_full.get(part, (part,)) for part in parts)), 300)]
        return
    shares = [",".join(TYPES[first::8]) for first in range(8)]
    # Compiling kernels takes seconds for each: those that are measured are compiled now, side by side.
    jobs = [f"compile:{types}" for types in shares if {"kernels", "model"} & {*parts}]
    jobs += [f"linear:{types}" for types in shares if "linear" in parts]
    jobs += [part for part in ("attention", "ops", "graphs") if part in parts]
    yield [Job((job,), CHECKS_BY_S) for job in jobs]
    for part, by_s in MEASURED_BY_S.items():
        if part in parts:
            yield [Job((part,), by_s)]


def run(job: Job, options: argparse.Namespace, start: float, limits: Mapping[str, float]) -> list[Section]:
    """What the job's process found; a part that it did not come to the end of has failed, with the rows so far."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [sys.executable, __file__, "--job", *job.parts, "--result", str(result)]
        command += ["--machine", json.dumps(limits)]
        command += [f"--{name}" for name in ("tiny", "profile") if getattr(options, name)]
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if options.tiny else {})
        try:
            limit_s = max(1, job.by_s - (time.monotonic() - start))
            code = subprocess.run(command, env=environment, timeout=limit_s, check=False).returncode
            error = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            error = f"not done {job.by_s:.0f} s after the start of all"
        lines = result.read_text().splitlines() if result.exists() else []
    sections: dict[str, dict[str, Any]] = {
        part: {"part": part, "rows": [], "right": False, "seconds": 0, "error": error} for part in job.parts
    }
    for line in lines:
        part, what, value = json.loads(line)
        if what == "row":
            sections[part]["rows"].append(value)
        else:
            sections[part] |= value
    return list(sections.values())


def work(options: argparse.Namespace) -> int:
    """In a process of its own: the parts in turn, a line of JSON for each row and for each end."""
    sys.path[:0] = FOLDERS
    from bench.gpu_parts import Settings, part_said

    settings = Settings(options.tiny, options.profile, json.loads(options.machine))
    with Path(options.result).open("a") as result:
        for part in options.job:
            for what, value in part_said(part, settings):
                if what == "row":
                    settings.limits.update(machine([{"part": part, "rows": [value]}]))
                result.write(json.dumps([part, what, value]) + "\n")
                result.flush()
    return 0


def machine(sections: Iterable[Section]) -> dict[str, float]:
    """What the part `machine` measured: what the others are shares of."""
    rows = (row for section in sections if section["part"] == "machine" for row in section["rows"])
    return {row["what"]: row["best"] for row in rows if row["best"] is not None}


def joined(sections: Iterable[Section]) -> list[Section]:
    """Each part once: the types of `linear` were several jobs."""
    by_part: dict[str, dict[str, Any]] = {}
    for section in sections:
        part = section["part"].split(":")[0]
        whole = by_part.setdefault(part, {"part": part, "rows": [], "right": True, "seconds": 0.0, "error": ""})
        whole["rows"] += section["rows"]
        whole["right"] &= section["right"]
        whole["seconds"] = max(whole["seconds"], section["seconds"])
        whole["error"] = "; ".join(filter(None, (whole["error"], section["error"])))
    return list(by_part.values())


def show(section: Section) -> None:
    print(f"\n{section['part']}: {'right' if section['right'] else 'FAILED'}, {section['seconds']:.0f} s", flush=True)
    if section["error"]:
        print(f"  {section['error']}")
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in section["rows"]:
        tables.setdefault(tuple(row), []).append([shown(name, value) for name, value in row.items()])
    for names, rows in tables.items():
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        for line in (names, *rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def shown(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0%}" if name.endswith("share") else f"{value:.4g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
