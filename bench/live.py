"""Solvers on emulated homes: what each foretold beside what was measured, in the cages of `prima bench --cluster`.

    sudo python -m bench.live MODEL.gguf [--clusters paper,four-equal] [--solvers halda,even,compute,halda-ilp]
                              [--prompt 16] [--gen 12] [--json]

The forecast is from what the nodes measured of themselves before they joined; nothing is fitted afterwards. Expected is
that of the first solver the time is within 20 % of what was foretold, and that no other is measured faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from msgspec.structs import replace

from bench.larger import Bar, Bench, say
from prima_core.cage.amounts import DISK_RATE, parse
from prima_core.cage.cluster import Cluster, Node, load_cluster
from prima_core.cage.limits import Workload
from prima_core.errors import PrimaError

CLUSTERS = "paper,four-equal"
SOLVERS = "halda,even,compute,halda-ilp"
CONTEXT = 512
DISK_SHARE = 0.9
"""Of what direct reads reach: a virtual disk is not always as fast."""


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds per token, None where there was no plan, which `error` tells about."""

    cluster: str
    solver: str
    measured_s: float | None
    foretold_s: float | None
    read_bytes: float = 0.0
    error: str = ""

    def line(self) -> str:
        if self.measured_s is None:
            return f"{self.cluster:12} {self.solver:10} {self.error}"
        ratio = f"{self.measured_s / self.foretold_s:5.2f}" if self.foretold_s else "    -"
        foretold = f"{self.foretold_s:7.3f}" if self.foretold_s else "      -"
        return (
            f"{self.cluster:12} {self.solver:10} {self.measured_s:7.3f} {foretold} {ratio} {self.read_bytes / 1e9:6.2f}"
        )


def pinned(cluster: Cluster, disk_bytes_s: float) -> Cluster:
    """The same for every solver: shares of the disk are of this rate, however fast it is when a run begins."""

    def rate(node: Node) -> str | None:
        share = None if node.disk is None else parse(node.disk, DISK_RATE).share
        return f"{share * disk_bytes_s:.0f}B/s" if share else node.disk

    return replace(cluster, nodes=tuple(replace(node, disk=rate(node)) for node in cluster.nodes))


def run(bench: Bench, cluster: Cluster, solver: str) -> Row:
    try:
        figures = bench.run(cluster, solver=solver, context=CONTEXT)
    except PrimaError as error:
        say(f"{cluster.name}, {solver}: {error}")
        return Row(cluster.name, solver, None, None, error=error.message)
    for node in figures.nodes:
        say(f"  {node.name}: told {_ms(node.told_per_token)}; foretold {node.forecast}")
    return Row(cluster.name, solver, figures.tpot_s, figures.forecast_s, figures.read_bytes_per_token)


def _ms(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name[:-2]} {1e3 * time_s:.0f} ms" for name, time_s in times.items() if name.endswith("_s"))


def bars(rows: Sequence[Row]) -> Iterator[Bar]:
    """`rows` of one cluster, the solver that is looked at first."""
    first, *others = rows
    if first.measured_s is None:
        return
    if first.foretold_s:
        off = abs(first.measured_s / first.foretold_s - 1)
        yield Bar(f"{first.cluster}: {first.solver}, how far measured is from foretold", off, 0.2, True)
    for other in others:
        if other.measured_s is not None:
            what = f"{first.cluster}: {first.solver}, times as fast as {other.solver}"
            yield Bar(what, other.measured_s / first.measured_s, 1.0, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clusters", default=CLUSTERS)
    parser.add_argument("--solvers", default=SOLVERS)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--gen", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    bench = Bench(asked.model, Workload(asked.prompt, asked.gen))
    disk_bytes_s = DISK_SHARE * min(bench.disk_rates())
    clusters = [pinned(load_cluster(name), disk_bytes_s) for name in asked.clusters.split(",")]
    rows = {cluster.name: [run(bench, cluster, solver) for solver in asked.solvers.split(",")] for cluster in clusters}
    found = [bar for of in rows.values() for bar in bars(of)]
    if asked.json:
        print(json.dumps([asdict(row) for of in rows.values() for row in of]))
    else:
        print(f"{'cluster':12} {'solver':10}  s/token foretold ratio   GB read")
        print("\n".join([*(row.line() for of in rows.values() for row in of), *(bar.line() for bar in found)]))
    failed = any(of[0].measured_s is None for of in rows.values())
    sys.exit(failed or not all(bar.holds for bar in found))


if __name__ == "__main__":
    main()
