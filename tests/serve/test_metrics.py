"""/metrics and /nodes: what monitors and `prima ps` read."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from prima_core.events import RequestDone
from prima_core.interfaces import Layers
from prima_core.node.driver import State
from prima_core.node.view import DeviceView, NodeView, RequestTotals, ServerView
from prima_core.ring.times import NodeTimes
from prima_core.serve.guard import Guard
from tests.serve.fakes import FakeService, client_of

TIMES = NodeTimes(
    100.0, 1.5, 2.5, 3.5, 4.5, 5, 6, 7, stall_s=5.5, read_bytes=8, pinned_bytes=9, streamed_bytes=10, buffer_bytes=11
)
NAME = 'a "quoted"\\ name'
LAYERS = (Layers(0, 2), Layers(3, 7))
DEVICE = DeviceView("numpy:cpu", 1000, 300, 20, LAYERS)
NODE = NodeView(NAME, True, (DEVICE,), 1000, 300, 20, LAYERS, None, TIMES)
VIEW = ServerView("m", "0.1.0", State.SERVING, "", 100, 1, 2, 30, 40, (NODE, replace(NODE, name="b")))
TOTALS = (
    RequestTotals()
    .plus(RequestDone("1", 10, 5, "stop", first_token_s=0.3, total_s=0.7, n_cached_tokens=4))
    .plus(RequestDone("2", 1, 1, "length", first_token_s=400.0, total_s=400.0))
)


class Watched(FakeService):
    totals = TOTALS

    def view(self) -> ServerView:
        return VIEW


def samples(accept: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = client_of(Watched()).get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    is_openmetrics = answer.headers["content-type"].startswith("application/openmetrics-text")
    assert is_openmetrics == ("openmetrics" in accept)
    families = (parse_openmetrics if is_openmetrics else parse)(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"], ids=["text", "openmetrics"])
@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("prima_build_info", {"version": "0.1.0", "model": "m"}, 1),
        ("prima_serving", {}, 1),
        ("prima_requests_running", {}, 1),
        ("prima_requests_waiting", {}, 2),
        ("prima_kv_tokens_used", {}, 30),
        ("prima_kv_tokens", {}, 40),
        ("prima_requests_total", {"outcome": "stop"}, 1),
        ("prima_requests_total", {"outcome": "length"}, 1),
        ("prima_prompt_tokens_total", {}, 11),
        ("prima_cached_tokens_total", {}, 4),
        ("prima_generated_tokens_total", {}, 6),
        ("prima_time_to_first_token_seconds_bucket", {"le": "0.25"}, 0),
        ("prima_time_to_first_token_seconds_bucket", {"le": "0.5"}, 1),
        ("prima_time_to_first_token_seconds_bucket", {"le": "300.0"}, 1),
        ("prima_time_to_first_token_seconds_bucket", {"le": "+Inf"}, 2),
        ("prima_time_to_first_token_seconds_sum", {}, 400.3),
        ("prima_time_per_output_token_seconds_count", {}, 1),
        ("prima_node_seconds_total", {"node": NAME, "activity": "compute"}, 1.5),
        ("prima_node_seconds_total", {"node": NAME, "activity": "wait"}, 2.5),
        ("prima_node_seconds_total", {"node": "b", "activity": "disk"}, 3.5),
        ("prima_node_seconds_total", {"node": "b", "activity": "link"}, 4.5),
        ("prima_node_uptime_seconds_total", {"node": "b"}, 100),
        ("prima_node_layers", {"node": NAME}, 6),
        ("prima_node_memory_bytes", {"node": NAME}, 1000),
        ("prima_node_steps_total", {"node": NAME}, 5),
        ("prima_node_tokens_total", {"node": NAME}, 6),
        ("prima_node_sent_bytes_total", {"node": "b"}, 7),
        ("prima_node_seconds_total", {"node": "b", "activity": "stall"}, 5.5),
        ("prima_node_read_bytes_total", {"node": "b"}, 8),
        ("prima_node_weight_bytes", {"node": "b", "kind": "pinned"}, 9),
        ("prima_node_weight_bytes", {"node": "b", "kind": "streamed"}, 10),
        ("prima_node_weight_bytes", {"node": "b", "kind": "buffer"}, 11),
    ],
)
def test_prometheus_reads(name: str, labels: dict[str, str], value: float, accept: str) -> None:
    assert samples(accept)[name, frozenset(labels.items())] == pytest.approx(value)


def test_nodes_are_told_as_json() -> None:
    answer = client_of(Watched()).get("/nodes")
    assert answer.headers["content-type"] == "application/json"
    node = answer.json()["nodes"][0]
    assert (node["name"], node["layers"], node["loaded"]) == (
        NAME,
        [{"start": 0, "stop": 2}, {"start": 3, "stop": 7}],
        None,
    )
    assert node["times"]["wait_s"] == 2.5
    assert msgspec.json.decode(answer.content, type=ServerView) == VIEW


@pytest.mark.parametrize("path", ["/metrics", "/nodes"])
def test_they_want_the_key_like_the_rest(path: str) -> None:
    client = client_of(Watched(), Guard("127.0.0.1", "s3cret"))
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain; version=1..0", ";;=,,"])
def test_a_version_that_is_none_gets_the_usual_format(accept: str) -> None:
    answer = client_of(Watched()).get("/metrics", headers={"Accept": accept})
    assert (answer.status_code, "prima_requests_running" in answer.text) == (200, True)
