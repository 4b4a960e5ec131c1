"""Steps through what a node has loaded: from the wire or the head's engine, through its visits, to the next node.

All of it happens on the owner thread. Where weights come from disk, several steps go through as one (`gather.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from prima_core.engine.engine import StepResult
from prima_core.engine.request import Sampled
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import PlannedStep, Wanted
from prima_core.errors import ClusterError, FrameError, LinkError, LinkTimeout, ModelError, PrimaError
from prima_core.interfaces import Buffer, Step
from prima_core.ring import wire
from prima_core.ring.gather import Joined, Passing
from prima_core.ring.reports import Collected, LoadFailed, Report, Unreachable
from prima_core.ring.serving import Serving
from prima_core.ring.times import Meter

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

UNREACHABLE_AFTER_S = 10.0
"""A node that takes no frame for so long, and yet is not lost by its silence, cannot be reached from here."""
_POLL_S = 0.1


class Carrier:
    """Carries steps for node `name` as long as `is_wanted` says that the epoch is not given up."""

    def __init__(
        self, name: str, serving: Serving, meter: Meter, report: Callable[[Report], None], is_wanted: Callable[[], bool]
    ) -> None:
        self._name = name
        self._serving = serving
        self._plan = serving.assignment.plan
        self._stops = self._plan.stops
        self.epoch = serving.assignment.epoch
        self._meter = meter
        self._report = report
        self._is_wanted = is_wanted

    def start(self, launches: Sequence[PlannedStep]) -> None:
        """Steps at the input part."""
        for planned in launches:
            self._serving.wanted[planned.number] = planned.wanted
        passing = [
            Passing(planned.number, planned.step, wanted=tuple(want.row for want in planned.wanted))
            for planned in launches
        ]
        self._run(0, passing)

    def receive(self, frames: Sequence[wire.Frame]) -> None:
        """Frames that are due at the same visit; one with an error comes alone."""
        passing = []
        for frame in frames:
            try:
                self._check_place(frame)
            except FrameError as error:
                log.warning("node %s dropped a frame: %s", self._name, error)
                continue
            if frame.error is not None:
                self._pass_on_error(frame.number, frame.visit, frame.error)
            else:
                passing.append(Passing(frame.number, frame.step, frame.activation, frame.wanted))
        if passing:
            self._go_on(frames[0].visit, passing)

    def _go_on(self, visit: int, passing: Sequence[Passing]) -> None:
        if visit < len(self._plan.visits):
            self._run(visit, passing)
            return
        rows = [one.activation for one in passing if one.activation is not None]
        if visit == len(self._plan.visits):
            self._output(visit, passing, rows)
        else:
            self._finish(visit, passing, rows)

    def _check_place(self, frame: wire.Frame) -> None:
        """A frame must be for a visit of this node (or for an end of the model on it), and newer than the last."""
        here = self._stops[frame.visit]
        if here != self._name:
            raise FrameError(f"visit {frame.visit} belongs to node {here!r}, not to {self._name!r}")
        if frame.number <= self._serving.newest.get(frame.visit, 0):
            raise FrameError(f"step {frame.number} came twice or late to visit {frame.visit}")
        if frame.visit == len(self._stops) - 1:
            wanted = self._serving.wanted.get(frame.number)
            if wanted is None:
                raise FrameError(f"step {frame.number} was never launched")
            if frame.error is None and len(frame.activation) != len(wanted):
                raise FrameError(f"{len(frame.activation)} rows of step {frame.number}, {len(wanted)} are wanted")
        self._serving.newest[frame.visit] = frame.number

    # ------------------------------------------------------------ computing

    def _run(self, visit: int, passing: Sequence[Passing]) -> None:
        """Through this node's visits from `visit` on, then to the next node or the output part."""
        joined = Joined(passing)
        try:
            activation = self._through(visit, joined)
        except FrameError as error:
            if len(passing) == 1:
                self._fail(visit, passing, error)
                return
            for one in passing:  # what is wrong with one of them hurts no other, and a refused step has changed nothing
                self._run(visit, [one])
            return
        except Exception as error:  # noqa: BLE001 - the border of a step: it fails, the node lives
            self._fail(visit, passing, error)
            return
        self._hand_on(visit, joined, activation)

    def _through(self, visit: int, joined: Joined) -> NDArray[np.float32]:
        """The rows of the steps in turn, behind this node's visits."""
        activation = joined.activation()
        if activation is None:
            activation = self._embed(joined.step)
        for index in range(visit, self._behind(visit)):
            activation = self._visit(index, activation, joined)
        return joined.in_turn(activation)

    def _hand_on(self, visit: int, joined: Joined, activation: NDArray[np.float32]) -> None:
        behind, n_visits = self._behind(visit), len(self._plan.visits)
        if behind < n_visits:
            self._send_all(visit, joined.passing, behind, lambda: self._encoded(joined, behind, activation))
            return
        rows = [
            activation[[first + row for row in one.wanted]]
            for one, first in zip(joined.passing, joined.starts(), strict=True)
        ]
        if self._plan.output_node == self._name:
            self._output(visit, joined.passing, rows)
        else:
            self._send_all(visit, joined.passing, n_visits, lambda: self._encoded_rows(joined.passing, n_visits, rows))

    def _send_all(
        self, visit: int, passing: Sequence[Passing], to: int, encoded: Callable[[], list[list[Buffer]]]
    ) -> None:
        try:
            frames = encoded()
        except Exception as error:  # noqa: BLE001 - the border of a step: it fails, the node lives
            self._fail(visit, passing, error)
            return
        for frame in frames:
            self._send(to, frame)

    def _behind(self, visit: int) -> int:
        """The first stop from `visit` on that is not this node's, or that of the output part."""
        while visit < len(self._plan.visits) and self._stops[visit] == self._name:
            visit += 1
        return visit

    def _embed(self, step: Step) -> NDArray[np.float32]:
        start = self._meter.begin()
        activation = self._serving.input_shard.embed(step)
        self._meter.computed_since(start)
        return activation

    def _visit(self, index: int, activation: NDArray[np.float32], joined: Joined) -> NDArray[np.float32]:
        start = self._meter.begin()
        for part in self._plan.visits[index].parts(self._serving.first_device):
            activation = self._serving.shards[part.device].run(part.layers, activation, joined.step)
        self._meter.computed_since(start)
        if index == self._serving.first_visit:
            self._meter.n_steps += len(joined.passing)
            self._meter.n_tokens += joined.step.n_tokens
        return activation

    def _output(self, visit: int, passing: Sequence[Passing], rows: Sequence[NDArray[np.float32]]) -> None:
        """The output part, of the wanted rows of each step; the head samples from it."""
        try:
            logits = self._logits(rows)
        except Exception as error:  # noqa: BLE001 - the border of a step: it fails, the node lives
            self._fail(visit, passing, error)
            return
        if self._plan.head == self._name:
            self._finish(visit, passing, logits)
            return
        last = len(self._stops) - 1
        self._send_all(visit, passing, last, lambda: self._encoded_rows(passing, last, logits))

    def _logits(self, rows: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Of each step: [wanted rows, vocab_size]."""
        n_rows = [len(own) for own in rows]
        if not sum(n_rows):
            return [np.empty((0, self._serving.limits.vocab_size), np.float32) for _ in rows]
        start = self._meter.begin()
        logits = self._serving.output_shard.logits(np.concatenate(rows), range(sum(n_rows)))
        self._meter.computed_since(start)
        return np.split(logits, list(accumulate(n_rows[:-1])))

    def _finish(self, visit: int, passing: Sequence[Passing], logits: Sequence[NDArray[np.float32]]) -> None:
        """A token for each row of logits."""
        start = self._meter.begin()
        results = []
        for one, own in zip(passing, logits, strict=True):
            wanted = self._serving.take_wanted(one.number)
            tokens = tuple((want.sequence, _sampled(row, want)) for want, row in zip(wanted, own, strict=True))
            results.append(StepResult(one.number, tokens))
        self._meter.computed_since(start)
        for result in results:
            self._report(Collected(self.epoch, result))

    def _fail(self, visit: int, passing: Sequence[Passing], error: Exception) -> None:
        is_ours = isinstance(error, PrimaError)
        numbers = ", ".join(str(one.number) for one in passing)
        log.error("node %s failed in step %s: %s", self._name, numbers, error, exc_info=None if is_ours else error)
        message = str(error) if is_ours else f"{type(error).__name__}: {error}"
        for one in passing:
            self._pass_on_error(one.number, visit, f"node {self._name!r}: {message}")
        if isinstance(error, ModelError):  # its weights cannot be read any more
            self._report(LoadFailed(self.epoch, error))

    # ------------------------------------------------------------ to the next node

    def _encoded(self, joined: Joined, visit: int, activation: NDArray[np.float32]) -> list[list[Buffer]]:
        """A frame for each step."""
        start, frames = time.perf_counter(), []
        for one, first in zip(joined.passing, joined.starts(), strict=True):
            rows, dtype = activation[first : first + one.step.n_tokens], self._serving.assignment.wire.dtype(one.step)
            frames.append(wire.encode_activation(self.epoch, one.number, visit, one.step, rows, dtype, one.wanted))
        self._meter.send_s += time.perf_counter() - start
        return frames

    def _encoded_rows(
        self, passing: Sequence[Passing], visit: int, rows: Sequence[NDArray[np.float32]]
    ) -> list[list[Buffer]]:
        """Behind the layers: logits always in f32, the activations of a prompt's last token as those of the others."""
        start, policy = time.perf_counter(), self._serving.assignment.wire
        is_output = visit == len(self._plan.visits)
        frames = []
        for one, own in zip(passing, rows, strict=True):
            dtype = policy.dtype(one.step) if is_output else wire.WireDtype.F32
            frames.append(wire.encode_rows(self.epoch, one.number, visit, own, dtype))
        self._meter.send_s += time.perf_counter() - start
        return frames

    def _pass_on_error(self, number: int, visit: int, message: str) -> None:
        """Tell the head along the ring, behind the steps before it, so that nothing overtakes."""
        behind = visit
        while behind < len(self._stops) and self._stops[behind] == self._name:
            behind += 1
        if behind == len(self._stops):
            self._serving.take_wanted(number)
            error = ClusterError(message, hint="see the log of that node")
            self._report(Collected(self.epoch, StepResult(number, error=error)))
            return
        self._send(behind, wire.encode_error(self.epoch, number, behind, message))

    def _send(self, visit: int, frame: list[Buffer]) -> None:
        """Until it is taken, or this epoch is to be given up: by then the head has noticed a node that is lost."""
        successor = self._stops[visit]
        deadline = time.monotonic() + UNREACHABLE_AFTER_S
        start = time.perf_counter()
        while self._is_wanted():
            try:
                self._serving.links[successor].send(frame, _POLL_S)
                self._meter.send_s += time.perf_counter() - start
                self._meter.sent_bytes += sum(memoryview(part).nbytes for part in frame)
                return
            except LinkError as error:
                if not isinstance(error, LinkTimeout) or time.monotonic() > deadline:
                    log.error("node %s cannot send to %s: %s", self._name, successor, error)
                    self._report(Unreachable(self.epoch, successor, error))
                    return


def _sampled(logits: NDArray[np.float32], want: Wanted) -> Sampled | PrimaError:
    """The token, or why there is none: a row that cannot be sampled hurts no other one."""
    try:
        return sample(logits, want)
    except PrimaError as error:
        return error
