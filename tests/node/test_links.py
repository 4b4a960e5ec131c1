"""The head has its nodes measure their links, and waits for none that does not answer."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from prima_core.errors import LinkBroken
from prima_core.model.weights import Model
from prima_core.node import links
from prima_core.node.links import End, LinkFinder, Watch
from prima_core.plan.problem import LinkFacts
from prima_core.ring import control, probes
from prima_core.ring.probes import LinkFigures, Probes
from prima_core.testing.cluster import DEADLINE_S, until
from tests.node.cluster import Cluster, worker_process, worker_thread

HEAD = End("head", "inproc://head")
Found = tuple[LinkFacts, ...]
Start = Callable[..., Cluster]


class Nodes:
    """A head, and workers that measure a millisecond to every node that answers; `silent` ones say nothing."""

    def __init__(self, own: End = HEAD) -> None:
        self.finder = LinkFinder(own, self, self.send, 100, self.tell, Watch(self.ask, self.look))
        self.is_idle = True
        self.n_asked = 0  # whether it is idle
        self.is_doubtful = False
        self.looked: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.echoing: dict[bytes, str] = {}
        self.probed: list[tuple[str, str]] = []
        self.silent: set[str] = set()
        self.told: list[str] = []
        self.ready: queue.SimpleQueue[tuple[str, Found]] = queue.SimpleQueue()

    def tell(self, line: str) -> None:
        self.told.append(line)

    def ask(self) -> bool:
        self.n_asked += 1
        return self.is_idle

    def look(self, link: LinkFacts, before_s: float, now_s: float) -> bool:
        assert (before_s, now_s) == (0.001 + 100 / 1e8, 0.001)
        self.looked.put((link.source, link.target))
        return self.is_doubtful

    def answer(self, id: bytes, address: str) -> None:
        self.echoing[id] = HEAD.name

    def measure(self, id: bytes, address: str, n_bytes: int, is_brief: bool, within_s: float) -> LinkFigures | None:
        assert 0 < within_s <= links.PROBE_S
        target = address.removeprefix("inproc://")
        self.probed.append((HEAD.name, target))
        assert self.echoing.pop(id) == target
        return None if target in self.silent else LinkFigures(0.001, 1e8)

    def send(self, name: str, message: control.Message) -> None:
        if isinstance(message, control.Echo):
            self.echoing[message.id] = name
        elif isinstance(message, control.Probe):
            target = message.address.removeprefix("inproc://")
            self.probed.append((name, target))
            assert self.echoing.pop(message.id) == target
            assert message.n_bytes == 100
            if name not in self.silent:
                known = (True, 0.001, 1e8) if target not in self.silent else (False,)
                self.finder.probed(control.Probed(message.id, *known))

    def join(self, name: str, machine: str = "") -> None:
        self.finder.joined(End(name, f"inproc://{name}", machine), lambda found: self.ready.put((name, found)))

    def next(self) -> tuple[str, Found]:
        return self.ready.get(timeout=DEADLINE_S)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    made.finder.start()
    yield made
    made.finder.close()


def both(a: str, b: str) -> set[tuple[str, str]]:
    return {(a, b), (b, a)}


def test_each_node_that_joins_is_measured_with_all_before_it_both_ways(nodes: Nodes) -> None:
    nodes.join("b")
    nodes.join("c")
    (_, first), (_, second) = nodes.next(), nodes.next()
    assert first == (LinkFacts("head", "b", 0.001, 1e8), LinkFacts("b", "head", 0.001, 1e8))
    assert {(link.source, link.target) for link in second} == both("head", "c") | both("b", "c")
    assert nodes.probed[2:4] == [("head", "c"), ("c", "head")], "the head's own first"


def test_of_the_links_within_a_machine_one_is_measured() -> None:
    nodes = Nodes(End("head", "inproc://head", "m"))
    nodes.finder.start()
    names = [str(number) for number in range(7)]
    for name in names:
        nodes.join(name, "m")
    found = [link for _ in names for link in nodes.next()[1]]
    assert {(link.source, link.target) for link in found} == {
        (a, b) for a in ("head", *names) for b in ("head", *names) if a != b
    }
    assert {(link.latency_s, link.bytes_s) for link in found} == {(0.001, 1e8)}
    assert nodes.probed == [("head", "0")]
    nodes.join("far", "other")
    nodes.next()
    assert len(nodes.probed) == 1 + 2 * 8
    nodes.finder.close()


@pytest.mark.parametrize(
    ("machine", "address", "place"),
    [
        ("m", "unix:///tmp/s", ("m", "")),
        ("m", "inproc://x", ("m", "")),
        ("m", "tcp://10.0.0.1:7000", ("m", "10.0.0.1")),
        ("m", "tcp://[::1", None),
        ("", "unix:///tmp/s", None),
    ],
)
def test_a_place_is_an_address_of_a_machine(machine: str, address: str, place: tuple[str, str] | None) -> None:
    assert End("b", address, machine).place == place


def test_a_node_that_does_not_answer_joins_all_the_same(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "PROBE_S", 0.05)
    nodes.silent.add("b")
    nodes.join("b")
    assert nodes.next() == ("b", ())
    assert nodes.told == ["the links between b and head could not all be measured"]
    nodes.join("c")
    _, found = nodes.next()
    assert {(link.source, link.target) for link in found} == both("head", "c")


def test_an_address_that_can_never_work_hinders_nobody_else(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(id: bytes, address: str) -> None:
        nodes.echoing[id] = HEAD.name
        if address == "nonsense":
            raise LinkBroken(f"{address} is no address")

    monkeypatch.setattr(nodes, "answer", answer)
    monkeypatch.setattr(nodes, "measure", lambda id, address, n_bytes, is_brief, within_s: None)
    nodes.finder.joined(End("b", "nonsense"), lambda found: nodes.ready.put(("b", found)))
    assert nodes.next() == ("b", ())
    nodes.finder.lost("b")
    nodes.join("c")
    assert [link.source for link in nodes.next()[1]] == ["c"]


def test_a_join_takes_so_long_and_no_longer(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "c"):
        nodes.join(name)
        nodes.next()
    monkeypatch.setattr(links, "JOIN_S", 0.0)
    nodes.probed.clear()
    nodes.join("d")
    assert nodes.next() == ("d", ())
    assert nodes.probed == []


def test_a_node_that_is_lost_before_it_was_measured_was_never_there(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.silent.add("b")
    nodes.join("b")
    until("b is asked", lambda: ("b", "head") in nodes.probed)
    assert not nodes.finder.lost("b")
    nodes.join("c")
    name, found = nodes.next()
    assert (name, {(link.source, link.target) for link in found}) == ("c", both("head", "c"))
    assert nodes.finder.lost("c")
    assert not nodes.finder.lost("c")


def test_the_end_does_not_wait_for_an_answer(nodes: Nodes) -> None:
    nodes.silent.add("b")
    nodes.join("b")
    until("b is asked", lambda: ("b", "head") in nodes.probed)
    nodes.finder.close()
    assert nodes.ready.empty()


def test_links_are_looked_at_again_in_turn(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.join("b")
    nodes.next()
    nodes.finder.joined(End("c", "inproc://c"), lambda found: monkeypatch.setattr(links, "AGAIN_S", 0.01))
    seen = [nodes.looked.get(timeout=DEADLINE_S) for _ in range(7)]
    assert set(seen[:6]) == both("head", "b") | both("head", "c") | both("b", "c")
    assert seen[6] == seen[0]
    nodes.is_doubtful = True
    while nodes.looked.get(timeout=DEADLINE_S) != nodes.looked.get(timeout=DEADLINE_S):
        pass
    nodes.is_doubtful = False
    nodes.finder.lost("c")
    until("only b is left", lambda: len(nodes.finder._known) == 2)


def test_while_requests_run_links_are_left_alone(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.is_idle = False
    nodes.finder.joined(End("b", "inproc://b"), lambda found: monkeypatch.setattr(links, "AGAIN_S", 0.001))
    until("it would look, and again", lambda: nodes.n_asked > 2)
    assert nodes.looked.empty()
    assert len(nodes.probed) == 2, "those of the join"
    nodes.is_idle = True
    nodes.looked.get(timeout=DEADLINE_S)


def test_what_nobody_asked_for_is_dropped(nodes: Nodes) -> None:
    nodes.finder.probed(control.Probed(b"x" * 16, True, 0.5, 1.0))
    nodes.join("b")
    assert nodes.next()[1][0].latency_s == 0.001


# ---------------------------------------------------------------- real nodes


@pytest.mark.parametrize("address", ["tls+tcp://127.0.0.1:0", "inproc://"])
def test_the_links_of_a_real_cluster_are_in_its_problem(cluster: Start, llama: Model, address: str) -> None:
    made = cluster(llama, listen=address, n_local=2)
    made.until_serving_with("head", "head.2", "head.3")
    names = ["head", "head.2", "head.3"]
    seen = {(link.source, link.target): link for link in made.head.view().links}
    assert set(seen) == {(a, b) for a in names for b in names if a != b}
    assert all(link.latency_s < 1 and link.bytes_s > 1e6 for link in seen.values())


def test_a_head_that_measures_a_link_can_be_closed(
    cluster: Start, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((probes, "CONNECT_S"), (probes, "LOST_AFTER_S"), (links, "JOIN_S"), (links, "PROBE_S")):
        monkeypatch.setattr(module, name, 10 * DEADLINE_S)
    monkeypatch.setattr(Probes, "answer", lambda probes, id, address: None)
    made = cluster(llama, listen="inproc://", n_local=1)
    until("it measures", lambda: bool(made.head.node.probes._awaited))
    made.head.close()


def test_a_node_that_joins_while_others_serve_is_measured_too(cluster: Start, llama: Model) -> None:
    made = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    with worker_process(made.address, "w1", llama.path.parent):
        made.until_serving_with("head", "w1")
        running = made.ask([1, 2, 3], 3000)
        running.take()
        with worker_thread(made.address, "w2", llama.path):
            until("w2 is there", lambda: len(made.head.view().nodes) == 3)
            assert len(made.head.view().links) == 6
            running.cancel()


def test_links_are_left_alone_until_a_model_is_served(cluster: Start, llama: Model) -> None:
    made = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    assert not made.head._is_idle()
    with worker_thread(made.address, "w1", llama.path):
        made.until_serving_with("head", "w1")
        assert made.head._is_idle()
