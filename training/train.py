"""Makes the built-in model: text, vocabulary, training, GGUF. `python -m training.train`, see CARD.md for the times."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training import batches
from training.batches import N_STEPS, SEED
from training.corpus import Corpus
from training.export import write_gguf
from training.model import Llama, Shape
from training.vocabulary import ChatEncoder, train_tokenizer

log = logging.getLogger("training")

GGUF_FILE = Path(__file__).parent.parent / "prima_core" / "builtin" / "prima-builtin.gguf"
LOG_EVERY = 20
QUESTION_WEIGHT = 0.03  # of a question's tokens in the loss: its words help, the answer is the aim


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training run depends on besides the text."""

    n_steps: int = N_STEPS
    # Corners (step, rate). A batch of 2048 tokens is small: the high rate learns the vocabulary and the facts, but sums
    # and spelling only came with a lower one.
    rates: tuple[tuple[int, float], ...] = (
        (0, 0.0),
        (100, 2e-3),
        (1100, 2e-3),
        (1600, 1.7e-3),
        (1601, 6e-4),
        (3400, 1e-5),
        (3430, 5e-4),
        (N_STEPS, 1e-5),
    )
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    save_every: int = 100


def main() -> None:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    corpus = Corpus()
    tokenizer = make_tokenizer(corpus, Shape().n_vocab)
    model = Llama(Shape())
    log.info("%d parameters", sum(parameter.numel() for parameter in model.parameters()))
    train(model, tokenizer, corpus, Recipe(n_steps=options.steps), options.checkpoint)
    write_gguf(options.out, model, tokenizer)
    log.info("wrote %s, %.1f MB", options.out.name, options.out.stat().st_size / 1e6)


def make_tokenizer(corpus: Corpus, n_vocab: int) -> Tokenizer:
    chats = batches.vocabulary_chats(corpus)
    return train_tokenizer((f"{turn.role}\n{turn.text}" for chat in chats for turn in chat), n_vocab)


def train(model: Llama, tokenizer: Tokenizer, corpus: Corpus, recipe: Recipe, checkpoint: Path | None) -> None:
    """Train in place. With `checkpoint`, go on from it where it exists, save to it and export on the way."""
    optimizer = _optimizer(model, recipe)
    first = _resume(model, optimizer, checkpoint)
    encoder = ChatEncoder(tokenizer)
    started, started_cpu, n_seen = time.monotonic(), time.process_time(), 0
    for step in range(first, recipe.n_steps):
        ids, weights = make_batch(corpus, encoder, step)
        loss = _update(model, optimizer, recipe, step, ids, weights)
        n_seen += ids.numel()
        if (step + 1) % LOG_EVERY == 0:
            spent_s, cpu_s = time.monotonic() - started, time.process_time() - started_cpu
            log.info("step %d loss %.4f, %.0f s, %.0f s of CPU, %d tokens", step + 1, loss, spent_s, cpu_s, n_seen)
        if checkpoint and (step + 1) % recipe.save_every == 0:
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
            write_gguf(checkpoint.with_suffix(".gguf"), model, tokenizer)


def make_batch(corpus: Corpus, encoder: ChatEncoder, step: int) -> tuple[Tensor, Tensor]:
    """Ids `[rows, n]` and loss weights `[rows, n]` of batch `step`."""
    rows = batches.rows(corpus, encoder, step)
    ids = torch.tensor([row[0] for row in rows])
    answers = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    return ids, answers + QUESTION_WEIGHT * (1 - answers)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate at `step`, on straight lines between the recipe's corners; the last one's beyond it."""
    corners = recipe.rates
    for (start, before), (end, after) in pairwise(corners):
        if start <= step < end:
            return before + (after - before) * (step - start) / (end - start)
    return corners[-1][1]


def _update(
    model: Llama, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, ids: Tensor, weights: Tensor
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    loss = _loss(model, ids, weights)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _loss(model: Llama, ids: Tensor, weights: Tensor) -> Tensor:
    hidden = model(ids)[:, :-1].flatten(0, 1)
    targets, wanted = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    each = F.cross_entropy(model.logits(hidden), targets, reduction="none")
    return (each * wanted).sum() / wanted.sum()


def _optimizer(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def _resume(model: Llama, optimizer: torch.optim.AdamW, checkpoint: Path | None) -> int:
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe().n_steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="file to save to now and then, and to go on from")
    parser.add_argument("--out", type=Path, default=GGUF_FILE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
