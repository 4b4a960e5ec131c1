"""Makes the built-in model: text, vocabulary, training, GGUF. `python -m training.train`, see CARD.md for the times."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import Chat, Corpus
from training.export import write_gguf
from training.model import Llama, Shape
from training.vocabulary import ChatEncoder, train_tokenizer

log = logging.getLogger("training")

GGUF_FILE = Path(__file__).parent.parent / "prima_core" / "builtin" / "prima-builtin.gguf"
SEED = 20250804
VOCABULARY_SEED = SEED + 1
VOCABULARY_CHATS = 8000
# Every row is one chat from its beginning. Short rows train first questions, long ones the whole context.
ROW_TOKENS = (128, 256, 512, 1024, 2048)
ROW_SHARES = (0.50, 0.34, 0.08, 0.05, 0.03)
TOKENS_PER_TURN = 40  # a lower bound on average: enough turns to fill a row
QUESTION_WEIGHT = 0.03  # of a question's tokens in the loss: its words help, the answer is the aim


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training run depends on besides the text."""

    n_steps: int = 3000
    batch_tokens: int = 2048
    peak_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.4
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
    train(model, tokenizer, corpus, Recipe(n_steps=options.steps), options.checkpoint, options.out)
    write_gguf(options.out, model, tokenizer)
    log.info("wrote %s, %.1f MB", options.out.name, options.out.stat().st_size / 1e6)


def make_tokenizer(corpus: Corpus, n_vocab: int) -> Tokenizer:
    chats = islice(corpus.chats(VOCABULARY_SEED, 8), VOCABULARY_CHATS)
    return train_tokenizer((f"{turn.role}\n{turn.text}" for chat in chats for turn in chat), n_vocab)


def train(model: Llama, tokenizer: Tokenizer, corpus: Corpus, recipe: Recipe, checkpoint: Path | None, out: Path) -> None:
    """Train in place. With `checkpoint`, go on from it where it exists, save to it and export on the way."""
    optimizer = _optimizer(model, recipe)
    first = _resume(model, optimizer, checkpoint)
    encoder = ChatEncoder(tokenizer)
    started, started_cpu, seen = time.monotonic(), time.process_time(), 0
    for step in range(first, recipe.n_steps):
        ids, weights = make_batch(corpus, encoder, recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = _loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        if (step + 1) % 10 == 0:
            spent, cpu = time.monotonic() - started, time.process_time() - started_cpu
            log.info("step %d loss %.4f, %.0f tokens/s, %.0f s, cpu %.0f s", step + 1, loss.item(), seen / spent, spent, cpu)
        if checkpoint and (step + 1) % recipe.save_every == 0:
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
            write_gguf(checkpoint.with_suffix(".gguf"), model, tokenizer)


def make_batch(corpus: Corpus, encoder: ChatEncoder, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Ids `[rows, n]` and loss weights `[rows, n]` of batch `step`: a function of the step alone."""
    rng = Random(SEED * 1_000_003 + step)
    n_tokens = rng.choices(ROW_TOKENS, ROW_SHARES)[0]
    n_rows = recipe.batch_tokens // n_tokens
    chats = corpus.chats(rng.getrandbits(64), n_tokens // TOKENS_PER_TURN + 2)
    rows = list(islice(_rows(chats, encoder, n_tokens), n_rows))
    ids = torch.tensor([row[0] for row in rows])
    answers = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    return ids, answers + QUESTION_WEIGHT * (1 - answers)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, then a cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    decay_from = recipe.n_steps * (1 - recipe.decay_share)
    done = max(0.0, (step - decay_from) / (recipe.n_steps - decay_from))
    return recipe.peak_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _rows(chats: Iterator[Chat], encoder: ChatEncoder, n_tokens: int) -> Iterator[tuple[list[int], list[bool]]]:
    for chat in chats:
        ids, answer = encoder.encode(chat)
        if len(ids) >= n_tokens:
            yield ids[:n_tokens], answer[:n_tokens]


def _loss(model: Llama, ids: Tensor, weights: Tensor) -> Tensor:
    hidden = model(ids)[:, :-1].flatten(0, 1)
    targets, wanted = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    each = F.cross_entropy(model.logits(hidden), targets, reduction="none")
    return (each * wanted).sum() / wanted.sum()


def _optimizer(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=True)


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
    parser.add_argument("--checkpoint", type=Path, help="file to save to every %d steps and to go on from" % Recipe().save_every)
    parser.add_argument("--out", type=Path, default=GGUF_FILE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
