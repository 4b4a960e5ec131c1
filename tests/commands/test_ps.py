"""`prima ps`: a running server is looked at from outside."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from prima_core.commands.ps import follow, shown
from prima_core.errors import ClusterError
from prima_core.interfaces import Layers
from prima_core.node.driver import State
from prima_core.node.view import DeviceView, LinkView, NodeView, ServerView
from prima_core.plan.forecast import Forecast
from prima_core.ring.times import NodeTimes
from tests.commands.conftest import Prima, Start

TIMES = NodeTimes(100.0, 10.0, 20.0, 1.25, 5.0, 300, 400, 5_000_000)
CPU = DeviceView("numpy:cpu", 8_000_000_000, 2_500_000_000, 3_000, (Layers(0, 5),))
HEAD = NodeView("desk", True, (CPU,), 8_000_000_000, 2_500_000_000, 3_000, (Layers(0, 5),), None, TIMES)
IMPOSSIBLE = NodeTimes(compute_s=-1.0)
VIEW = ServerView("tiny", "0.1.0", State.LOADING, "", 2048, 1, 2, 30, 8192, (HEAD,))


def text(view: ServerView, before: ServerView | None = None) -> str:
    console = Console(file=io.StringIO(), width=250)
    console.print(shown(view, before))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """The port of something that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_node_with_several_devices_has_a_line_for_each() -> None:
    gpu = DeviceView("torch:cuda:0", 24_000_000_000, 9_000_000, 1_000_000, (Layers(0, 20), Layers(30, 31)))
    idle = DeviceView("mlx:cpu", 1_000, 0, 0, ())
    node = replace(HEAD, devices=(gpu, CPU, idle), memory_bytes=32_000_000_000)
    shown = text(replace(VIEW, nodes=(node,))).splitlines()
    [first] = [number for number, line in enumerate(shown) if "desk" in line]
    lines = [[cell.strip() for cell in line.split("│")[2:5]] for line in shown[first : first + 3]]
    assert lines == [
        ["torch:cuda:0", "[0, 20), [30, 31)", "9 MB + 1 MB KV of 24 GB"],
        ["numpy:cpu", "[0, 5)", "2.5 GB + 3 kB KV of 8 GB"],
        ["mlx:cpu", "-", "0 B + 0 B KV of 1 kB"],
    ]


def test_memory_is_what_the_node_offers_of_what_its_device_sees() -> None:
    node = replace(HEAD, memory_bytes=3_000_000_000)
    assert "2.5 GB + 3 kB KV of 3 GB" in text(replace(VIEW, nodes=(node,)))


def test_what_was_foretold_is_shown_beside_what_was_measured() -> None:
    forecast = Forecast(0.25, 0.2, None, 512, 1, "computing", ())
    assert "foretold" not in text(VIEW)
    [line] = [line for line in text(replace(VIEW, forecast=forecast)).splitlines() if "foretold" in line]
    assert line.strip() == "foretold: 250.0 ms per token, most of it computing"
    assert "computing, 300.0 ms in the last answer" in text(replace(VIEW, forecast=forecast, token_s=0.3))


def test_who_does_what_is_told_in_words() -> None:
    view = replace(VIEW, summary="desk computes 5 of 5 layers (100 %). phone was left out.")
    assert "desk computes 5 of 5 layers (100 %). phone was left out." in text(view)


# ---------------------------------------------------------------- a server that is there


def test_a_running_server_is_shown(prima: Prima, start: Start, tiny: Path) -> None:
    program = start("serve", tiny, "--port", 0, "--nodes", 2, "--name", "desk")
    port = program.read_err_until("serving").rsplit("http://", 1)[1].split("/")[0].split(":")[1]
    facts = prima("ps", "--port", port, "--json").json
    assert (facts["model"], facts["state"]) == ("tiny", "serving")
    assert [node["name"] for node in facts["nodes"]] == ["desk", "desk.2"]
    assert facts["summary"] == "desk computes 3 of 6 layers (50 %); desk.2 computes 3 of 6 layers (50 %)."
    assert [node["layers"] for node in facts["nodes"]] == [[{"start": 0, "stop": 3}], [{"start": 3, "stop": 6}]]
    table = prima("ps", "--port", port)
    assert table.code == 0
    assert "desk (head)" in table.out
    assert "[3, 6)" in table.out


# ---------------------------------------------------------------- none


def test_without_a_server_that_is_told(prima: Prima) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        ended = prima("ps", "--port", port)
    assert ended.code == 1
    assert f"no server answers at http://127.0.0.1:{port}" in ended.err
    assert "prima serve" in ended.err


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"{}", "wants its API key"),
        (404, b"<html>", "no prima server"),
        (200, b"[]", "no prima server"),
        (200, msgspec.json.encode(replace(VIEW, nodes=(replace(HEAD, times=IMPOSSIBLE),))), "no prima server"),
    ],
    ids=["key", "page", "other JSON", "impossible times"],
)
def test_what_is_no_server_of_ours_is_told(prima: Prima, status: int, body: bytes, message: str) -> None:
    with answering(status, body) as port:
        ended = prima("ps", "--port", port)
    assert (ended.code, ended.out) == (1, "")
    assert message in ended.err


