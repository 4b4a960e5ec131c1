"""A ring answers as one node does, whatever the family: windows, ropes and experts know their layers by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import plan_of
from prima_core.testing.reference import greedy_ids
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.node.cluster import Cluster
from tests.node.conftest import PROMPTS

_LLAMA = TinyModel(n_layers=7, d_model=64, d_ff=96, vocab_size=384, context_length=256, types="Q8_0", seed=41)
_MIXTURE = replace(_LLAMA, n_experts=6, n_experts_used=2)
_GEMMA = replace(_LLAMA, head_dim=16, window=20, tied_output=True)
FAMILIES = {
    "llama": replace(_LLAMA, rope_scaling="yarn", rope_original_context=32),
    "mistral": replace(_LLAMA, arch="mistral"),
    "mixtral": replace(_MIXTURE, arch="mixtral"),
    "qwen2": replace(_LLAMA, arch="qwen2"),
    "qwen3": replace(_LLAMA, arch="qwen3", head_dim=32),
    "qwen3moe": replace(_MIXTURE, arch="qwen3moe"),
    "gemma2": replace(_GEMMA, arch="gemma2", attention_softcap=2.0),
    "gemma3": replace(_GEMMA, arch="gemma3", rope_theta=1e6),
    "phi3": replace(_LLAMA, arch="phi3", rope_scaling="longrope", rope_original_context=64),
}
PLAN = plan_of(("head", 0, 1), ("head.2", 1, 3), ("head.3", 3, 4), ("head", 4, 5), ("head.2", 5, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ring_answers_as_one_node(cluster: Callable[..., Cluster], tmp_path: Path, family: str) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", FAMILIES[family])
    with open_model(path) as model:
        head = cluster(model, listen="inproc://", n_local=2, plan=PLAN, chunk=32, wire=WirePolicy.F32)
        head.until_serving_with("head", "head.2", "head.3")
        answers = [head.ask(prompt, 24) for prompt in PROMPTS.values()]
        for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
            assert answer.rest() == greedy_ids(path, prompt, 24, twin="native")
        head.head.close()
