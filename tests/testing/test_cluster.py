"""A ring in one process, and the fixtures as an author of a plugin uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.errors import ClusterError, PluginError
from prima_core.node.node import NodeOptions
from prima_core.testing.cluster import OPTIONS, dealt, plan_of, ring
from prima_core.testing.examples import example
from prima_core.testing.reference import greedy_ids
from prima_core.testing.tinymodel import write_tiny_model

EXACT = NodeOptions("numpy", kernels="exact")
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", replace(example("gemma3"), n_layers=7))


def test_a_ring_of_threads_says_what_the_exact_twin_says(path: Path) -> None:
    with ring(path, ["numpy", EXACT, "numpy"]) as cluster:
        assert cluster.tokens(PROMPT, 12) == greedy_ids(path, PROMPT, 12)
        assert cluster.status.plan is not None
        assert [visit.node for visit in cluster.status.plan.visits] == ["head", "head.2", "head.3"] * 2


def test_a_ring_takes_another_plan(path: Path) -> None:
    plan = plan_of(("head.2", 0, 7))
    with ring(path, ["numpy", "numpy"], replace(OPTIONS, plan=plan)) as cluster:
        assert cluster.tokens(PROMPT, 3) == greedy_ids(path, PROMPT, 3)
        assert cluster.status.plan is not None
        assert cluster.status.plan.visits == plan.visits


def test_a_backend_that_cannot_be_opened_ends_the_ring_at_once(path: Path) -> None:
    with pytest.raises(PluginError, match="no backend 'abacus'"), ring(path, ["abacus", "numpy"]):
        pass
    for node, why in (("abacus", "there is no backend 'abacus'"), (NodeOptions("numpy", kernels="hand"), "'hand'")):
        with pytest.raises(ClusterError, match=rf"node head\.2 ended: .*{why}"), ring(path, ["numpy", node]):
            pass


@pytest.mark.parametrize(("n_layers", "visits"), [(7, [1, 1, 1, 1, 1, 2]), (2, [1, 1]), (12, [2] * 6)])
def test_layers_are_dealt_by_turns(n_layers: int, visits: list[int]) -> None:
    plan = dealt(n_layers, ["head", "b", "c"])
    assert sorted(visit.stop - visit.start for visit in plan.visits) == visits
    assert [visit.start for visit in plan.visits] == [0, *(visit.stop for visit in plan.visits)][:-1]
    assert [visit.node for visit in plan.visits] == (["head", "b", "c"] * 2)[: len(visits)]


AUTHORS_TEST = """
from prima_core.testing.reference import greedy_ids


def test_ring(tiny_model, ring):
    path = tiny_model("qwen2", "Q4_0", n_layers=4)
    assert tiny_model("qwen2", "Q4_0", n_layers=4) == path
    assert path != tiny_model("qwen2", "Q4_0")
    cluster = ring(path, ["numpy", "numpy"])
    assert cluster.tokens([5, 6, 7], 8) == greedy_ids(path, [5, 6, 7], 8, twin="native")
"""


def test_an_author_gets_the_fixtures_by_their_module(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["prima_core.testing.fixtures"]\n')
    (tmp_path / "test_mine.py").write_text(AUTHORS_TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1][:8]) == (0, "1 passed"), done.stdout