# ---------------------------------------------------------------- tables


def test_the_sums_are_shown() -> None:
    out = text(VIEW)
    assert "tiny: loading" in out
    assert "1 running, 2 waiting, 30 of 8,192 KV positions reserved" in out
    for figure in ("10.00 s", "20.00 s", "1.25 s", "5.00 s", "400", "5 MB", "2.5 GB + 3 kB KV of 8 GB"):
        assert f" {figure} " in out


def test_what_comes_from_disk_is_shown() -> None:
    cpu = replace(CPU, streamed_bytes=1_000_000_000)
    times = replace(TIMES, stall_s=7.5, read_bytes=12_000_000_000, streamed_bytes=1_010_000_000)
    out = text(replace(VIEW, nodes=(replace(HEAD, devices=(cpu,), times=times),)))
    for figure in ("1.5 GB + 3 kB KV of 8 GB, 1 GB from disk", "7.50 s", "12 GB"):
        assert f" {figure} " in out
    assert "left to others" not in out


def test_weights_that_were_given_up_for_other_programs_are_shown() -> None:
    out = text(replace(VIEW, nodes=(replace(HEAD, times=replace(TIMES, streamed_bytes=500_000_000)),)))
    assert " 500 MB left to others for now " in out


def test_experts_that_were_in_memory_are_shown() -> None:
    assert "experts" not in text(VIEW)
    times = replace(TIMES, expert_hits=83, expert_misses=17)
    assert " experts: 83% were in memory " in text(replace(VIEW, nodes=(replace(HEAD, times=times),)))


def test_what_is_off_of_a_node_is_shown() -> None:
    node = replace(HEAD, off=("computes a token in 30.0 ms; 20.0 ms were foretold",))
    assert " computes a token in 30.0 ms; 20.0 ms were foretold " in text(replace(VIEW, nodes=(node,)))


def test_links_are_shown_by_their_sources() -> None:
    links = (LinkView("a", "b", 0.003, 3.8e7), LinkView("a", "c", 0.0001, 1.1e8), LinkView("b", "a", 0.004, 4e7))
    assert "links" not in text(VIEW)
    lines = [line.strip() for line in text(replace(VIEW, links=links)).splitlines() if "links from" in line]
    assert lines == [
        "links from a: to b 3.00 ms, 38 MB/s; to c 0.10 ms, 110 MB/s",
        "links from b: to a 4.00 ms, 40 MB/s",
    ]


def test_what_was_done_meanwhile_is_shown_by_the_nodes_own_clock() -> None:
    now = replace(
        TIMES,
        uptime_s=102.0,
        compute_s=11.5,
        wait_s=20.1,
        n_tokens=460,
        sent_bytes=5_004_000,
        stall_s=0.5,
        read_bytes=84,
    )
    out = text(replace(VIEW, nodes=(replace(HEAD, times=now),)), VIEW)
    for figure in ("75%", "5%", "0%", "25%", "30/s", "2 kB/s", "42 B/s"):
        assert f" {figure} " in out


@pytest.mark.parametrize("now", [TIMES, NodeTimes(uptime_s=1.0)], ids=["nothing was heard", "started anew"])
def test_a_node_that_tells_nothing_new_does_nothing(now: NodeTimes) -> None:
    out = text(replace(VIEW, nodes=(replace(HEAD, times=now),)), VIEW)
    assert " 0/s " in out
    assert "-" not in out.split("desk")[1].split("\n")[0]


def test_names_are_text_and_no_markup() -> None:
    assert "[red]x (head)" in text(replace(VIEW, nodes=(replace(HEAD, name="[red]x", loaded=0.5),)))


def test_a_watch_goes_on_until_the_server_has_gone() -> None:
    views = iter([VIEW, replace(VIEW, nodes=(replace(HEAD, times=replace(TIMES, uptime_s=101.0, n_tokens=430)),))])

    def ask() -> ServerView:
        view = next(views, None)
        if view is None:
            raise ClusterError("no server answers")
        return view

    console, slept = Console(file=io.StringIO(), width=250), list[float]()
    with pytest.raises(ClusterError):
        follow(ask, console, slept.append)
    assert slept == [1.0, 1.0]
    assert isinstance(console.file, io.StringIO)
    assert " 30/s " in console.file.getvalue()


def test_the_node_with_the_output_part_is_told_if_that_is_not_the_head() -> None:
    attic = replace(HEAD, name="attic", is_head=False, has_output=True)
    assert "[0, 5) + output" in text(replace(VIEW, nodes=(replace(HEAD, layers=()), attic)))
    assert "output" not in text(replace(VIEW, nodes=(replace(HEAD, has_output=True),)))


def test_what_was_foretold_of_several_sequences_is_told_of_all_and_not_held_against_one_answer() -> None:
    forecast = Forecast(0.2, 0.2, None, 512, 4, "computing", (), tokens_s=20.0)
    shown = text(replace(VIEW, forecast=forecast, token_s=0.05))
    assert "foretold: 200.0 ms per token of each of 4 sequences, 20 tokens/s, most of it computing" in shown
    assert "in the last answer" not in shown
