"""`prima run`, `prima chat` and `prima bench`, with a model."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prima_core.engine.request import Event, Request
from prima_core.errors import ClusterError
from prima_core.node.head import Head
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.commands.conftest import Outcome, Prima

GREEDY = ("--temp", "0")

# ---------------------------------------------------------------- prima run


def test_a_prompt_is_answered_on_standard_output(prima: Prima, tiny: Path) -> None:
    ended = prima("run", tiny, "-p", "hello", "-n", 8, *GREEDY)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("\n")
    assert ended.out == prima("run", tiny, "-p", "hello", "-n", 8, *GREEDY, "--json").json["text"] + "\n"


def test_json_tells_ids_text_and_timings(prima: Prima, tiny: Path) -> None:
    ended = prima("run", tiny, "-p", "hello", "-n", 8, *GREEDY, "--json")
    facts = ended.json
    assert list(facts) == ["prompt_ids", "generated_ids", "text", "timings"]
    assert len(facts["generated_ids"]) == 8
    timings = facts["timings"]
    assert (timings["n_prompt"], timings["n_generated"]) == (len(facts["prompt_ids"]), 8)
    assert 0 < timings["ttft_s"] < timings["total_s"]
    assert timings["prefill_tok_s"] > 0
    assert timings["decode_tok_s"] > 0


def test_raw_leaves_the_chat_template_out(prima: Prima, tiny: Path) -> None:
    raw = prima("run", tiny, "-p", "hello", "-n", 1, "--raw", "--json").json["prompt_ids"]
    assert raw == prima("tokenize", tiny, "--special", "hello", "--json").json["ids"]
    chat = prima("run", tiny, "-p", "hello", "-n", 1, "--json").json["prompt_ids"]
    assert len(chat) > len(raw)


def test_a_prompt_can_come_from_standard_input(prima: Prima, tiny: Path) -> None:
    as_argument = prima("run", tiny, "-p", "hello", "-n", 4, *GREEDY, "--json").json
    piped = prima("run", tiny, "-p", "-", "-n", 4, *GREEDY, "--json", stdin=b"hello").json
    assert piped["generated_ids"] == as_argument["generated_ids"]
    assert prima("run", tiny, "-p", "-", "-n", 1, stdin=b"a\xffb").code == 0


def test_without_a_model_the_built_in_one_answers(prima: Prima) -> None:
    ended = prima("run", "-p", "What is prima?", "-n", 5, *GREEDY, "--json")
    assert ended.code == 0
    assert len(ended.json["generated_ids"]) == 5


def test_a_seed_makes_a_run_repeatable(prima: Prima, tiny: Path) -> None:
    def ids(seed: int) -> object:
        sampling = ("--temp", 2, "--top-k", 0, "--top-p", 1, "--seed", seed)
        return prima("run", tiny, "-p", "hello", "-n", 6, *sampling, "--json").json["generated_ids"]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_cuts_and_penalties_of_the_command_line_reach_the_sampler(prima: Prima, tiny: Path) -> None:
    def ids(*sampling: object) -> object:
        return prima("run", tiny, "-p", "hello", "-n", 12, *sampling, "--json").json["generated_ids"]

    assert ids("--temp", 2, "--min-p", 1) == ids("--temp", 0)
    for penalty in ("--repeat-penalty", 0.01), ("--presence-penalty", -2), ("--frequency-penalty", -2):
        assert ids("--temp", 0, *penalty) != ids("--temp", 0), penalty


def test_without_a_limit_a_run_ends_at_the_end_of_the_context(prima: Prima, tiny: Path) -> None:
    facts = prima("run", tiny, "-p", "hello", "-c", 30, "--json", *GREEDY).json
    assert len(facts["prompt_ids"]) + len(facts["generated_ids"]) <= 31
    cut = prima("run", tiny, "-p", "hello", "-c", 30, "-n", 1000, "--json", *GREEDY).json
    assert cut["generated_ids"] == facts["generated_ids"]


def test_a_context_that_the_model_does_not_have_is_told(prima: Prima, tiny: Path) -> None:
    assert prima("run", tiny, "-p", "x", "-n", 1, "-c", 512).err == ""
    ended = prima("run", tiny, "-p", "x", "-n", 1, "-c", 513)
    assert (ended.code, ended.err) == (0, "the model's context has 512 tokens, -c 513 asks for more: 512 are served\n")


def test_where_the_context_shifts_a_run_goes_on(prima: Prima, tiny: Path) -> None:
    usual = prima("run", tiny, "-p", "hello", "-c", 30, "--json", *GREEDY).json
    longer = prima("run", tiny, "-p", "hello", "-c", 30, "-n", 100, "--context-shift", "--json", *GREEDY).json
    n = len(usual["generated_ids"])
    assert n < 30
    assert (longer["generated_ids"][:n], len(longer["generated_ids"])) == (usual["generated_ids"], 100)
    unsaid = prima("run", tiny, "-p", "hello", "-c", 30, "--context-shift", "--json", *GREEDY).json
    assert len(unsaid["generated_ids"]) == 30


@pytest.mark.parametrize("transport", ["inproc", "unix", "tcp", "ipc", "tls+tcp"])
def test_a_ring_of_local_nodes_says_the_same(prima: Prima, tiny: Path, transport: str) -> None:
    alone = prima("run", tiny, "-p", "hello", "-n", 8, *GREEDY, "--json").json
    ring = prima("run", tiny, "-p", "hello", "-n", 8, *GREEDY, "--json", "--nodes", 2, "--wire", "f32",
                 "--transport", transport)  # fmt: skip
    assert ring.json["generated_ids"] == alone["generated_ids"]
    assert ".2 joined" in ring.err


def test_characters_that_the_terminal_lacks_are_replaced(
    prima: Prima, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert prima("run", tiny, "-p", "hello", "-n", 40, "--temp", 2, "--seed", 1, "--top-k", 0, "--top-p", 1).code == 0
    sys.stdout.flush()
    assert b"?" in raw.getvalue()


# ---------------------------------------------------------------- prima chat


def chat(prima: Prima, tiny: Path, *lines: str) -> Outcome:
    return prima("chat", tiny, "-n", 6, *GREEDY, stdin="".join(f"{line}\n" for line in lines).encode())


def test_each_line_of_standard_input_is_a_turn(prima: Prima, tiny: Path) -> None:
    ended = chat(prima, tiny, "hello", "", "and you?")
    assert ended.code == 0
    assert "tiny: /new" in ended.err
    first = prima("run", tiny, "-p", "hello", "-n", 6, *GREEDY).out
    assert ended.out.startswith(first)
    assert ended.out != first + prima("run", tiny, "-p", "and you?", "-n", 6, *GREEDY).out


def test_new_forgets_what_was_said(prima: Prima, tiny: Path) -> None:
    once = chat(prima, tiny, "hello").out
    assert chat(prima, tiny, "hello", "/new", "hello").out == once * 2
    assert chat(prima, tiny, "hello", "hello").out != once * 2


def test_exit_ends_a_chat(prima: Prima, tiny: Path) -> None:
    assert chat(prima, tiny, "/exit", "hello").out == ""


def test_an_unknown_command_tells_the_known_ones(prima: Prima, tiny: Path) -> None:
    ended = chat(prima, tiny, "/help")
    assert ended.out == ""
    assert ended.err.count("/new starts over") == 2


def test_a_turn_that_is_too_long_is_told_and_the_chat_goes_on(prima: Prima, tiny: Path) -> None:
    ended = chat(prima, tiny, "far too long " * 500, "hello")
    assert ended.code == 0
    assert "the context has 512" in ended.err
    assert ended.out == chat(prima, tiny, "hello").out


def test_a_lost_node_ends_the_answer_and_not_the_chat(
    prima: Prima, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Head.submit, list[Request]()

    def submit(head: Head, request: Request, deliver: Callable[[Event], None]) -> int:
        asked.append(request)
        if len(asked) == 1:
            raise ClusterError("node 'desk' was lost")
        return real(head, request, deliver)

    monkeypatch.setattr(Head, "submit", submit)
    ended = chat(prima, tiny, "lost", "hello")
    assert "node 'desk' was lost" in ended.err
    monkeypatch.undo()
    assert ended.out == chat(prima, tiny, "hello").out


# ---------------------------------------------------------------- prima bench


def test_bench_prints_its_figures(prima: Prima, tiny: Path) -> None:
    facts = prima("bench", tiny, "--prompt", 20, "--gen", 5, "--json").json
    for name in ("decode_tok_s", "prefill_tok_s", "ttft_s", "weight_bytes_per_token", "weight_gb_s", "rss_bytes"):
        assert facts[name] > 0, name
    assert (facts["n_prompt"], facts["n_generated"], facts["nodes"]) == (20, 5, 1)
    assert facts["weight_gb_s"] == pytest.approx(facts["weight_bytes_per_token"] * facts["decode_tok_s"] / 1e9)
    assert facts["peak_rss_bytes"] >= facts["rss_bytes"] > 0
    [node] = facts["per_node"]
    assert node["compute_s_per_token"] > 0
    assert (node["read_bytes_per_token"], node["stall_s_per_token"], node["streamed_bytes"]) == (0, 0, 0)
    assert node["pinned_bytes"] > tiny.stat().st_size / 2
    table = prima("bench", tiny, "--prompt", 20, "--gen", 5).out
    assert [line.split()[0] for line in table.splitlines()] == list(facts)


def test_a_model_larger_than_the_memory_that_it_may_have_is_read_from_disk_and_answers_alike(
    prima: Prima, tmp_path: Path
) -> None:
    wanted = TinyModel(n_layers=8, d_model=512, n_heads=8, n_kv_heads=8, d_ff=4096, types="Q8_0")
    path = write_tiny_model(tmp_path / "large.gguf", wanted)
    n_bytes, cap = path.stat().st_size, 52_000_000
    assert n_bytes > 1.2 * cap
    ask = ("run", path, "-p", "hello", "-n", 6, *GREEDY, "--json")
    assert prima(*ask, "--memory", cap).json["generated_ids"] == prima(*ask).json["generated_ids"]
    [node] = prima("bench", path, "--prompt", 5, "--gen", 5, "--memory", cap, "--json").json["per_node"]
    assert node["pinned_bytes"] + node["buffer_bytes"] <= cap
    assert node["streamed_bytes"] <= n_bytes - cap + node["buffer_bytes"] + 4_000_000, "no more than it must"
    assert node["read_bytes_per_token"] > node["streamed_bytes"] / 2


def test_a_mixture_larger_than_memory_reads_experts_and_answers_alike(prima: Prima, tmp_path: Path) -> None:
    wanted = TinyModel("qwen3moe", 2, 512, n_heads=4, n_kv_heads=4, types="Q8_0", n_experts=32, n_experts_used=2)
    path = write_tiny_model(tmp_path / "large.gguf", wanted)
    n_bytes, cap = path.stat().st_size, 46_000_000
    assert n_bytes > 1.2 * cap
    ask = ("run", path, "-p", "hello", "-n", 6, *GREEDY, "--json")
    assert prima(*ask, "--memory", cap).json["generated_ids"] == prima(*ask).json["generated_ids"]
    [node] = prima("bench", path, "--prompt", 5, "--gen", 5, "--memory", cap, "--json").json["per_node"]
    assert node["pinned_bytes"] + node["buffer_bytes"] <= cap
    assert 0 < node["expert_hit_rate"] <= 1
    assert node["read_bytes_per_token"] < n_bytes * 2 / 32 * 1.2, "only those that are used"


def test_a_token_touches_all_weights_but_the_embeddings(prima: Prima, tiny: Path) -> None:
    facts: Any = prima("bench", tiny, "--prompt", 2, "--gen", 2, "--json").json
    embeddings = 512 * 256 * 4
    assert (
        tiny.stat().st_size - embeddings > facts["weight_bytes_per_token"] > tiny.stat().st_size - embeddings - 50_000
    )


def test_of_experts_a_token_touches_those_that_it_uses(prima: Prima, tmp_path: Path) -> None:
    def touched(n_used: int) -> int:
        tiny = TinyModel("qwen3moe", n_layers=1, d_ff=64, n_experts=4, n_experts_used=n_used)
        path = write_tiny_model(tmp_path / f"{n_used}.gguf", tiny)
        facts: Any = prima("bench", path, "--prompt", 2, "--gen", 2, "--json").json
        return int(facts["weight_bytes_per_token"])

    assert touched(3) - touched(1) == 2 * 3 * 64 * 256 * 4, "two experts of three matrices"
