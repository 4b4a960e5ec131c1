"""Asks a GGUF of the built-in model through plain torch: `python -m training.answer FILE "What is a shard?"`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from training.export import read_gguf
from training.vocabulary import ChatEncoder

Message = tuple[str, str]  # role, text


class Answerer:
    """Greedy answers of the model as the file holds it (weights as rounded to Q8_0)."""

    def __init__(self, path: Path) -> None:
        self.model, tokenizer = read_gguf(path)
        self.encoder = ChatEncoder(tokenizer)

    @torch.inference_mode()
    def answer_all(self, chats: Sequence[Sequence[Message]], limit: int = 80) -> list[str]:
        """An answer of at most `limit` tokens to each chat. All go through together, shorter ones padded behind."""
        prompts = [self.encoder.prompt(chat) for chat in chats]
        ids = [list(prompt) for prompt in prompts]
        open_rows = list(range(len(ids)))
        while open_rows and limit:
            for row, token in zip(open_rows, self._next_tokens([ids[row] for row in open_rows]), strict=True):
                ids[row].append(token)
            open_rows = [row for row in open_rows if ids[row][-1] != self.encoder.end]
            limit -= 1
        return [self._text(whole[len(prompt) :]) for whole, prompt in zip(ids, prompts, strict=True)]

    def _next_tokens(self, rows: Sequence[Sequence[int]]) -> list[int]:
        longest = max(len(row) for row in rows)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = self.model(padded)[torch.arange(len(rows)), last]
        return [int(token) for token in self.model.logits(hidden).argmax(-1)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.encoder.tokenizer.decode(list(ids), skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("question", nargs="+", help="each is a chat of its own")
    options = parser.parse_args()
    answers = Answerer(options.file).answer_all([[("user", question)] for question in options.question])
    for question, answer in zip(options.question, answers, strict=True):
        print(f"> {question}\n{answer}")


if __name__ == "__main__":
    main()
