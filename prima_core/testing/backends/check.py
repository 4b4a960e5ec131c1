"""`check_backend`: whether a backend does what `interfaces.Backend` and `arch.ops.Ops` say, with tiny models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Device, KvType
from prima_core.testing.backends import border, kv, numbers, ops, streaming
from prima_core.testing.backends.subject import Models, Subject, Tolerance
from prima_core.testing.examples import ARCHS, TYPES
from prima_core.testing.limits import watched
from prima_core.testing.report import Recorder, Report
from prima_core.testing.tinymodel import Arch, MatrixType

Open = Callable[[BackendOptions], Backend]
AUTO, STANDARD = BackendOptions(), Tolerance()
LIMIT_S = 300.0  # some compile kernels when they are first called
MAX_BATCH = 128

T = TypeVar("T")


def check_backend(
    backend: BackendPlugin | Open,
    *,
    device: str | None = None,
    options: BackendOptions = AUTO,
    tolerance: Tolerance = STANDARD,
    types: Iterable[MatrixType] = TYPES,
    families: Iterable[Arch] = ARCHS,
    kv_types: Iterable[KvType] = tuple(KvType),
    batches: Iterable[int] = numbers.BATCHES,
    limit_s: float = LIMIT_S,
) -> Report:
    """Check one device of a backend against the exact twin; `device` None: its first. See `Tolerance`.

    `backend` is the plugin, or only its `open`. All calls come from one thread, which is not the main one. A type or
    family that the backend refuses by ModelError is reported as not offered. All types and families take some seconds:
    choose fewer for a slow backend. A check that takes longer than `limit_s` seconds hangs, and is the last one. Raises
    CheckFailed with all that is wrong, PluginError when the backend says that it is not usable here, ConfigError for a
    wrong argument and without the `gguf` package.
    """
    if not callable(backend) and not isinstance(backend, BackendPlugin):
        raise ConfigError(f"{backend!r} is no backend", hint="give the BackendPlugin, or its `open`")
    if find_spec("gguf") is None:
        raise ConfigError("the kit writes tiny models with the package gguf", hint='pip install "prima-llm[testing]"')
    selection = Selection(
        _chosen("types", types, TYPES),
        _chosen("families", families, ARCHS),
        _chosen("kv_types", kv_types, tuple(KvType)),
        _chosen("batches", batches, range(1, MAX_BATCH + 1)),
    )
    # What hangs may still have files open, which some systems do not let go.
    with tempfile.TemporaryDirectory(prefix="prima-check-", ignore_cleanup_errors=True) as folder:
        recorder = Recorder()
        suite = _Suite(Path(folder), options, tolerance, selection, recorder)
        report = watched(recorder, partial(suite.run, backend, device), limit_s, _HANGS)
        return (report or recorder.report(f"backend {getattr(backend, 'name', '')}".strip())).demand()


_HANGS = "no check could follow it; where it is only slow, give more time or fewer types and families"


def _chosen(what: str, chosen: Iterable[T], known: Sequence[T]) -> tuple[T, ...]:
    if isinstance(chosen, str):  # else each of its letters would be one
        raise ConfigError(f"{what} is {str(chosen)!r}", hint="give a list")
    wanted = tuple(chosen)
    for one in wanted:
        if one not in known:
            there = f"{known[0]} to {known[-1]}" if isinstance(known, range) else ", ".join(map(str, known))
            raise ConfigError(f"{what} has {one!r}", hint=f"there are: {there}")
    return wanted


@dataclass(frozen=True, slots=True)
class Selection:
    types: tuple[MatrixType, ...]
    families: tuple[Arch, ...]
    kv_types: tuple[KvType, ...]
    batches: tuple[int, ...]


class _Suite:
    """All of it runs in the owner thread."""

    def __init__(
        self,
        folder: Path,
        options: BackendOptions,
        tolerance: Tolerance,
        selection: Selection,
        recorder: Recorder,
    ) -> None:
        self._models = Models(folder)
        self._options, self._tolerance, self._selection = options, tolerance, selection
        self._recorder = recorder

    def run(self, backend: BackendPlugin | Open, device: str | None) -> Report:
        try:
            if isinstance(backend, BackendPlugin):
                return self._run_plugin(backend, device)
            return self._run_open(backend, device, name=None)
        finally:
            self._models.close()

    def _run_plugin(self, plugin: BackendPlugin, device: str | None) -> Report:
        check = self._recorder.run
        checks = {"descriptor": border.check_descriptor, "probe": border.check_probe}
        if not all([check(name, partial(one, plugin)) for name, one in checks.items()]):
            return self._recorder.report(f"backend {plugin.name}")
        probe = plugin.probe()
        if not probe.usable:
            raise PluginError(f"backend {plugin.name!r} is not usable here: {probe.reason}", hint=probe.hint)
        return self._run_open(plugin.open, device, plugin.name)

    def _run_open(self, open_backend: Open, device: str | None, name: str | None) -> Report:
        check = self._recorder.run
        check("options", partial(border.check_options, open_backend))
        opened: list[Backend] = []
        if not check("open", lambda: opened.append(open_backend(self._options))):
            return self._recorder.report(f"backend {name or ''}".strip())
        [backend] = opened
        subject = f"backend {name or type(backend).__name__}"
        try:
            check("describe", partial(border.check_describe, backend))
            if check("devices", partial(border.check_devices, backend, name)):
                chosen = _device(backend, device)
                subject = f"backend {chosen.id.partition(':')[0]} on {chosen.id}"
                self._check_device(Subject(backend, chosen, self._tolerance, self._models))
        finally:
            check("close of the backend", backend.close)
        return self._recorder.report(subject)

    def _check_device(self, subject: Subject) -> None:
        check = self._recorder.run
        self._check_ops(subject)
        for type in self._selection.types:
            check(f"type {type}", partial(numbers.check_type, subject, type))
        for family in self._selection.families:
            check(f"family {family}", partial(numbers.check_family, subject, family))
        for n in self._selection.batches:
            check(f"a chunk of {n}", partial(numbers.check_chunk, subject, n))
            check(f"{n} sequences together", partial(numbers.check_company, subject, n))
        for cut in numbers.CUTS:
            check(f"layers cut: {cut.name}", partial(numbers.check_cut, subject, cut))
        for name, tiny in streaming.MODELS.items():
            check(f"a store that streams: {name}", partial(streaming.check_streamed, subject, tiny))
        for kv_type in self._selection.kv_types:
            self._check_kv(subject, kv_type)
        for name, border_check in BORDER.items():
            check(name, partial(border_check, subject))

    def _check_ops(self, subject: Subject) -> None:
        """Before the Shard: where an operation is wrong, the rest is wrong for that reason."""
        check = self._recorder.run
        pairs: list[ops.Pair] = []
        check("ops", lambda: pairs.append(ops.Pair.of(subject)))
        for pair in pairs:
            for name, ops_check in ops.CHECKS.items():
                check(f"ops {name}", partial(ops_check, pair))
            for type in self._selection.types:
                check(f"ops matrix {type}", partial(ops.check_matrix, pair, type))

    def _check_kv(self, subject: Subject, kv_type: KvType) -> None:
        """The scenarios, where the type is offered at all."""
        check = self._recorder.run
        if check(f"kv {kv_type}", partial(kv.check_type, subject, kv_type)):
            for name, scenario in kv.SCENARIOS.items():
                check(f"kv {kv_type}: {name}", partial(kv.check_scenario, subject, scenario, kv_type))


BORDER = {
    "arrays handed out": border.check_handed_out,
    "arrays taken in": border.check_taken_in,
    "rows of logits": border.check_rows,
    "ends of the model": border.check_ends,
    "wrong input": border.check_wrong_input,
    "unknown device": border.check_unknown_device,
    "memory": border.check_memory,
    "close of a shard": border.check_close,
}


def _device(backend: Backend, id: str | None) -> Device:
    devices = backend.devices()
    for device in devices:
        if id in (None, device.id):
            return device
    raise PluginError(f"there is no device {id!r}", hint=f"there are: {', '.join(device.id for device in devices)}")
