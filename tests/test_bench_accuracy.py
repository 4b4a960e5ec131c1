"""bench/accuracy.py: the built-in model in every type, by native kernels and by the exact twin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from bench import accuracy
from bench.accuracy import FloatArray, accuracies, compared, perplexity
from bench.accuracy_quantise import quantised
from bench.accuracy_text import held_out
from bench.memory_store import MemoryStore
from prima_core.arch.families import open_model
from prima_core.commands.setup import model_path
from prima_core.model.quant import GGUFType
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.weights import Model
from prima_numpy.kernels import Kernels
from prima_numpy.quant import dequantize
from tests.builtin.rewordings import load_cases

# What a type loses of normally distributed weights, as a share of them.
ERRORS = {
    "F32": 0, "F16": 0.001, "BF16": 0.003, "Q8_0": 0.007, "Q4_0": 0.1, "Q4_1": 0.09, "Q5_0": 0.05, "Q5_1": 0.05,
    "Q2_K": 0.36, "Q3_K": 0.18, "Q4_K": 0.09, "Q5_K": 0.05, "Q6_K": 0.025, "IQ1_S": 0.5, "IQ1_M": 0.47,
    "IQ2_XXS": 0.38, "IQ2_XS": 0.34, "IQ2_S": 0.28, "IQ3_XXS": 0.21, "IQ3_S": 0.16, "IQ4_NL": 0.09, "IQ4_XS": 0.09,
    "MXFP4": 0.13,
}  # fmt: skip
TEXTS = [[5, 6, 7, 8], [300, 2, 1]]


@pytest.fixture(scope="module")
def builtin() -> Iterator[Model]:
    with model_path(None) as path, open_model(path) as model:
        yield model


@pytest.mark.parametrize("type", GGUFType)
def test_blocks_of_every_type_are_near_the_weights_by_two_readings(type: GGUFType) -> None:
    weights = np.random.default_rng(0).normal(0.001, 0.02, (24, 512)).astype(np.float32)
    weights[3, :256] = 0
    weights[4] *= 100
    data = quantised(type, weights)
    stored = dequantize(type, data, weights.shape)
    loss = np.linalg.norm(stored - weights, axis=1) / np.linalg.norm(weights, axis=1)
    assert loss.max() <= 1.15 * ERRORS[type.name]
    assert loss.mean() <= ERRORS[type.name]
    assert not stored[3, :256].any()
    if type.name in ("F32", "F16"):  # the package has them as plain arrays
        return
    rows = data.reshape(len(weights), -1)
    np.testing.assert_array_equal(gguf.dequantize(rows, gguf.GGMLQuantizationType(type)), stored)


def test_text_is_the_held_out_questions_up_to_the_answer_and_whole_chats(builtin: Model) -> None:
    tokenizer = Tokenizer.from_metadata(builtin.file.metadata)
    texts, cases = held_out(tokenizer), load_cases()
    questions = [tokenizer.decode(text, skip_special=False) for text in texts[: len(cases)]]
    for question, case in zip(questions, cases, strict=True):
        assert question.endswith(f"<|im_start|>user\n{case.ask}<|im_end|>\n<|im_start|>assistant\n")
    assert all(tokenizer.decode(text, skip_special=False).endswith("<|im_end|>\n") for text in texts[len(cases) :])
    assert 3000 < sum(map(len, texts)) < 6000
    assert max(map(len, texts)) <= builtin.spec.context_length


@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.Q4_K])
def test_native_logits_are_near_those_of_the_exact_twin_with_every_variant(builtin: Model, type: GGUFType) -> None:
    [found] = accuracies(builtin, [type], TEXTS)
    assert (found.type, found.other_variants) == (type.name, ())
    assert 0.99 < found.accuracy.cosine_least <= found.accuracy.cosine_mean <= 1 + 1e-12
    assert found.accuracy.perplexity == pytest.approx(found.accuracy.perplexity_exact, rel=0.05)


def test_a_variant_with_other_bits_is_named_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def logits(model: Model, store: MemoryStore, variant: str | None, texts: object) -> list[FloatArray]:
        return [np.eye(len(text), 512, dtype=np.float32) + np.float32(variant == "odd") for text in TEXTS]

    monkeypatch.setattr(accuracy, "logits", logits)
    monkeypatch.setattr(accuracy, "held_out", lambda tokenizer: TEXTS)
    monkeypatch.setattr(Kernels, "variants", lambda: ("best", "same", "odd"))
    numbers = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["accuracy", "--types", "F16", "--json", str(numbers)])

    assert accuracy.main() == 1

    assert "DIFFERENT: odd" in capsys.readouterr().out
    [row] = json.loads(numbers.read_text())["types"]
    assert (row["type"], row["other_variants"], row["same_greedy_share"]) == ("F16", ["odd"], 1.0)


def test_texts_that_go_together_get_the_logits_that_they_get_alone(builtin: Model) -> None:
    store = accuracy.requantised(builtin, GGUFType.Q8_0)
    together = accuracy.logits(builtin, store, "portable", TEXTS)
    for text, logits in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(accuracy.logits(builtin, store, "portable", [text])[0], logits)


def test_equal_logits_agree_in_full_and_opposite_ones_not_at_all() -> None:
    logits = [np.eye(4, 512, dtype=np.float32), np.eye(3, 512, dtype=np.float32)]
    same, opposite = (compared(other, logits, TEXTS) for other in (logits, [-rows for rows in logits]))
    assert (same.cosine_least, same.same_greedy_share) == (1.0, 1.0)
    assert same.perplexity == same.perplexity_exact
    assert (opposite.cosine_mean, opposite.same_greedy_share) == (-1.0, 0.0)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    assert perplexity([np.zeros((4, 512), np.float32), np.zeros((3, 512), np.float32)], TEXTS) == pytest.approx(512)


def test_perplexity_of_a_model_that_is_sure_and_right_is_one() -> None:
    logits = np.zeros((3, 512), np.float32)
    logits[[0, 1], TEXTS[1][1:]] = 1e4
    assert perplexity([logits], [TEXTS[1]]) == pytest.approx(1)
