"""What the plugin says of this machine before anything of MLX is imported."""

import platform
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from prima_core.interfaces import BackendOptions
from prima_mlx import plugin
from prima_mlx.plugin import prima_backends, probe


def test_offer_opens_without_help() -> None:
    [offer] = prima_backends()
    assert (offer.name, offer.api) == ("mlx", 1)
    assert offer.probe().usable
    backend = offer.open(BackendOptions())
    assert [device.id.partition(":")[0] for device in backend.devices()] == ["mlx"]
    backend.close()


@pytest.mark.parametrize("installed", [["mlx-cpu"], []], ids=["the build for CPUs", "another"])
def test_a_build_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, installed: list[str]) -> None:
    monkeypatch.setattr(plugin, "distributions", lambda name: [known for known in installed if known == name])
    assert probe().cpu_only is bool(installed)


@pytest.mark.parametrize(
    ("system", "machine", "extra"),
    [("darwin", "arm64", "mlx"), ("linux", "aarch64", "mlx-cpu"), ("win32", "AMD64", "mlx-cpu")],
)
def test_without_mlx_the_hint_names_the_extra_of_the_platform(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, extra: str
) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    said = probe()
    assert (said.usable, said.reason) == (False, "mlx is not installed")
    assert said.hint == f'pip install "prima-llm[{extra}]"'
    [offer] = prima_backends()
    assert offer.extra == extra


@pytest.mark.parametrize(("system", "usable"), [("linux", False), ("darwin", False), ("win32", True)])
def test_mlx_without_what_computes_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, usable: bool
) -> None:
    """On Windows that lies in the package itself."""
    front = ModuleSpec("mlx", None, is_package=True)
    front.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(plugin, "find_spec", lambda name: front)
    monkeypatch.setattr(sys, "platform", system)
    said = probe()
    assert said.usable is usable
    if not usable:
        assert "none of its libraries" in said.reason
        assert "prima-llm[mlx" in said.hint
