"""`prima plan --problem` with other options: they count, or are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from prima_core.interfaces import Goal
from prima_core.plan.problem import Problem, problem_to_json
from tests.commands.conftest import Prima
from tests.plan.home import ATTIC, DESK, LAPTOP, home, node

HOME = home(DESK, LAPTOP, ATTIC)  # of 1000 positions of KV, in contexts of 4096
ROOMY = home(node("desk", 3000, 15e9), node("laptop", 3000, 12e9))


def planned(prima: Prima, problem: Problem, tmp_path: Path, *options: object) -> dict[str, object]:
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(problem))
    shown = prima("plan", "--problem", file, "--solver", "even", "--json", *options)
    assert shown.code == 0, shown.err
    found: dict[str, object] = shown.json
    return found


def forecast(plan: dict[str, object]) -> dict[str, object]:
    found = plan["forecast"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("goal", ["throughput", "ttft"])
def test_the_goal_is_what_is_asked_for(prima: Prima, tmp_path: Path, goal: str) -> None:
    plan = planned(prima, ROOMY, tmp_path, "--goal", goal)
    explanation = plan["explanation"]
    assert isinstance(explanation, dict)
    assert explanation["goal"] == goal
    assert forecast(plan)["width"] == (4 if goal == "throughput" else 1)


def test_for_throughput_so_many_sequences_are_served_as_contexts_have_room(prima: Prima, tmp_path: Path) -> None:
    plan = planned(prima, ROOMY, tmp_path, "--goal", "throughput", "--parallel", 3)
    assert (forecast(plan)["width"], plan["kv_tokens"]) == (3, 3 * 4096)


def test_what_nobody_asks_for_is_as_the_problem_says(prima: Prima, tmp_path: Path) -> None:
    stated = msgspec.structs.replace(ROOMY, goal=Goal.THROUGHPUT, width=7)
    plan = planned(prima, stated, tmp_path)
    assert (forecast(plan)["width"], plan["kv_tokens"], plan["context"], plan["kv_type"]) == (7, 1000, 4096, "f16")
    assert forecast(planned(prima, stated, tmp_path, "--goal", "latency"))["width"] == 1


def test_the_context_and_the_type_of_kv_change_how_much_room_it_takes(prima: Prima, tmp_path: Path) -> None:
    stated = msgspec.structs.replace(ROOMY, kv_tokens=2 * 4096)

    def kv_bytes(*options: object) -> int:
        needs = planned(prima, stated, tmp_path, *options)["residency"]
        assert isinstance(needs, list)
        return sum(need["kv_bytes"] for need in needs)

    usual = kv_bytes()
    assert kv_bytes("-c", 2048) == usual // 2
    assert kv_bytes("--parallel", 4) == 2 * usual
    assert kv_bytes("--kv-type", "f32") == 2 * usual
    assert kv_bytes("--kv-type", "q8_0") == pytest.approx(usual * 17 / 32, rel=0.01)


def test_the_environment_asks_as_options_do(prima: Prima, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_GOAL", "throughput")
    monkeypatch.setenv("PRIMA_MEMORY", "4GB")
    assert forecast(planned(prima, ROOMY, tmp_path))["width"] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory", "4GB"), "--memory is not for a problem file: `memory_bytes` of its nodes in "),
        (("--nodes", 2), "--nodes is not for a problem file: `nodes` in "),
        (("--backend", "numpy"), "--backend is not for a problem file"),
        (("model.gguf",), "is about a model of its own, not about model.gguf"),
    ],
)
def test_what_a_problem_file_says_itself_cannot_be_asked_for(
    prima: Prima, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(HOME))
    ended = prima("plan", "--problem", file, *options)
    assert ended.code == 1
    assert said in ended.err


def test_a_plan_file_is_judged_by_a_problem(prima: Prima, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_bytes(msgspec.json.encode(planned(prima, HOME, tmp_path)))
    slower = home(DESK, LAPTOP, node("attic", 400, 1e9))
    again = planned(prima, slower, tmp_path, "--plan", plan)
    assert again["visits"] == planned(prima, HOME, tmp_path)["visits"]
    assert forecast(again)["token_s"] != forecast(planned(prima, HOME, tmp_path))["token_s"]


def test_a_rate_that_is_not_known_is_guessed_and_told(prima: Prima, tmp_path: Path) -> None:
    unknown = msgspec.structs.replace(ATTIC.devices[0], decode_bytes_s=0.0, prefill_bytes_s=0.0)
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(home(DESK, LAPTOP, msgspec.structs.replace(ATTIC, devices=(unknown,)))))
    for option in ((), ("--explain",)):
        shown = prima("plan", "--problem", file, *option)
        words = " ".join(shown.out.split())
        assert (
            "How fast numpy:cpu on attic computes was not measured: it is taken to be as numpy:cpu on laptop" in words
        )
        assert "as `even`" not in words


def test_what_does_not_fit_is_told_with_what_would_help_whatever_the_solver(prima: Prima, tmp_path: Path) -> None:
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(msgspec.structs.replace(home(LAPTOP, DESK), head="desk", streaming=False)))
    for solver in ("halda", "even", "compute"):
        ended = prima("plan", "--problem", file, "--solver", solver)
        assert ended.code == 1
        said = " ".join(ended.err.split())
        assert "does not fit" in said
        assert "GB more of memory; or let weights that do not fit be read from disk" in said


@pytest.mark.parametrize(
    "options",
    [("-c", 10**30), ("--parallel", 2**32, "-c", 1), ("--goal", "throughput", "--parallel", 4097, "-c", 1)],
)
def test_more_than_can_ever_be_is_refused_by_name(prima: Prima, tmp_path: Path, options: tuple[object, ...]) -> None:
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(ROOMY))
    shown = prima("plan", "--problem", file, *options)
    assert shown.code != 0
    assert str(options[1] if options[0] == "-c" else options[options.index("--parallel") + 1]) in shown.err
    assert "at most" in shown.err
    assert "solver" not in shown.err


def test_of_a_plan_file_nobody_says_how_near_the_best_it_is_for_another_question(prima: Prima, tmp_path: Path) -> None:
    problem, plan = tmp_path / "problem.json", tmp_path / "plan.json"
    problem.write_bytes(problem_to_json(ROOMY))
    plan.write_text(prima("plan", "--problem", problem, "--json").out)
    made = prima("plan", "--problem", problem, "--json").json
    assert made["certificate"] is not None
    again = prima("plan", "--problem", problem, "--plan", plan, "--goal", "ttft", "--json").json
    assert again["visits"] == made["visits"]
    assert again["certificate"] is None
