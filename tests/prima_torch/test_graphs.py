"""Recordings that could not be made at first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from prima_torch import graphs
from prima_torch.graphs import Recording, Replays, Reruns


class Refusing:
    """As a GPU that has no memory for a recording, `n_times`."""

    def __init__(self, n_times: int) -> None:
        self.n_times, self.asked = n_times, 0

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        self.asked += 1
        if self.asked <= self.n_times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Reruns().record(run)


def test_what_was_refused_is_tried_again_later_and_later_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "RETRY_STEPS", 3)
    replays = Replays(recorder := Refusing(2), torch.device("cpu"))
    asked, answers = [], []
    for step in range(13):
        arrays = {"x": np.full((1, 2), step, np.float32)}
        answers.append(replays.answer(("the layers", 1), 1, arrays, lambda inputs: inputs["x"] + 1))
        asked.append(recorder.asked)
    assert asked == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert [answer is None for answer in answers] == [True] * 11 + [False] * 2
    assert [float(answer[0, 0]) for answer in answers if answer is not None] == [12, 13]
    assert sum("cannot be recorded" in message for message in caplog.messages) == 1


def test_others_are_recorded_meanwhile() -> None:
    replays = Replays(Refusing(1), torch.device("cpu"))
    arrays = {"x": np.ones((1, 2), np.float32)}
    assert replays.answer(("the layers", 1), 1, arrays, lambda inputs: inputs["x"]) is None
    assert replays.answer(("the output", 1), 1, arrays, lambda inputs: inputs["x"]) is not None


@pytest.mark.parametrize("nth", [1, 2, 3], ids=["staged", "on the device", "answer"])
def test_what_a_recording_has_no_memory_for_is_computed_without_it(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    n_taken = 0

    def full(take: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def taken(*args: object, **options: object) -> torch.Tensor:
            nonlocal n_taken
            n_taken += 1
            if n_taken == nth:
                raise RuntimeError("CUDA error: out of memory")  # of cudaHostAlloc: not torch's OutOfMemoryError
            return take(*args, **options)

        return taken

    replays = Replays(Reruns(), torch.device("cpu"))
    arrays = {"x": np.ones((1, 2), np.float32)}
    with monkeypatch.context() as short:
        short.setattr(torch, "zeros", full(torch.zeros))
        short.setattr(torch, "empty", full(torch.empty))
        assert replays.answer(("the layers", 1), 1, arrays, lambda inputs: inputs["x"]) is None
    assert n_taken == nth
    assert replays.answer(("the output", 1), 1, arrays, lambda inputs: inputs["x"]) is not None
