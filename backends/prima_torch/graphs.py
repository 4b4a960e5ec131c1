"""A pass recorded once and replayed: what it reads from step to step lies at fixed places.

Launching the few hundred kernels of a decode step one by one takes the host longer than the GPU computes them. A CUDA
graph launches them in one call, with the arguments that they were recorded with: so whatever differs between two steps
must be read from `Inputs`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""Of each array: CUDA's own allocations have it, and kernels are compiled for pointers that are multiples of 16."""
MOST_RECORDINGS = 48
"""Each takes a few MB of a GPU for its kernels' arguments. All batches at a dozen of lengths."""
RETRY_STEPS = 256

Run = Callable[[], torch.Tensor]
Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
Key = tuple[str, *tuple[Hashable, ...]]  # what is recorded, for messages, and what its shapes depend on
Arrays = Mapping[str, NDArray[Any]]  # Any: the types differ, which no static type says of a mapping


@dataclass(frozen=True, slots=True)
class Recording:
    """`replay` computes `output` again from what the inputs hold then. On a GPU it is queued, as all work there."""

    output: torch.Tensor
    replay: Callable[[], object]


class Recorder(Protocol):
    def record(self, run: Run) -> Recording:
        """`run` is called several times and must be one that can be repeated: it reads inputs, which stay, and writes
        the same values at the same places. Raises RuntimeError where it cannot be recorded."""
        ...


class CudaGraphs:
    """Recordings as CUDA graphs, which share the memory of what they compute in between: only one runs at a time, and
    an output holds until the next replay of any of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no type for it

    def record(self, run: Run) -> Recording:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()  # compiles kernels and fills caches, which cannot be done while recording
            torch.cuda.current_stream().wait_stream(self._stream)
            if not self._graphs:  # torch refuses a pool that all have left
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Calls of other threads, which serve other devices, shall not spoil the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = run()
        self._graphs.add(graph)
        return Recording(output, graph.replay)


class Reruns:
    """A stand-in where there is no GPU: a replay runs again what was recorded, with the arguments of that time."""

    def record(self, run: Run) -> Recording:
        output = run()
        return Recording(output, lambda: output.copy_(run()))


class Inputs:
    """Arrays at fixed places of a device, of the shapes and types of `arrays`; all of them go there in one copy."""

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        starts = [0, *accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values())]
        self._staged = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._placed = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        parts = [
            (name, slice(start, start + array.nbytes), array)
            for start, (name, array) in zip(starts, arrays.items(), strict=False)
        ]
        self._host = {name: self._staged.numpy()[at].view(like.dtype).reshape(like.shape) for name, at, like in parts}
        self.device: Mapping[str, torch.Tensor] = {
            name: self._placed[at].view(getattr(torch, like.dtype.name)).reshape(like.shape) for name, at, like in parts
        }

    def upload(self, arrays: Arrays) -> None:
        """Queued: not to be called again before the device was waited for."""
        for name, array in arrays.items():
            self._host[name][...] = array
        self._placed.copy_(self._staged, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Held:
    inputs: Inputs
    recording: Recording
    answer: torch.Tensor  # in the host's memory


@dataclass(slots=True)
class _Refusal:
    """What could not be recorded is tried again, as memory may have been short only then; each time later."""

    n_tries: int = 0
    n_left: int = 0

    def is_over(self) -> bool:
        """Of one more step."""
        self.n_left -= 1
        return self.n_left < 0

    def again(self) -> None:
        self.n_left = RETRY_STEPS << min(self.n_tries, 10)
        self.n_tries += 1


class Replays:
    """Recordings by what they are of; the one not used for longest goes when there are too many."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder, self._device = recorder, device
        self._held: dict[Key, Held] = {}  # in the order of their last use
        self._refused: dict[str, _Refusal] = {}

    def answer(self, key: Key, n: int, arrays: Arrays, compute: Compute) -> NDArray[np.float32] | None:
        """The first n rows of what `compute` gives for `arrays`; None where it cannot be recorded.

        With equal keys come arrays of equal shapes, and a `compute` that differs in nothing but what these hold.
        """
        if (refusal := self._refused.get(key[0])) is not None and not refusal.is_over():
            return None
        held = self._held.pop(key, None)
        if held is not None:
            held.inputs.upload(arrays)
        elif (held := self._recorded(key[0], arrays, compute)) is None:
            return None
        self._held[key] = held
        held.recording.replay()
        held.answer[:n].copy_(held.recording.output[:n], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return held.answer[:n].numpy().copy()

    def clear(self) -> None:
        self._held.clear()

    def _recorded(self, name: str, arrays: Arrays, compute: Compute) -> Held | None:
        while len(self._held) >= MOST_RECORDINGS:
            del self._held[next(iter(self._held))]
        try:
            held = self._record(arrays, compute)
        except RuntimeError as error:
            refusal = self._refused.setdefault(name, _Refusal())
            if not refusal.n_tries:
                log.warning("%s of decode steps cannot be recorded, which makes them slower: %s", name, error)
            refusal.again()
            return None
        self._refused.pop(name, None)
        return held

    def _record(self, arrays: Arrays, compute: Compute) -> Held:
        """Raises RuntimeError, also where there is no memory, on the device or pinned on the host."""
        inputs = Inputs(arrays, self._device)
        inputs.upload(arrays)
        recording = self._recorder.record(lambda: compute(inputs.device))
        return Held(inputs, recording, torch.empty(recording.output.shape, pin_memory=self._device.type == "cuda"))
