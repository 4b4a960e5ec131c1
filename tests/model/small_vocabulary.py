"""A byte-level vocabulary small enough to read: all bytes, a few words, and the special tokens of ChatML."""

from __future__ import annotations

from prima_core.model.vocabulary import TokenKind

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = [chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)) for byte in range(256)]

MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "\u010a \u010a", "i m", "e n", "en d"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "\u00fc\u00fc", "<|tool|>"]

TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL, *USER_DEFINED]
KINDS = [
    *[int(TokenKind.NORMAL)] * (len(BYTES) + len(MERGES)),
    *[int(TokenKind.CONTROL)] * len(SPECIAL),
    *[int(TokenKind.USER_DEFINED)] * len(USER_DEFINED),
]


def metadata(**changes: object) -> dict[str, object]:
    """What a model file would say; `changes` by the last part of the key, None takes a key away."""
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": list(TOKENS),
        "token_type": list(KINDS),
        "merges": list(MERGES),
        "bos_token_id": TOKENS.index("<|endoftext|>"),
        "eos_token_id": TOKENS.index("<|endoftext|>"),
    }
    values |= changes
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
