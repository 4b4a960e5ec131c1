"""What is started in each node, and how a server there is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from prima_core.cage.api import Api
from prima_core.cage.bench import planned_bytes
from prima_core.cage.cage import Cell
from prima_core.cage.cluster import Node
from prima_core.cage.command import PRIMA, command_of, environment
from prima_core.cage.figures import Figures, NodeFigures, shown, to_json
from prima_core.cage.groups import Group
from prima_core.cage.limits import Limits, Place, Workload
from prima_core.config import TABLE
from prima_core.plan.forecast import NodeForecast

LIMITS = Limits(90_000_000, 60_000_000, None, 10_000, None, None, 0.0)
DEFAULTS: dict[str, Any] = {setting.name: setting.default for setting in TABLE}
WORK = Workload(20, 10)


def cell(rank: int, n_nodes: int = 2, **fields: Any) -> Cell:
    node = Node(name="ab"[rank], memory=60_000_000, **fields)
    place = Place(rank, tuple(f"10.77.0.{at + 1}" for at in range(n_nodes)))
    return Cell(node, LIMITS, place, Group("run.x", ()), Path("/run/netns/x"), (Path("/m.gguf"),))


def test_the_head_serves_and_waits_for_all() -> None:
    assert command_of(cell(0), DEFAULTS, WORK) == [
        *PRIMA, "serve", "/m.gguf", "--host", "127.0.0.1", "--port", "7746", "--listen", "10.77.0.1:7747",
        "--wait", "2", "-c", "31", "--parallel", "1", "--name", "a", "--memory", "60000000", "--threads", "0",
    ]  # fmt: skip


def test_others_join() -> None:
    settings = {**DEFAULTS, "transport": "tcp", "threads": 3}
    assert command_of(cell(1, options=("-x",)), settings, WORK) == [
        *PRIMA, "join", "tcp://10.77.0.1:7747", "--model", "/m.gguf", "--name", "b", "--memory", "60000000",
        "--threads", "3", "-x",
    ]  # fmt: skip


def test_one_node_listens_for_nobody() -> None:
    assert "--listen" not in command_of(cell(0, 1), DEFAULTS, WORK)


def test_what_the_user_set_is_passed_on() -> None:
    settings = {**DEFAULTS, "context": 99, "solver": "mine", "plan": "p.json", "backend": "numpy", "chunk": 8}
    head = " ".join(command_of(cell(0), settings, WORK))
    assert all(part in head for part in ("-c 99", "--solver mine", "--plan p.json", "--backend numpy", "--chunk 8"))
    other = " ".join(command_of(cell(1, threads=5), settings, WORK))
    assert "--backend numpy" in other
    assert "--threads 5" in other
    assert "--solver" not in other


def test_a_command_of_ones_own_takes_its_place() -> None:
    assert command_of(cell(1, command=("run", "{model}", "{rank}")), DEFAULTS, WORK) == ["run", "/m.gguf", "1"]


def test_settings_in_the_environment_do_not_reach_nodes_twice() -> None:
    given = {"PATH": "/bin", "PRIMA_NODES": "3", "PRIMA_TOKEN": "old", "PRIMA_CPU": "avx2"}
    own = {"PRIMA_TOKEN": "new", "XDG_CACHE_HOME": "/run/cache"}
    assert environment(given, "new", Path("/run/cache")) == {"PATH": "/bin", "PRIMA_CPU": "avx2", **own}


# ---------------------------------------------------------------- figures


FIGURES = Figures(
    cluster="two", model="m.gguf", model_bytes=5_000_000_000, disk_bytes_s=1.5e9, n_prompt=16, n_tokens=8, ttft_s=2.0,
    tpot_s=0.5, prefill_read_bytes=3_000_000_000,
    nodes=tuple(
        NodeFigures(
            name=name, limit_bytes=900_000_000, budget_bytes=600_000_000, read_bytes_per_token=250e6,
            peak_bytes=800_000_000, rss_bytes=700_000_000, pressure=0.25, planned_bytes=600_000_000,
            pressure_beyond_plan=0.03125, told_per_token=told,
        )
        for name, told in (("a", {"compute_s": 0.125, "stall_s": 0.0625, "n_tokens": 1.0}), ("b", {}))
    ),
)  # fmt: skip


def test_the_json_has_all_figures_and_their_sum() -> None:
    assert b'"read_bytes_per_token":500000000.0' in to_json(FIGURES)
    assert b'"told_per_token":{"compute_s":0.125' in to_json(FIGURES)


def test_the_table_shows_what_nodes_told_of_their_time() -> None:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200).print(shown(FIGURES))
    text = out.getvalue()
    assert "500.0 ms per token (2 tokens/s, over 8), 0.500 GB read per token" in text
    assert "first token after 2.000 s (16 tokens of prompt, 3.00 GB read)" in text
    assert "disk: 1.50 GB/s" in text
    assert all(part in text for part in ("compute/token", "125.00 ms", "stall/token", "62.50 ms", "25.0%", "3.1%"))
    assert "n_tokens/token" not in text


def test_the_table_shows_what_was_foretold_beside_it() -> None:
    from io import StringIO

    from rich.console import Console

    told = NodeForecast("a", 0.1, 0.05, 0.0, 240_000_000, 0, 0, 0)
    first, second = FIGURES.nodes
    foretold = replace(FIGURES, forecast_s=0.4, nodes=(replace(first, forecast=told), second))
    out = StringIO()
    Console(file=out, width=250).print(shown(foretold))
    assert "foretold: 400.0 ms per token, 1.25 times that were measured" in out.getvalue()
    assert "240.0 MB, 100.00 ms compute, 50.00 ms stall" in out.getvalue()
    assert b'"forecast":{"node":"a"' in to_json(foretold)


def test_what_a_plan_takes_of_memory_is_what_stays_and_what_is_read_through() -> None:
    view = {
        "devices": [{"streamed_bytes": 300}, {}],
        "weight_bytes": 1000,
        "kv_bytes": 50,
        "times": {"buffer_bytes": 20},
    }
    assert planned_bytes(view) == 770
    assert planned_bytes(None) is None


def test_a_server_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    assert not Api(tmp_path / "no such namespace", "http://127.0.0.1:1/v1").is_ready()


@pytest.mark.usefixtures("host")
def test_asking_in_another_network_leaves_this_thread_in_its_own(model: Path) -> None:
    from tests.cage.conftest import cage_of

    own = Path("/proc/thread-self/ns/net").readlink()
    with cage_of('[[nodes]]\nname = "a"\nmemory = "96MB"', model) as cage:
        assert not Api(cage.cells[0].namespace, "http://127.0.0.1:1/v1").is_ready()
        assert Path("/proc/thread-self/ns/net").readlink() == own
