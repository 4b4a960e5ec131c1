"""A head without workers: what clients and plugins see of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.engine.reasoning import Part, PartKind
from prima_core.engine.request import Event, Request
from prima_core.errors import ClusterError, ConfigError, PluginError, RequestError
from prima_core.events import NodeJoined, PlanMade, RequestDone
from prima_core.memory.disks import machine_name
from prima_core.model.chat import ChatPrompt
from prima_core.model.reasoning import ReasoningTags
from prima_core.model.weights import Model
from prima_core.node.driver import Joined, State
from prima_core.node.head import HeadOptions
from prima_core.node.member import Member
from prima_core.node.node import Node, NodeOptions
from prima_core.node.profiling import Measurer
from prima_core.node.view import own_rate
from prima_core.plan.problem import DeviceFacts
from prima_core.plan.profile import DeviceRates, Profile
from prima_core.ring.membership import PeerFacts
from prima_core.ring.times import NodeTimes
from prima_core.testing.cluster import DEADLINE_S, NODE, until
from tests.node.cluster import Cluster, worker_thread
from tests.node.conftest import PROMPTS

Start = Callable[..., Cluster]
PROMPT = PROMPTS["short"]


@pytest.fixture
def alone(cluster: Start, llama: Model) -> Cluster:
    made = cluster(llama)
    made.until_serving_with("head")
    return made


def listening(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    events: list[object] = []
    monkeypatch.setattr(made.registry, "emit", events.append)
    return events


# ---------------------------------------------------------------- conversations

USER = [{"role": "user", "content": "hello"}]


def test_a_conversation_is_the_templates_text_and_its_ids(alone: Cluster) -> None:
    prompt = alone.head.encode_chat(USER)
    assert prompt.text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert alone.head.tokenizer.decode(prompt.ids, skip_special=False) == prompt.text


def test_an_answer_of_an_ordinary_model_is_content(alone: Cluster) -> None:
    stream = alone.head.reasoning_stream(alone.head.encode_chat(USER))
    assert stream.push("<think>x</think>") == [Part(PartKind.CONTENT, "<think>x</think>")]


@pytest.mark.parametrize(("prompt", "kind"), [("<think>\n", PartKind.REASONING), ("assistant\n", PartKind.CONTENT)])
def test_an_answer_begins_inside_the_reasoning_that_the_prompt_opened(
    alone: Cluster, monkeypatch: pytest.MonkeyPatch, prompt: str, kind: PartKind
) -> None:
    monkeypatch.setattr(alone.head.tokenizer, "reasoning_tags", ReasoningTags("<think>", "</think>"))
    assert alone.head.reasoning_stream(ChatPrompt([], prompt)).push("hm") == [Part(kind, "hm")]


def test_a_chat_template_that_the_file_does_not_name_is_a_wrong_option(llama: Model) -> None:
    with pytest.raises(ConfigError, match="'rag'"):
        Cluster(llama, HeadOptions(node=NODE, chat_template="rag"))


# ---------------------------------------------------------------- plans


def test_a_plan_is_explained_beside_serving_and_not_before(alone: Cluster) -> None:
    plan = alone.head.driver.status.plan
    assert plan is not None
    assert plan.explanation is None
    assert alone.head.explainer.explained(plan, DEADLINE_S).explanation is not None
    assert alone.head.view().summary == "head computes 8 of 8 layers (100 %)."


# ---------------------------------------------------------------- events


def test_plugins_are_told_of_the_node_and_the_plan(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Cluster(llama, HeadOptions(node=NODE))
    events: list[object] = []
    made.head.driver._emit = events.append
    with made:
        made.until_serving_with("head")
    assert [type(event) for event in events] == [NodeJoined, PlanMade]


def test_plugins_are_told_how_each_request_ended(alone: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    events = listening(alone, monkeypatch)
    alone.tokens(PROMPT, 3)
    cancelled = alone.ask(PROMPT, 4000)
    cancelled.take()
    cancelled.cancel()
    cancelled.rest()
    alone.ask(PROMPT, 5000).error()
    until("three events", lambda: len(events) == 3)
    done = [event for event in events if isinstance(event, RequestDone)]
    assert [event.finish_reason for event in done] == ["length", "cancelled", "error"]
    assert [event.n_prompt_tokens for event in done] == [len(PROMPT)] * 3
    assert done[0].n_generated_tokens == 3
    assert 0 < done[0].first_token_s <= done[0].total_s


def test_totals_of_requests_are_kept(alone: Cluster) -> None:
    alone.tokens(PROMPT, 3)
    alone.ask(PROMPT, 5000).error()
    until("both are counted", lambda: alone.head.totals.outcomes == {"length": 1, "error": 1})
    assert (alone.head.totals.prompt_tokens, alone.head.totals.generated_tokens) == (2 * len(PROMPT), 3)


def test_the_cluster_can_be_looked_at(alone: Cluster) -> None:
    alone.tokens(PROMPT, 3)
    view = alone.head.view()
    (node,) = view.nodes
    assert (view.state, view.kv_tokens_used, view.n_running) == (State.SERVING, 0, 0)
    assert view.kv_tokens > 0
    assert (node.name, node.is_head, sum(map(len, node.layers))) == ("head", True, alone.head.model.spec.n_layers)
    assert (node.times.n_tokens, node.loaded) == (len(PROMPT) + 2, None)
    running = alone.ask(PROMPT, 3000)
    running.take()
    assert alone.head.view().kv_tokens_used == len(PROMPT) + 3000 - 1
    running.cancel()


def test_the_times_of_a_worker_come_with_its_heartbeats_and_go_with_it(cluster: Start, llama: Model) -> None:
    made = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)

    def times_of(at: int) -> NodeTimes:
        return made.head.view().nodes[at].times

    with worker_thread(made.address, "w", llama.path):
        made.until_serving_with("head", "w")
        made.tokens(PROMPT, 5)
        until("its times", lambda: times_of(1).n_steps == times_of(0).n_steps > 0)
        assert min(times_of(1).compute_s, times_of(1).wait_s, times_of(1).link_s, times_of(1).disk_s) > 0
        assert times_of(1).sent_bytes > 0
    until("its going", lambda: len(made.head.view().nodes) == 1)
    assert made.head._times == {}


def test_a_client_that_fails_when_it_is_told_hurts_nobody_else(
    alone: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    called = threading.Event()

    def broken(event: Event) -> None:
        called.set()
        raise RuntimeError("the event loop is closed")

    alone.head.submit(Request(PROMPT, 3), broken)
    assert len(alone.tokens(PROMPT, 3)) == 3
    assert called.wait(DEADLINE_S)
    assert "could not be told" in caplog.text


def test_events_come_one_by_one_as_tokens_are_made(alone: Cluster) -> None:
    answer = alone.ask(PROMPT, 2000)
    answer.take()
    assert (len(answer.tokens), answer.end) == (1, None)
    answer.cancel()


# ---------------------------------------------------------------- health


def test_health_while_it_serves(alone: Cluster) -> None:
    ok, facts = alone.head.health()
    assert (ok, facts["status"], facts["nodes"]) == (True, "ok", ["head"])


def test_health_counts_requests(cluster: Start, llama: Model) -> None:
    made = cluster(llama, context=1000, parallel=1)
    made.until_serving_with("head")
    running = made.ask(PROMPT, 900)
    made.ask(PROMPT, 900)
    running.take()
    _, facts = made.head.health()
    assert (facts["running"], facts["waiting"]) == (1, 1)


def test_health_while_it_waits_says_for_what(cluster: Start, llama: Model) -> None:
    made = cluster(llama, listen="inproc://", wait=2)
    until("the first word", lambda: "1 of 2" in made.status.reason)
    ok, facts = made.head.health()
    assert (ok, facts["status"]) == (False, "waiting")
    assert "1 of 2 are here" in str(facts["reason"])


def test_health_after_it_was_stopped(alone: Cluster) -> None:
    alone.head.stop_requests()
    until("the end", lambda: alone.status.state is State.STOPPED)
    ok, facts = alone.head.health()
    assert (ok, facts["status"], facts["reason"]) == (False, "stopped", "the server is stopping")


# ---------------------------------------------------------------- start and end


def test_a_model_that_does_not_fit_is_an_error_that_says_what_is_missing(cluster: Start, llama: Model) -> None:
    made = Cluster(llama, HeadOptions(node=NodeOptions(threads=1, memory_bytes=100_000)))
    with made, pytest.raises(ClusterError, match="does not fit"):
        made.head.wait_until_serving()


def test_waiting_for_the_head_tells_how_far_it_is(alone: Cluster) -> None:
    seen: list[State] = []
    alone.head.wait_until_serving(lambda status: seen.append(status.state))
    assert seen == [State.SERVING]


@pytest.mark.parametrize(
    "options", [{"solver": "magic"}, {"node": NodeOptions(backend="magic")}], ids=["solver", "backend"]
)
def test_an_unknown_plugin_is_an_error_and_leaves_nothing_open(
    llama: Model, temporary_folder: Path, options: dict[str, object]
) -> None:
    n_threads = threading.active_count()
    with pytest.raises(PluginError, match="magic"), Cluster(llama, HeadOptions(listen="ipc://", **options)):  # type: ignore[arg-type]
        pass
    assert list(temporary_folder.iterdir()) == []
    assert threading.active_count() == n_threads


def test_a_closed_head_leaves_no_thread(llama: Model) -> None:
    n_threads = threading.active_count()
    with Cluster(llama, HeadOptions(node=NODE, listen="inproc://", n_local=2)) as made:
        made.until_serving_with("head", "head.2", "head.3")
        made.ask(PROMPT, 3000)
    made.head.close()
    assert threading.active_count() == n_threads


def test_requests_after_the_stop_are_refused(alone: Cluster) -> None:
    alone.head.stop_requests()
    assert "the server is stopping" in str(alone.ask(PROMPT, 3).error())


def test_nodes_that_leave_because_the_head_ends_are_not_told_as_lost(cluster: Start, llama: Model) -> None:
    made = cluster(llama, listen="inproc://", n_local=2)
    made.until_serving_with("head", "head.2", "head.3")
    made.head.close()
    assert [line for line in made.told if "lost" in line] == []


# ---------------------------------------------------------------- limits


def test_a_request_beyond_the_context_is_refused_with_both_numbers(alone: Cluster) -> None:
    error = alone.ask(PROMPT, 4096).error()
    assert isinstance(error, RequestError)
    assert f"{len(PROMPT)} tokens and 4096" in str(error)
    assert "context has 4096" in str(error)


def test_ids_that_are_no_tokens_end_their_own_request(alone: Cluster) -> None:
    wrong = alone.ask([10**9], 3)
    assert "outside the vocabulary" in str(wrong.error())
    assert len(alone.tokens(PROMPT, 3)) == 3


# ---------------------------------------------------------------- a context that shifts

SYSTEM = {"role": "system", "content": "you are a pirate"}
HELLO = {"role": "user", "content": "hello"}


def test_the_system_message_stays_when_the_context_shifts(cluster: Start, open_models: dict[str, Model]) -> None:
    head = cluster(open_models["builtin"], context_shift=True).head
    ids = head.encode_chat([SYSTEM, HELLO]).ids
    other = head.encode_chat([SYSTEM, {"role": "user", "content": "goodbye"}]).ids
    n_keep = head.n_keep([SYSTEM, HELLO], ids)
    assert "pirate" in head.tokenizer.decode(ids[:n_keep])
    assert "hello" not in head.tokenizer.decode(ids[:n_keep])
    assert ids[:n_keep] == other[:n_keep]
    assert head.n_keep([{**SYSTEM, "role": "developer"}, HELLO], ids) == n_keep


def test_without_a_system_message_or_a_shift_nothing_special_stays(
    cluster: Start, open_models: dict[str, Model]
) -> None:
    shifting = cluster(open_models["builtin"], context_shift=True).head
    assert shifting.n_keep([HELLO], shifting.encode_chat([HELLO]).ids) == 0
    usual = cluster(open_models["builtin"]).head
    assert usual.n_keep([SYSTEM, HELLO], usual.encode_chat([SYSTEM, HELLO]).ids) == 0


def test_a_node_with_a_slow_disk_is_told_once(alone: Cluster) -> None:
    alone.head.driver.inbox.put(Joined(Member("w", 1000, (), "inproc://w", disk_bytes_s=1e9)))
    until("joining", lambda: len(alone.status.members) == 2)
    for seconds in (1.0, 4.0, 5.0, 8.0, 12.0):
        alone.head._on_timed("w", NodeTimes(read_bytes=int(9e7 * seconds), reading_s=seconds))
        alone.head._on_timed("head", NodeTimes(read_bytes=int(9e7 * seconds), reading_s=seconds))
    told = [line for line in alone.told if "reads its weights" in line]
    assert told == ["node w reads its weights at 90 MB/s; 1,000 MB/s were measured"]


def rated(name: str, machine: str = "m", disk: str = "m 8:0") -> PeerFacts:
    """A node that has measured itself, or, without a name for its disk, has not."""
    rates = {"numpy:cpu": DeviceRates(9e9, 80e9)} if disk else {}
    profile = Profile(machine, disk, 1e9 if disk else 0.0, rates)
    return PeerFacts(name, 1000, (DeviceFacts("numpy:cpu", 1000),), f"inproc://{name}", profile)


def test_a_node_on_the_heads_machine_that_measured_nothing_is_as_fast_as_the_head(alone: Cluster) -> None:
    alone.head._profile = rated("head").profile
    for facts in (rated("local", disk=""), rated("elsewhere", "other", disk=""), rated("own", disk="m 8:16")):
        alone.head._on_joined(facts)
    until("joining", lambda: len(alone.status.members) == 4)
    members = {member.name: member for member in alone.status.members}
    local, elsewhere = members["local"].facts, members["elsewhere"].facts
    assert (local.disk, local.disk_bytes_s, local.devices[0].decode_bytes_s) == ("m 8:0", 1e9, 9e9)
    assert (elsewhere.disk, elsewhere.disk_bytes_s, elsewhere.devices[0].decode_bytes_s) == ("", 0, 0)
    assert members["own"].disk == "m 8:16"


def test_nodes_on_one_disk_are_not_slow_because_they_share_it() -> None:
    pair = [Member(name, 1000, (), "", 1e9, "m 8:0") for name in "ab"]
    alone = Member("c", 1000, (), "", 1e9)
    assert [own_rate(member, [*pair, alone, alone]) for member in (*pair, alone)] == [5e8, 5e8, 1e9]


def test_a_head_measures_itself_only_where_plans_need_it(
    cluster: Start, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def profile(self: Measurer, node: Node, model: Model, memory_bytes: int) -> Profile:
        measured.append(memory_bytes)
        return rated("head", machine_name()).profile

    monkeypatch.setattr(Measurer, "profile", profile)
    cluster(llama).until_serving_with("head")
    assert measured == []
    with Cluster(llama, HeadOptions(node=replace(NODE, memory_bytes=llama.file.size - 1))):
        assert measured == [llama.file.size - 1]


def test_what_was_foretold_stands_beside_what_was_measured(alone: Cluster) -> None:
    alone.until_serving_with("head")
    assert alone.head.view().token_s == 0
    alone.tokens([1, 2, 3], 4)
    until("telling", lambda: alone.head.view().token_s > 0)
    alone.tokens([1, 2, 3], 1)
    assert alone.head.view().token_s > 0, "an answer of one token tells nothing"
