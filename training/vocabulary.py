"""The vocabulary: byte-level BPE behind qwen2's splitting rule, so that digits stand alone, and ChatML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.corpus import Chat

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, CHAT_START, CHAT_END)
# As llama.cpp's `qwen2` pre-tokenizer and Qwen2's own tokenizer.json split text.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def empty_tokenizer(model: models.BPE) -> Tokenizer:
    """`model` behind the splitting rule, with the special tokens known."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A vocabulary of exactly `n_vocab` tokens: the 256 bytes, merges learned from `texts`, then the special tokens.

    Raises ValueError when the texts are too poor to fill it.
    """
    learned = empty_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    learned.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if learned.get_vocab_size() != n_vocab:
        raise ValueError(f"the text gives {learned.get_vocab_size()} tokens, not {n_vocab}")
    return learned


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of `token`. Raises ValueError when the vocabulary lacks it."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the vocabulary has no token {token!r}")
    return found


class ChatEncoder:
    """Turns chats into ids and targets exactly as the chat template and the tokenizer do together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (token_id(tokenizer, token) for token in (CHAT_START, CHAT_END))
        self.newline = tokenizer.encode("\n").ids
        self.n_answer_head = len(tokenizer.encode("assistant\n").ids)

    def encode(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Ids, and for each whether it belongs to an answer (its text and its end mark)."""
        ids: list[int] = []
        answer: list[bool] = []
        bodies = self.tokenizer.encode_batch_fast([f"{turn.role}\n{turn.text}" for turn in chat])
        for turn, body in zip(chat, bodies, strict=True):
            learned = len(body.ids) - self.n_answer_head if turn.role == "assistant" else -1
            ids += [self.start, *body.ids, self.end, *self.newline]
            answer += [False] * (1 + len(body.ids) - max(learned, 0)) + [True] * (learned + 1)
            answer += [False] * (len(ids) - len(answer))
        return ids, answer

    def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of (role, text) messages, up to where the answer begins."""
        text = "".join(f"{CHAT_START}{role}\n{text}{CHAT_END}\n" for role, text in messages)
        return list(self.tokenizer.encode(f"{text}{CHAT_START}assistant\n").ids)
