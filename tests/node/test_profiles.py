"""What a node measures of its machine, and what it keeps of that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import msgspec
import pytest
from msgspec.structs import replace

from prima_core.interfaces import Device
from prima_core.memory.disks import disk_name, machine_name
from prima_core.memory.system import host
from prima_core.model.weights import Model
from prima_core.node import profiling
from prima_core.node.profiles import Profiles, cache_folder, key_of
from prima_core.node.profiling import Measurer
from prima_core.plan.problem import DeviceFacts
from prima_core.plan.profile import DeviceRates, Profile

if TYPE_CHECKING:
    from prima_core.node.node import Node

CPU = Device("numpy:cpu", 1000, "CPU, 4 threads")
FOUND = {"numpy:cpu": DeviceRates(9e9, 80e9)}
PROFILE = Profile("m", "m 8:0", 1e9, FOUND)


def test_a_profile_is_kept(tmp_path: Path) -> None:
    kept = Profiles(tmp_path / "new")
    assert kept.load("key") is None
    kept.save("key", PROFILE)
    assert kept.load("key") == PROFILE
    assert kept.load("other") is None
    assert os.listdir(tmp_path / "new" / "profiles") == ["key.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"disk_bytes_s": -1}', b'{"disk_bytes_s": NaN}', b"\xff", b"[" * 9999])
def test_a_kept_profile_that_is_damaged_is_none(tmp_path: Path, damage: bytes) -> None:
    kept = Profiles(tmp_path)
    kept.save("key", PROFILE)
    next((tmp_path / "profiles").iterdir()).write_bytes(damage)
    assert kept.load("key") is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Profiles(tmp_path / "file")
    kept.save("key", PROFILE)
    assert kept.load("key") is None


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "prima"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "prima"


def test_a_profile_holds_for_what_computes_and_for_the_kind_of_model(open_models: dict[str, Model]) -> None:
    llama, qwen = open_models["llama"], open_models["qwen2"]
    key = key_of(llama, [CPU], "8:0")
    assert key == key_of(llama, [Device("numpy:cpu", 77, "CPU, 4 threads")], "8:0"), "whatever memory is free"
    others = (
        key_of(qwen, [CPU], "8:0"),
        key_of(llama, [CPU], "8:16"),
        key_of(llama, [Device("numpy:cpu", 1000, "CPU, 2 threads")], "8:0"),
    )
    assert len({key, *others}) == 4


def test_a_device_has_the_rates_of_its_name() -> None:
    known, unknown = PROFILE.rated(DeviceFacts("numpy:cpu", 5)), PROFILE.rated(DeviceFacts("mlx:gpu", 5))
    assert known == DeviceFacts("numpy:cpu", 5, decode_bytes_s=9e9, prefill_bytes_s=80e9)
    assert unknown == DeviceFacts("mlx:gpu", 5)


# ---------------------------------------------------------------- measuring


@dataclass
class Machine:
    """A node whose disk and device are as fast as is said here."""

    folder: Path
    disk_bytes_s: float = 1e9
    decode_bytes_s: float = 9e9
    n_measured: int = 0
    n_checked: int = 0
    busy_for: int = 0
    asked: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    answers: bool = True
    devices: tuple[Device, ...] = (CPU,)

    @property
    def node(self) -> Node:
        return cast("Node", SimpleNamespace(devices=self.devices, worker=self))

    def measure(
        self, model: Model, memory_bytes: int, stop: Callable[[], bool], is_brief: bool = False
    ) -> Future[dict[str, DeviceRates]]:
        self.n_measured += not is_brief
        self.n_checked += is_brief
        result: Future[dict[str, DeviceRates]] = Future()
        share = 0.5 if self.busy_for else 1.0
        self.busy_for = max(0, self.busy_for - 1)
        if self.answers:
            result.set_result({"numpy:cpu": DeviceRates(share * self.decode_bytes_s, 0.0 if is_brief else 80e9)})
        return result

    def disk_rate(self, paths: list[Path], memory_bytes: int, system: object) -> float:
        self.asked.append(memory_bytes)
        return self.disk_bytes_s if memory_bytes < 100 else 0.0

    def measurer(self, stop: Callable[[], bool] = lambda: False) -> Measurer:
        return Measurer(Profiles(self.folder), host(), self.told.append, stop)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(profiling, "disk_rate", made.disk_rate)
    monkeypatch.setattr(profiling, "random_disk_rate", lambda paths, system: 7e8)
    monkeypatch.setattr(profiling, "memory_rate", lambda memory_bytes: 3e10)
    monkeypatch.setattr(profiling, "SMALL_BYTES", 0)
    return made


def test_a_machine_is_measured_once(machine: Machine, llama: Model) -> None:
    first, second = (machine.measurer().profile(machine.node, llama, 50) for _ in "ab")
    assert first == second == Profile(machine_name(), disk_name(llama.path), 1e9, FOUND, 7e8, 3e10)
    assert (machine.n_measured, machine.n_checked) == (1, 1)
    assert [line.partition(":")[0] for line in machine.told] == [machine.told[0].partition(":")[0], "disk"]


def test_a_model_that_fits_has_not_even_its_disk_looked_at_again(machine: Machine, llama: Model) -> None:
    machine.measurer().profile(machine.node, llama, 50)
    machine.disk_bytes_s = 1e6
    assert machine.measurer().profile(machine.node, llama, 200).disk_bytes_s == 1e9
    assert machine.n_measured == 1


@pytest.mark.parametrize(("now", "n_measured"), [(0.8e9, 1), (1.2e9, 1), (0.7e9, 2), (1.3e9, 2)])
def test_a_disk_that_has_changed_means_another_machine(
    machine: Machine, llama: Model, now: float, n_measured: int
) -> None:
    machine.measurer().profile(machine.node, llama, 50)
    machine.disk_bytes_s = now
    assert machine.measurer().profile(machine.node, llama, 50).disk_bytes_s == (now if n_measured == 2 else 1e9)
    assert machine.n_measured == n_measured


@pytest.mark.parametrize(("now", "n_measured"), [(7e9, 1), (11e9, 1), (6e9, 2), (12e9, 2)])
def test_a_device_that_has_changed_is_measured_anew(
    machine: Machine, llama: Model, now: float, n_measured: int
) -> None:
    machine.measurer().profile(machine.node, llama, 200)
    machine.decode_bytes_s = now
    found = machine.measurer().profile(machine.node, llama, 200)
    assert machine.n_measured == n_measured
    assert found.devices["numpy:cpu"].decode_bytes_s == (now if n_measured == 2 else 9e9)
    assert ("numpy:cpu computes" in " ".join(machine.told)) == (n_measured == 2)


def test_a_device_that_was_busy_for_a_moment_is_not_measured_anew(machine: Machine, llama: Model) -> None:
    machine.measurer().profile(machine.node, llama, 200)
    machine.busy_for = 1
    machine.measurer().profile(machine.node, llama, 200)
    assert (machine.n_measured, machine.n_checked) == (1, 2)


def test_a_device_that_cannot_be_looked_at_again_is_as_it_was(machine: Machine, llama: Model) -> None:
    first = machine.measurer().profile(machine.node, llama, 200)
    machine.decode_bytes_s = 0
    assert machine.measurer().profile(machine.node, llama, 200) == first


def test_a_backend_that_hangs_is_not_waited_for(
    machine: Machine, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "GIVE_UP_AFTER_S", 0.0)
    monkeypatch.setattr(profiling, "HANGS_AFTER_S", 0.01)
    machine.answers = False
    found = machine.measurer().profile(machine.node, llama, 50)
    assert (found.disk_bytes_s, found.devices) == (1e9, {})
    assert machine.told[-2].startswith("a device hangs")
    assert not (machine.folder / "profiles").exists()


def test_a_profile_without_one_of_the_devices_is_not_kept_and_says_whose_rate_is_missing(
    machine: Machine, llama: Model
) -> None:
    machine.devices = (CPU, Device("torch:cuda:0", 1000, "a card whose driver has gone"))
    found = machine.measurer().profile(machine.node, llama, 50)
    assert found.devices == FOUND
    assert not (machine.folder / "profiles").exists()
    assert machine.told[-1].startswith("how fast torch:cuda:0 computes is not known")


def test_what_was_kept_without_one_of_the_devices_is_not_used(machine: Machine, llama: Model) -> None:
    machine.measurer().profile(machine.node, llama, 50)
    [kept] = (machine.folder / "profiles").iterdir()
    kept.write_bytes(msgspec.json.encode(replace(PROFILE, devices={})))
    machine.measurer().profile(machine.node, llama, 50)
    assert machine.n_measured == 2


def test_who_wants_it_afresh_gets_it(machine: Machine, llama: Model) -> None:
    for _ in "ab":
        machine.measurer().measure(machine.node, llama, 50)
    assert machine.n_measured == 2


def test_a_small_model_is_not_measured(machine: Machine, llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SMALL_BYTES", llama.file.size + 1)
    assert machine.measurer().profile(machine.node, llama, 50) == Profile(machine_name())
    assert machine.asked == []


def test_giving_up_leaves_nothing_behind(machine: Machine, llama: Model) -> None:
    machine.answers = False
    found = machine.measurer(lambda: machine.n_measured > 0).profile(machine.node, llama, 50)
    assert found.devices == {}
    assert not (machine.folder / "profiles").exists()


def test_a_full_disk_keeps_no_part_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    profiles = Profiles(tmp_path)
    profiles.save("key", Profile())
    assert list((tmp_path / "profiles").iterdir()) == []
    assert profiles.load("key") is None
