"""How fast a device computes: some layers of the model itself are loaded, run as they are when serving, and timed.

So whatever a backend does, its own or a stranger's, is in the figure: kernels, norms, attention, the way to the device.
Layers run together, as in a visit: that is the truth. One by one they tell what each type of weights has of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from prima_core.errors import ClusterError, DeviceMemoryError
from prima_core.interfaces import Backend, Device, Layers, Shard, Slice
from prima_core.memory.system import System
from prima_core.model.weights import Model, bytes_by_type, end_tensors, layer_names
from prima_core.plan.costs import chosen_share
from prima_core.plan.problem import OUTPUT, Widths
from prima_core.plan.profile import DeviceRates
from prima_core.ring.loading import LoadingStore
from prima_core.ring.serving import Holding, OpenStore, open_store
from prima_core.ring.timing import POSITIONS, Stop, layer_times, output_times
from prima_core.ring.typerates import Run, seconds_by_type

WEIGHT_BYTES = 384 * 1024 * 1024
"""Layers are timed that take so much together: more than caches hold. A device that is much faster gets more, so that
what a step costs besides does not count."""
FAST_WEIGHT_BYTES = 4 * WEIGHT_BYTES
MEMORY_SHARE = 3
"""And no more than this part of the memory."""
OUTPUT_SHARE = 2
"""The output matrix may take more of it: there is but one."""
WIDTHS = (1, 16, 128, 4)
"""Tokens of a step, what tells most first; a slow machine is judged by the fewer."""
OUTPUT_WIDTHS = (1, 16, 4)
MOST_KINDS = 4
"""Of layers with other types than the rest."""
SAME_FROM = 16
"""Tokens of a step from which on layers one by one take as long as together: what a step costs besides is nothing."""
SLOW_S = 2.0
WITHIN_S = 5.0
"""No further width is begun afterwards."""

_Kind = tuple[tuple[str, int], ...]


def device_rates(bench: Bench, n_devices: int = 1) -> DeviceRates:
    """In the backend's owner thread; some seconds, fewer where more devices have to be timed.

    Raises PrimaError when the layers cannot be loaded, DeviceMemoryError where not one of them fits, ClusterError when
    the measurement is given up.
    """
    until_s = time.perf_counter() + WITHIN_S / n_devices
    model, stop = bench.model, bench.stop
    sample = sample_of(model, _bytes_for(bench), bench.room_bytes)
    with bench.loaded(_slice(sample)) as shard:
        runs = _best(_timed(shard, sample, model, stop, until_s))
    by_type = _by_type(runs, model)
    if _output_bytes(model) <= bench.room_bytes / OUTPUT_SHARE:
        with bench.loaded(Slice((), has_output=True)) as shard:
            by_type[OUTPUT] = _output_rates(shard, model, stop)
    wide = max(runs, key=lambda run: run.width)
    return DeviceRates(
        decode_bytes_s=_rate(runs[0], model),
        prefill_bytes_s=_rate(wide, model) * wide.width if wide.width > 1 else 0.0,
        rates={name: tuple(sorted(widths)) for name, widths in by_type.items() if widths},
        copy_bytes_s=bench.copy_bytes_s if bench.device.copies else 0.0,
    )


def decode_rate(bench: Bench) -> DeviceRates:
    """Only of a token at a time. Raises as `device_rates`."""
    sample = Sample(_fitting(bench.model, _bytes_for(bench), bench.room_bytes))
    with bench.loaded(_slice(sample)) as shard:
        timed = _timed_at(1, shard, sample, False, bench.model.spec.d_model, bench.stop)
    return DeviceRates(_rate(timed, bench.model))


def _slice(sample: Sample) -> Slice:
    return Slice((sample.run, *sample.others), context=POSITIONS, kv_tokens=POSITIONS)


def _bytes_for(bench: Bench) -> int:
    wanted = WEIGHT_BYTES if bench.device.shares_host else FAST_WEIGHT_BYTES
    return int(min(wanted, bench.room_bytes / MEMORY_SHARE))


def _output_bytes(model: Model) -> int:
    names = end_tensors(model.spec, Slice((), has_output=True))
    return sum(model.file.tensors[name].n_bytes for name in names)


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True, slots=True)
class Sample:
    """`run` together; of `others` each alone, as they have types, or shares of them, that no layer of `run` has."""

    run: Layers
    others: tuple[Layers, ...] = ()

    @property
    def singles(self) -> tuple[Layers, ...]:
        return (*(Layers(layer, layer + 1) for layer in self.run), *self.others)


def sample_of(model: Model, n_bytes: int, most_bytes: float = math.inf) -> Sample:
    """Layers of about so many bytes, the rarer ones beside them as long as all fit `most_bytes`.

    Raises DeviceMemoryError where not even one does."""
    run = _fitting(model, n_bytes, most_bytes)
    kinds = [_kind(model, layer) for layer in range(model.spec.n_layers)]
    missing = set(kinds) - {kinds[layer] for layer in run}
    most_seen = sorted(missing, key=lambda kind: (-kinds.count(kind), kinds.index(kind)))
    taken_bytes = sum(_size(kinds[layer]) for layer in run)
    firsts: list[int] = []
    for kind in most_seen[:MOST_KINDS]:
        if taken_bytes + _size(kind) <= most_bytes:
            taken_bytes += _size(kind)
            firsts.append(kinds.index(kind))
    return Sample(run, tuple(Layers(first, first + 1) for first in firsts))


def _fitting(model: Model, n_bytes: int, most_bytes: float) -> Layers:
    run = typical_layers(model, n_bytes)
    taken_bytes = sum(_size(_kind(model, layer)) for layer in run)
    if taken_bytes > most_bytes:
        raise DeviceMemoryError(
            f"a layer takes {taken_bytes / 1e6:,.0f} MB, more than the {most_bytes / 1e6:,.0f} MB that may be used",
            hint="more --memory, or a device with more memory of its own",
        )
    return run


def typical_layers(model: Model, n_bytes: int) -> Layers:
    """Layers that follow each other, of about so many bytes: those whose mean is nearest to the mean of all."""
    sizes = [_size(_kind(model, layer)) for layer in range(model.spec.n_layers)]
    mean = sum(sizes) / len(sizes)
    n = min(len(sizes), max(1, int(n_bytes / mean)))
    starts = range(len(sizes) - n + 1)
    start = min(starts, key=lambda start: abs(sum(sizes[start : start + n]) - n * mean))
    return Layers(start, start + n)


def _kind(model: Model, layer: int) -> _Kind:
    return tuple(sorted(bytes_by_type(model.file, layer_names(model.file, layer)).items()))


def _size(kind: _Kind) -> int:
    return sum(n_bytes for _, n_bytes in kind)


def touched_types(model: Model, layer: int, width: int) -> dict[str, float]:
    """As of `plan.costs`."""
    experts = model.spec.experts
    tensors = [model.file.tensors[name] for name in layer_names(model.file, layer)]
    whole = sum(info.n_bytes for info in tensors)
    stacks = 0 if experts is None else sum(info.n_bytes for info in tensors if len(info.shape) == 3)
    idle = 0.0 if experts is None else 1 - chosen_share(experts.n_used, experts.count, width)
    return {name: size * (1 - stacks * idle / whole) for name, size in _kind(model, layer)}


@dataclass(slots=True)
class Bench:
    """Loads parts of the model, one at a time, and gives them back. `memory_bytes`: of the host, that the node may
    use. `stop`: whether to give up. `copy_bytes_s`: how fast they came to the device from memory, at best."""

    backend: Backend
    device: Device
    model: Model
    memory_bytes: int
    system: System
    stop: Stop
    open_store: OpenStore = open_store
    copy_bytes_s: float = 0.0

    @property
    def room_bytes(self) -> float:
        """For weights as in the file."""
        device = self.device
        room = min(device.memory_bytes, self.memory_bytes) if device.shares_host else device.memory_bytes
        return room / max(device.growth.values(), default=1.0)

    @contextmanager
    def loaded(self, part: Slice) -> Iterator[Shard]:
        names = [name for layers in part.layers for layer in layers for name in layer_names(self.model.file, layer)]
        ends = end_tensors(self.model.spec, part)
        with ExitStack() as exits:
            store = self.open_store(self.model, Holding(part.layers, ends, 0, 0), self.system)
            exits.callback(self._drop, (*names, *ends))
            exits.callback(store.close)
            loading = LoadingStore(store, self.model.spec, (part,), self._tell, self.system)
            began_s = time.perf_counter()
            shard = self.backend.load(self.model.spec, self.device.id, part, loading)
            exits.callback(shard.close)
            copying_s = time.perf_counter() - began_s - loading.disk_s
            if copying_s > 0:
                n_bytes = sum(self.model.file.tensors[name].n_bytes for name in (*names, *ends))
                self.copy_bytes_s = max(self.copy_bytes_s, n_bytes / copying_s)
            yield shard

    def _tell(self, done: int, total: int) -> None:
        if self.stop():
            raise ClusterError("the measurement was given up")

    def _drop(self, names: Sequence[str]) -> None:
        """Nothing of what was read for this stays behind."""
        file = self.model.file
        for info in (file.tensors[name] for name in names):
            view = file.view(info.name)
            self.system.drop(view.data, file.parts[info.part].path, info.offset)


# ---------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class _Timed:
    """Of steps of `width` tokens: seconds for the layers of `sample.run` together, and of each single layer."""

    sample: Sample
    width: int
    whole_s: float
    singles_s: tuple[float, ...]


def _timed(shard: Shard, sample: Sample, model: Model, stop: Stop, until_s: float) -> Iterator[_Timed]:
    """Of each width that does not take too long, the first in any case, and once more at the end: what counts most is
    not to depend on what a program did for a moment."""
    expected_s, before = 0.0, 1
    kinds = {_kind(model, layer) for layers in sample.singles for layer in layers}
    for width in WIDTHS:
        if expected_s * width / before > SLOW_S or (expected_s and time.perf_counter() > until_s):
            continue
        timed = _timed_at(width, shard, sample, len(kinds) > 1, model.spec.d_model, stop)
        expected_s, before = timed.whole_s, width
        yield timed
    if expected_s < SLOW_S / 4:
        yield _timed_at(1, shard, sample, len(kinds) > 1, model.spec.d_model, stop)


def _best(runs: Iterable[_Timed]) -> list[_Timed]:
    """Of each width the quickest."""
    best: dict[int, _Timed] = {}
    for timed in runs:
        if timed.width not in best or timed.whole_s < best[timed.width].whole_s:
            best[timed.width] = timed
    return list(best.values())


def _timed_at(width: int, shard: Shard, sample: Sample, is_mixed: bool, d_model: int, stop: Stop) -> _Timed:
    singles_s = layer_times(shard, sample.singles, width, d_model, stop) if is_mixed else ()
    whole_s = sum(singles_s[: len(sample.run)])
    if not is_mixed or width < SAME_FROM:
        [whole_s] = layer_times(shard, (sample.run,), width, d_model, stop)
    return _Timed(sample, width, whole_s, singles_s)


def _rate(timed: _Timed, model: Model) -> float:
    touched = (touched_types(model, layer, timed.width) for layer in timed.sample.run)
    return sum(sum(types.values()) for types in touched) / timed.whole_s


def _by_type(runs: Sequence[_Timed], model: Model) -> dict[str, Widths]:
    rates: dict[str, Widths] = {}
    for timed in runs:
        for name, byte_s in seconds_by_type(_parts(timed, model)).items():
            rates[name] = (*rates.get(name, ()), (timed.width, 1 / byte_s))
    return rates


def _parts(timed: _Timed, model: Model) -> list[Run]:
    """Single layers, in the time that they take among others; all together where they were not timed."""
    n_run = len(timed.sample.run)
    singles = [layers.start for layers in timed.sample.singles]
    types = [touched_types(model, layer, timed.width) for layer in singles]
    if not timed.singles_s:
        return [Run(_summed(types[:n_run]), timed.whole_s)]
    among_others = timed.whole_s / sum(timed.singles_s[:n_run])
    return [Run(of, alone_s * among_others) for of, alone_s in zip(types, timed.singles_s, strict=True)]


def _summed(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for types in layers for name in types)
    return {name: sum(types.get(name, 0.0) for types in layers) for name in names}


def _output_rates(shard: Shard, model: Model, stop: Stop) -> Widths:
    n_bytes, took_s = _output_bytes(model), 0.0
    rates: Widths = ()
    for width in OUTPUT_WIDTHS:
        if took_s * width <= SLOW_S:
            took_s = output_times(shard, width, model.spec.d_model, stop)
            rates = (*rates, (width, n_bytes / took_s))
    return rates
