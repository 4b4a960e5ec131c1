"""How fast a device computes: some layers of the model itself are loaded, run as they are when serving, and timed.

So whatever a backend does, its own or a stranger's, is in the figure: kernels, norms, attention, the way to the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from statistics import median

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ClusterError
from prima_core.interfaces import Backend, Chunk, Device, KvKind, KvOp, Layers, Shard, Slice, Step
from prima_core.memory.system import System
from prima_core.model.weights import Model, layer_names
from prima_core.plan.profile import DeviceRates
from prima_core.ring.loading import LoadingStore
from prima_core.ring.serving import Holding, OpenStore, open_store

WEIGHT_BYTES = 384 * 1024 * 1024
"""Layers are timed that take so much together: more than caches hold. A device that is much faster gets more, so that
what a step costs besides does not count."""
FAST_WEIGHT_BYTES = 4 * WEIGHT_BYTES
MEMORY_SHARE = 3
"""And no more than this part of the memory."""
TIMED_S = 0.4
CHUNKS = (16, 128)
"""Tokens of a prompt; a slow machine is judged by the fewer."""
SLOW_S = 2.0
LEAST_RUNS = 3
_POSITIONS = 512

Stop = Callable[[], bool]


def device_rates(
    backend: Backend, device: Device, model: Model, system: System, stop: Stop, open_store: OpenStore = open_store
) -> DeviceRates:
    """In the backend's owner thread; some seconds. `stop`: whether to give up, which raises what giving up a load does.

    Raises PrimaError when the layers cannot be loaded.
    """
    layers = typical_layers(model, _bytes_for(device))
    with ExitStack() as exits:
        store = open_store(model, Holding((layers,), (), 0, 0), system)
        exits.callback(_drop, model, layers, system)
        exits.callback(store.close)
        part = Slice((layers,), context=_POSITIONS, kv_tokens=_POSITIONS)
        loading = LoadingStore(store, model.spec, (part,), _telling(stop), system)
        shard = backend.load(model.spec, device.id, part, loading)
        exits.callback(shard.close)
        return _timed(shard, layers, model, stop)


def _bytes_for(device: Device) -> int:
    wanted = WEIGHT_BYTES if device.shares_host else FAST_WEIGHT_BYTES
    growth = max(device.growth.values(), default=1.0)
    return int(min(wanted, device.memory_bytes / MEMORY_SHARE / growth))


def typical_layers(model: Model, n_bytes: int) -> Layers:
    """Layers that follow each other, of about so many bytes: those whose mean is nearest to the mean of all."""
    sizes = [
        sum(model.file.tensors[name].n_bytes for name in layer_names(model.file, layer))
        for layer in range(model.spec.n_layers)
    ]
    mean = sum(sizes) / len(sizes)
    n = min(len(sizes), max(1, int(n_bytes / mean)))
    starts = range(len(sizes) - n + 1)
    start = min(starts, key=lambda start: abs(sum(sizes[start : start + n]) - n * mean))
    return Layers(start, start + n)


def touched_bytes(model: Model, layers: Layers) -> int:
    """What a token goes through: of experts only those that are used."""
    experts, total = model.spec.experts, 0
    for info in (model.file.tensors[name] for layer in layers for name in layer_names(model.file, layer)):
        is_stack = experts is not None and len(info.shape) == 3
        total += info.n_bytes // experts.count * experts.n_used if is_stack and experts is not None else info.n_bytes
    return total


def _telling(stop: Stop) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        _check(stop)

    return tell


def _check(stop: Stop) -> None:
    if stop():
        raise ClusterError("the measurement was given up")


# ---------------------------------------------------------------- timing


def _timed(shard: Shard, layers: Layers, model: Model, stop: Stop) -> DeviceRates:
    n_bytes, width = touched_bytes(model, layers), model.spec.d_model
    decode_s = _decode_s(shard, layers, width, stop)
    prefill_bytes_s, expected_s = 0.0, decode_s
    for n_tokens in CHUNKS:
        if expected_s > SLOW_S:
            break
        took_s = _prefill_s(shard, layers, width, n_tokens, stop)
        prefill_bytes_s, expected_s = n_bytes * n_tokens / took_s, took_s * CHUNKS[-1] / n_tokens
    return DeviceRates(n_bytes / decode_s, prefill_bytes_s)


def _decode_s(shard: Shard, layers: Layers, width: int, stop: Stop) -> float:
    """Of a token: the middle one of several, one after the other of one sequence."""
    x = _activation(1, width)
    open_ = (KvOp(KvKind.OPEN, 1, capacity=_POSITIONS),)

    def step(position: int) -> float:
        return _time_of(shard, layers, x, Step((Chunk(1, position, 1),), open_ if position == 0 else ()))

    times = _enough((step(position) for position in range(_POSITIONS)), stop)
    _forget(shard, layers, width)
    return median(times)


def _prefill_s(shard: Shard, layers: Layers, width: int, n_tokens: int, stop: Stop) -> float:
    x = _activation(n_tokens, width)
    step = Step((Chunk(1, 0, n_tokens),), (KvOp(KvKind.OPEN, 1, capacity=n_tokens),))

    def run(_: int) -> float:
        took_s = _time_of(shard, layers, x, step)
        _forget(shard, layers, width)
        return took_s

    return min(_enough(map(run, count()), stop))


def _forget(shard: Shard, layers: Layers, width: int) -> None:
    shard.run(layers, _activation(0, width), Step((), (KvOp(KvKind.DROP, 1),)))


def _enough(times: Iterator[float], stop: Stop) -> list[float]:
    """As many as come in TIMED_S, without the first, which finds nothing in place; that one alone where it takes so
    long that nobody would wait for more."""
    first, done = next(times), list[float]()
    if first > SLOW_S:
        return [first]
    while sum(done) < TIMED_S or (len(done) < LEAST_RUNS and sum(done) < SLOW_S):
        _check(stop)
        time_s = next(times, None)
        if time_s is None:
            break
        done.append(time_s)
    return done


def _time_of(shard: Shard, layers: Layers, x: NDArray[np.float32], step: Step) -> float:
    start = time.perf_counter()
    shard.run(layers, x, step)
    return time.perf_counter() - start


def _activation(n_tokens: int, width: int) -> NDArray[np.float32]:
    return np.full((n_tokens, width), 0.1, np.float32)


def _drop(model: Model, layers: Layers, system: System) -> None:
    """Nothing of what was read for this stays behind."""
    for info in (model.file.tensors[name] for layer in layers for name in layer_names(model.file, layer)):
        view = model.file.view(info.name)
        system.drop(view.data, model.file.parts[info.part].path, info.offset)
