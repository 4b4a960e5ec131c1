"""What this machine was measured at, kept for the next start in the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec
import rich_click as click

from prima_core.interfaces import Device
from prima_core.memory.cgroups import slowing
from prima_core.model.weights import Model, bytes_by_type
from prima_core.plan.profile import Profile

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
FORMAT = 2
"""Of what a profile says: what an older one left out is not taken for unknown."""


def cache_folder() -> Path:
    """Where the system wants files of a user that may be lost."""
    if sys.platform == "win32":
        return Path(click.get_app_dir("prima", roaming=False)) / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "prima"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prima"


class Profiles:
    """Kept profiles, each under what it depends on: another machine, model, limit or version has another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def lock(self) -> Path:
        return self._folder / "measuring.lock"

    def load(self, key: str) -> Profile | None:
        """None where there is none, or nothing that can be read."""
        try:
            with self._path(key).open("rb") as file:
                return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=Profile)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def save(self, key: str, profile: Profile) -> None:
        """As far as the folder can be written to."""
        path = self._path(key)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.encode(profile))
            beside.replace(path)
        except OSError as error:
            log.info("the profile of this machine is not kept: %s", error)
            with suppress(OSError):  # a full disk leaves part of it
                beside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / "profiles" / f"{key}.json"


def key_of(model: Model, devices: Sequence[Device], disk: str) -> str:
    """What the figures depend on, as a file name. Of the model that is its shape and its types: another file of the
    same kind is as fast. `disk`: without what changes from start to start."""
    machine = platform.node(), platform.machine(), platform.processor(), os.cpu_count(), sorted(slowing(Path("/proc")))
    computes = [(device.id, device.summary) for device in devices]
    spec = model.spec
    shape = spec.arch, spec.n_layers, spec.d_model, bytes_by_type(model.file, model.file.tensors)
    facts = FORMAT, version("prima-llm"), machine, computes, shape, disk
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
