"""bench/experts.py: mixtures of experts by how much of them is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import experts
from prima_core.arch.families import open_model
from prima_core.interfaces import Layers
from prima_core.memory.residency import holding
from prima_core.testing.tinymodel import big_shape

SMALL = replace(experts.SHAPE, n_layers=2, d_model=256, n_heads=2, n_kv_heads=1, d_ff=256, vocab_size=512)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(experts, "BUFFER_BYTES", 1 << 20)
    return big_shape(tmp_path / "small.gguf", SMALL)


def test_with_memory_for_all_nothing_is_read_and_with_less_only_what_is_used(path: Path) -> None:
    with open_model(path) as model:
        whole, half = (experts.measure(model, share, n_prompt=8, n_tokens=4, threads=1) for share in (1, 0.6))
        used = holding(model.file.tensors, [Layers(0, 2)], ()).expert_bytes * SMALL.n_experts_used / SMALL.n_experts
    assert (whole.token_bytes, whole.hit_rate) == (0, 1)
    assert 0 < half.token_bytes < used * 1.2
    assert 0 < half.hit_rate < 1
    assert f"{whole.share:.0%}" in str(whole)


def test_a_skewed_router_hits_more_often(path: Path) -> None:
    def hit_rate() -> float:
        with open_model(path) as model:
            return experts.measure(model, 0.6, n_prompt=64, n_tokens=8, threads=1).hit_rate

    before = hit_rate()
    experts.skew(path)
    experts.uncached(path)
    assert hit_rate() > before


def test_skew_changes_routers_only(path: Path) -> None:
    before = np.fromfile(path, np.uint8)
    experts.skew(path)
    changed = np.flatnonzero(np.fromfile(path, np.uint8) != before)
    with open_model(path) as model:
        routers = [info for name, info in model.file.tensors.items() if "gate_inp" in name]
    assert len(changed)
    assert all(any(info.offset <= at < info.offset + info.n_bytes for info in routers) for at in changed)
