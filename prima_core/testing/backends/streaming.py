"""Whether logits are right where a store streams: tensors that lie elsewhere in every pass, and garbage behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prima_core.model.names import OUTPUT
from prima_core.testing.backends.subject import IDS, FloatArray, Subject, close_to_exact
from prima_core.testing.driving import joined, opened, step_of
from prima_core.testing.examples import example
from prima_core.testing.report import Figures, expect
from prima_core.testing.streaming import PoisonedStore
from prima_core.testing.tinymodel import TinyModel

MODELS: dict[str, TinyModel] = {
    "llama": example("llama", "Q8_0"),
    "biases and a tied output": example("qwen2"),
    "fused maps": example("phi3"),
    "experts": replace(example("mixtral"), n_experts=3, n_experts_used=3),
}
_HINT = (
    "views of streamed tensors hold from acquire to release; where the mapping is another, they lie elsewhere: use them"
    " there, or copy them again"
)


def check_streamed(subject: Subject, tiny: TinyModel) -> Figures:
    """The same text by a store that streams nothing, half of the tensors, all of them, and half again."""
    rows: list[FloatArray] = []
    store = PoisonedStore(subject.models.open(tiny).store(), _half)
    with subject.offered(tiny, store=store) as model:
        rows.append(model.logits(step_of(0, IDS[:9], kv=[opened(0, 32)])))
        for i, streams in enumerate((_half, _half, _all, _all, _half, _none, _none, _half, _half)):
            store.streams = streams
            at = 9 + i
            rows.append(model.logits(step_of(0, IDS[at : at + 1], at)))
            expect(not store.held, "every acquired layer to be released", f"layers {store.held} are held")
        last = joined(step_of(0, IDS[18:20], 18), step_of(1, IDS[:7], kv=[opened(1, 8)]))
        rows.append(model.logits(last))
    exact = subject.models.exact(tiny, IDS[:20])
    expected, limit = np.concatenate([exact, exact[:7]]), subject.tolerance.of(tiny)
    error = close_to_exact(np.concatenate(rows), expected, limit, "logits from a store that streams", _HINT)
    return {"error": error, "acquired": len(store.acquired)}


def _none(name: str) -> bool:
    return False


def _half(name: str) -> bool:
    """Of each layer, others in neighbours; and an output matrix of its own."""
    return sum(name.encode()) % 2 == 0 or name == OUTPUT


def _all(name: str) -> bool:
    return True
