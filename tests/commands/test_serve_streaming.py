"""`prima serve` on devices that copy weights and have no room for all of them, as a user types it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prima_core.testing.served import Served
from prima_core.testing.tinymodel import TinyModel, big_shape
from tests.node.fakegpu import add_fake_gpu
from tests.site import Site

MB = 10**6
SHAPE = TinyModel(n_layers=5, d_model=1024, n_heads=16, n_kv_heads=4, d_ff=4096, types="Q8_0", seed=3)
"""82 MB."""
OPTIONS = ("--threads", "1", "--parallel", "1", "-c", "256")
PROMPT, N_TOKENS = "owner", 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_shape(tmp_path_factory.mktemp("streaming") / "model.gguf", SHAPE)


def answered(model: Path, *options: str) -> tuple[str, dict[str, float]]:
    """And the node's times."""
    with Served([str(model), *OPTIONS, *options]) as node:
        return node.answer(PROMPT, N_TOKENS), node.times()


@pytest.fixture(scope="module")
def right(model: Path) -> str:
    """What torch answers where all fits."""
    answer, times = answered(model, "--backend", "torch:cpu")
    assert times["read_bytes"] == 0
    return answer


def test_a_device_in_the_hosts_memory_streams_what_does_not_fit(model: Path, right: str) -> None:
    answer, times = answered(model, "--backend", "torch:cpu", "--memory", "72MB")
    assert answer == right
    assert times["read_bytes"] >= N_TOKENS * times["streamed_bytes"] > 0
    assert times["pinned_bytes"] + times["buffer_bytes"] < 72 * MB


@pytest.mark.parametrize(("memory", "is_read"), [("150MB", False), ("45MB", True)])
def test_a_gpu_alone_has_what_it_lacks_copied_from_its_hosts_memory_or_read(
    model: Path, right: str, site: Site, monkeypatch: pytest.MonkeyPatch, memory: str, is_read: bool
) -> None:
    add_fake_gpu(site, sizes={"fakegpu:gpu:0": 60 * MB}, copies=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site.folder), str(Path(__file__).parents[2])]))
    answer, times = answered(model, "--backend", "fakegpu:gpu:0", "--memory", memory)
    assert answer == right
    assert (times["read_bytes"] > 0) == (times["streamed_bytes"] > 0) == is_read
