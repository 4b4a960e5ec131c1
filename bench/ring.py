"""What a ring costs: time per token of 2 local processes against 1 process, same model, same threads per node.

    python bench/ring.py [--model FILE] [--runs 5] [--transport unix] [--nodes 2] [-t 1]

Runs alternate, so that a machine that gets slower in between slows both. Prints each run, the medians, and the
difference in milliseconds per token (goal on the built-in model: at most 1 ms).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from prima_core.config import LOCAL_TRANSPORT


def tpot_ms(model: str | None, nodes: int, transport: str, threads: int) -> float:
    command = [sys.executable, "-m", "prima_core", "bench", "--json", "--prompt", "64", "--gen", "128"]
    command += ["--nodes", str(nodes), "--transport", transport, "-t", str(threads), "--wire", "f32"]
    command += [] if model is None else [model]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output)["tpot_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--transport", default=LOCAL_TRANSPORT)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    one: list[float] = []
    ring: list[float] = []
    for run in range(args.runs):
        one.append(tpot_ms(args.model, 1, args.transport, args.threads))
        ring.append(tpot_ms(args.model, args.nodes, args.transport, args.threads))
        print(f"run {run + 1}: 1 process {one[-1]:.3f} ms/token, {args.nodes} processes {ring[-1]:.3f} ms/token")
    alone, together = statistics.median(one), statistics.median(ring)
    extra = together - alone
    print(f"median: 1 process {alone:.3f} ms/token, {args.nodes} over {args.transport} {together:.3f} ms/token")
    print(f"the ring costs {extra:.3f} ms a token more ({extra / args.nodes:.3f} ms a hop)")


if __name__ == "__main__":
    main()
