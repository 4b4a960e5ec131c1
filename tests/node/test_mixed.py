"""Devices of different backends in one node: a visit goes through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from prima_core.arch.families import open_model
from prima_core.interfaces import KvType
from prima_core.model.weights import Model
from prima_core.node.head import HeadOptions
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.testing.cluster import NODE
from prima_core.testing.reference import greedy_ids
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.node.cluster import Cluster
from tests.node.conftest import PROMPTS

N_LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    wanted = TinyModel(n_layers=N_LAYERS, types="Q8_0", context_length=256, seed=3)
    with open_model(write_tiny_model(tmp_path_factory.mktemp("mixed") / "mixed.gguf", wanted)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("backend", "cuts"),
    [
        ("mlx:cpu,numpy:cpu", (0, 4, N_LAYERS)),
        ("numpy,mlx", (0, 1, N_LAYERS)),
    ],
)
def test_a_visit_over_devices_of_several_backends_answers_as_the_exact_twin(
    model: Model, backend: str, cuts: tuple[int, ...]
) -> None:
    devices = [name if ":" in name else f"{name}:cpu" for name in backend.split(",")]
    split = tuple(Split(device, *run) for device, run in zip(devices, pairwise(cuts), strict=True))
    options = HeadOptions(
        node=replace(NODE, backend=backend, kernels="exact"),
        plan=Plan(N_LAYERS, "head", (Visit("head", 0, N_LAYERS, split),)),
        parallel=2,
        kv_type=KvType.F32,
    )
    with Cluster(model, options) as cluster:
        cluster.until_serving_with("head")
        assert cluster.head.node.explanation == f"computing on {', '.join(devices)}, as asked"
        running = [cluster.ask(prompt, 24) for prompt in PROMPTS.values()]
        answers = [answer.rest() for answer in running]
        for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
            assert answer == greedy_ids(model.path, prompt, 24)
        turn = (*PROMPTS["short"], *answers[0], *range(60, 70))
        assert cluster.tokens(turn, 12) == greedy_ids(model.path, turn, 12), "what was cached is on every device"
