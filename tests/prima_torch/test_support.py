from __future__ import annotations

import ctypes
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prima_core.interfaces import BackendOptions
from prima_torch import support as support_module
from prima_torch.plugin import prima_backends
from prima_torch.support import CUDA_BUILDS, Support, look

CPU_BUILD = Support("2.13.0+cpu", None, "there is no driver for NVIDIA's GPUs")
GPU = Support("2.13.0", (13, 0), (13, 1))


def test_the_installed_torch_is_looked_at() -> None:
    support = look()
    assert support is not None
    assert support.torch == torch.__version__
    assert support.cuda == (torch.version.cuda and tuple(map(int, torch.version.cuda.split("."))))


@pytest.mark.parametrize(
    ("support", "fault", "hint"),
    [
        (GPU, "", ""),
        (Support("2.13.0", (12, 8), (13, 0)), "", ""),
        (Support("2.13.0", (12, 8), (12, 2)), "", ""),  # within a major version drivers and libraries mix
        (Support("2.13.0", (13, 0), (12, 9)), "too old: it can do CUDA 12.9, torch needs 13.0", "update the driver"),
        (Support("2.13.0", (13, 0), "no GPU that it can use"), "no GPU that it can use", ""),
    ],
    ids=["newer driver", "much newer driver", "older minor", "older major", "no GPU"],
)
def test_what_keeps_from_a_gpu(support: Support, fault: str, hint: str) -> None:
    assert fault in support.fault
    assert bool(fault) == bool(support.fault)
    assert hint in support.hint
    assert bool(hint) == bool(support.hint)


@pytest.mark.parametrize(("platform", "hint"), [("linux", CUDA_BUILDS), ("win32", CUDA_BUILDS), ("darwin", "")])
def test_a_build_without_cuda_is_told_where_there_is_one(
    platform: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert CPU_BUILD.fault == "torch 2.13.0+cpu was built without CUDA"
    assert hint in CPU_BUILD.hint
    assert bool(hint) == bool(CPU_BUILD.hint)


@pytest.mark.parametrize(
    ("built", "others"), [("hip = '7.1.52802'", "AMD's GPUs (ROCm)"), ("xpu = '20250302'", "Intel's GPUs (XPU)")]
)
def test_a_build_for_other_gpus_is_told_as_such(
    built: str, others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch/version.py of such a build says it."""
    (tmp_path / "version.py").write_text(
        f"__version__ = '2.13.0+other'\ncuda = None\nhip = None\nxpu = None\n{built}\n"
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(support_module, "find_spec", lambda name: spec)
    [plugin] = prima_backends()
    probe = plugin.probe()
    said = f"on the CPU only: torch 2.13.0+other was built for {others}, which prima does not use"
    assert (probe.usable, probe.cpu_only, probe.reason) == (True, True, said)
    assert "numpy:cpu" in probe.hint


def test_the_driver_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(pointer: object) -> int:
        pointer._obj.value = 12080  # type: ignore[attr-defined]  # what ctypes.byref makes
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda _: 0, cuDriverGetVersion=version))
    found = look()
    assert found is not None
    assert found.driver == (12, 8)


def test_a_driver_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda _: 100))
    found = look()
    assert found is not None
    assert found.driver == "NVIDIA's driver finds no GPU that it can use (error 100)"


@pytest.mark.skipif(sys.platform == "win32", reason="Triton for Windows comes with a compiler")
def test_triton_needs_a_c_compiler_and_pythons_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_module, "find_spec", lambda name: name)
    monkeypatch.setattr(support_module, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(Path(__file__).parent / "no headers")})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "Python's header files" in GPU.triton_fault
    monkeypatch.setattr(support_module, "which", lambda name: None)
    assert GPU.triton_fault == "triton needs a C compiler, and there is no gcc"
    [plugin] = prima_backends()
    monkeypatch.setattr(support_module, "look", lambda: GPU)
    assert plugin.probe().reason.endswith("; slower than it could be: triton needs a C compiler, and there is no gcc")
    assert plugin.probe().hint
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not GPU.triton_fault


@pytest.mark.parametrize(
    ("support", "says"),
    [(GPU, "13.0, the driver can do 13.1"), (CPU_BUILD, "none: torch 2.13.0+cpu was built without CUDA")],
)
def test_describe(support: Support, says: str) -> None:
    assert support.describe() == says


@pytest.mark.parametrize(
    ("found", "usable", "reason", "hint"),
    [
        (None, False, "torch is not installed", 'pip install "prima-llm[torch]"'),
        (CPU_BUILD, True, "on the CPU only: torch 2.13.0+cpu was built without CUDA", CPU_BUILD.hint),
        (GPU, True, "CUDA 13.0, the driver can do 13.1", ""),
    ],
    ids=["missing", "cpu", "gpu"],
)
def test_the_probe_says_what_is_missing(
    found: Support | None, usable: bool, reason: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_module, "look", lambda: found)
    [plugin] = prima_backends()
    probe = plugin.probe()
    assert (probe.usable, probe.reason, probe.hint, probe.cpu_only) == (usable, reason, hint, found is CPU_BUILD)


def test_the_plugin_opens_the_backend() -> None:
    [plugin] = prima_backends()
    assert [device.id for device in plugin.open(BackendOptions(kernels="torch")).devices()][-1] == "torch:cpu"
