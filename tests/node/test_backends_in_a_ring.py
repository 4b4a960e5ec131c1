"""Nodes of all backends serve one model together, and say what the exact twin says alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.interfaces import KvType
from prima_core.node.head import HeadOptions
from prima_core.node.node import NodeOptions
from prima_core.plan.plan import Plan, Visit
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import NODE, Cluster, dealt, ring, until
from prima_core.testing.examples import example
from prima_core.testing.reference import greedy_ids
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.node.cluster import worker_process
from tests.node.conftest import PROMPTS

OPTIONS = HeadOptions(node=NODE, kv_type=KvType.F32, wire=WirePolicy.F32, chunk=32)
EXACT = NodeOptions("numpy", kernels="exact")
N_TOKENS = 24
PROCESSES_SERVE_WITHIN_S = 50  # they import torch and mlx
MODELS: dict[str, TinyModel] = {
    "llama": replace(example("llama", "F16"), n_layers=7),
    "gemma3": replace(example("gemma3", "BF16"), n_layers=7),
    "qwen3moe": replace(example("qwen3moe", "Q4_K"), n_layers=4),
}


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", MODELS[request.param])


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("model") / "builtin.gguf"
    copy.write_bytes((files("prima_core.builtin") / "prima-builtin.gguf").read_bytes())
    return copy


def check_answers(cluster: Cluster, path: Path) -> None:
    """All prompts at once, so that rows of several sequences meet."""
    answers = [cluster.ask(prompt, N_TOKENS) for prompt in PROMPTS.values()]
    for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
        assert answer.rest() == greedy_ids(path, prompt, N_TOKENS)


def test_threads_of_three_backends_say_what_the_exact_twin_says(path: Path) -> None:
    with ring(path, [EXACT, "torch", "mlx"], OPTIONS) as cluster:
        check_answers(cluster, path)


@pytest.mark.parametrize("backends", [["numpy", "torch", "mlx"], ["torch", "mlx", "numpy"], ["mlx", "numpy", "torch"]])
def test_any_backend_can_be_the_head(builtin: Path, backends: list[str]) -> None:
    with ring(builtin, backends, OPTIONS) as cluster:
        check_answers(cluster, builtin)


@pytest.mark.parametrize(("head", "output"), [("torch", "mlx"), ("mlx", "torch")])
@pytest.mark.parametrize("has_layers", [False, True], ids=["ends alone", "ends and layers"])
def test_any_backend_can_have_one_end_of_the_model(path: Path, head: str, output: str, has_layers: bool) -> None:
    with open_model(path) as model:
        n_layers = model.spec.n_layers
    names = ["head", "head.2", "head.3"] if has_layers else ["head.3"]
    visits = [Visit(visit.node, visit.start, visit.stop) for visit in dealt(n_layers, names).visits]
    plan = Plan(n_layers, "head", tuple(visits), output="head.2")
    with ring(path, [head, output, EXACT], replace(OPTIONS, plan=plan)) as cluster:
        check_answers(cluster, path)
        assert cluster.status.plan is not None
        assert cluster.status.plan.stops[-2:] == ("head.2", "head")


def test_processes_of_three_backends_say_what_the_exact_twin_says(builtin: Path) -> None:
    with open_model(builtin) as model, ExitStack() as exits:
        plan = dealt(model.spec.n_layers, ["head", "w1", "w2"])
        head = exits.enter_context(Cluster(model, replace(OPTIONS, listen="tcp://127.0.0.1:0", wait=3, plan=plan)))
        for name, backend in (("w1", "torch"), ("w2", "mlx")):
            exits.enter_context(worker_process(head.address, name, builtin.parent, backend=backend))
        until("serving", lambda: head.serves_with("head", "w1", "w2"), PROCESSES_SERVE_WITHIN_S)
        check_answers(head, builtin)
