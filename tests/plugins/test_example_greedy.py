"""A stranger's solver, installed by pip and used by name, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from prima_core.plan.problem import ModelFacts, NodeFacts, Problem, problem_to_json
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.plugins.strangers import Installed, install, listed, run


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install("prima-example-greedy", tmp_path_factory.mktemp("greedy"))


def nodes_of(plan: str) -> list[str]:
    return [visit["node"] for visit in json.loads(plan)["visits"]]


def test_it_is_listed_among_the_plugins(installed: Installed) -> None:
    assert installed.plugin("greedy") == listed("greedy", "prima-example-greedy", "solver greedy")


def test_it_makes_the_plan_when_asked_for_by_name(installed: Installed, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    plan = ("plan", model, "--nodes", "2", "--json", "--solver")
    assert len(set(nodes_of(installed.prima(*plan, "even")))) == 2
    assert len(set(nodes_of(installed.prima(*plan, "greedy")))) == 1


def test_it_solves_a_problem_from_a_file_without_a_cluster(installed: Installed, tmp_path: Path) -> None:
    model = ModelFacts("a model", (100,) * 8, 50, 50, 1, 64)
    problem = Problem(model, (NodeFacts("small", 600), NodeFacts("large", 9000)), "small", 1)
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(problem))
    plan = installed.prima("plan", "--problem", file, "--solver", "greedy", "--json")
    visits: list[Mapping[str, object]] = json.loads(plan)["visits"]
    assert [(visit["node"], visit["start"], visit["stop"]) for visit in visits] == [("small", 0, 4), ("large", 4, 8)]
    file.write_bytes(problem_to_json(msgspec.structs.replace(problem, nodes=problem.nodes[:1])))
    refused = run("-m", "prima_core", "plan", "--problem", file, "--solver", "greedy", path=installed.folder)
    assert refused.returncode != 0
    assert "layers 4 to 7 do not fit on any node" in refused.stderr


def test_its_own_tests_pass(installed: Installed) -> None:
    assert "1 passed" in installed.own_tests()


def test_it_passes_the_kit_from_the_command_line(installed: Installed) -> None:
    report = installed.checks("solver", "greedy")
    assert report.startswith("solver greedy: ")
    assert report.endswith(", 0 failed")


def test_without_it_the_name_is_unknown(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    refused = run("-m", "prima_core", "plan", model, "--solver", "greedy")
    assert refused.returncode != 0
    assert "there is no solver 'greedy'" in refused.stderr
