"""A complete byte-level BPE vocabulary of any size, made by rule: every text can be written, every id has text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from prima_core.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "Ġ"  # a blank in GPT-2's byte alphabet
_LETTERS = _SPACE + "etaoinshrdlucmfwypvbgkjqxz"
# Words of several merges, a two-byte letter and half an emoji: what streaming decoders stumble over.
_WORDS = (
    "he", "hel", "hell", "hello", "wo", "wor", "worl", "world", "Ġh", "Ġhe", "Ġw", "Ġwo", "Ġwor", "Ġworl", "Ġworld",
    "th", "the", "Ġt", "Ġth", "Ġthe", "in", "ing", "an", "and", "\u00c3\u00bc", "\u00f0\u0141",
)  # fmt: skip
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyVocab:
    """Tokens by id (in the byte alphabet of GPT-2), merges in order, and the special tokens at the end."""

    pre: str
    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    n_specials: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    chat_template: str

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the `tokenizer.*` keys as llama.cpp's converter does."""
        import gguf

        n_normal = len(self.tokens) - self.n_specials
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types([gguf.TokenType.NORMAL] * n_normal + [gguf.TokenType.CONTROL] * self.n_specials)
        writer.add_token_merges(list(self.merges))
        if self.bos_id is not None:
            writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        writer.add_pad_token_id(self.pad_id)
        writer.add_add_bos_token(self.bos_id is not None)
        writer.add_chat_template(self.chat_template)


def tiny_vocab(arch: Literal["llama", "qwen2"], size: int) -> TinyVocab:
    """256 bytes, then merges, then specials: `size` tokens in all. Raises ConfigError when that does not fit."""
    specials = ["<|begin_of_text|>"] if arch == "llama" else []
    specials += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = byte_letters()
    n_merges = size - len(letters) - len(specials)
    merges = tuple(_first_merges(n_merges))
    if n_merges < 0 or len(merges) < n_merges:
        raise ConfigError(f"a vocabulary of {size} tokens cannot be made", hint="choose from 260 to 500000")
    tokens = (*letters, *(merge.replace(" ", "") for merge in merges), *specials)
    return TinyVocab(
        pre="llama-bpe" if arch == "llama" else "qwen2",
        tokens=tokens,
        merges=merges,
        n_specials=len(specials),
        bos_id=tokens.index("<|begin_of_text|>") if arch == "llama" else None,
        eos_id=size - 1,
        pad_id=size - 3,
        chat_template=("{{ bos_token }}" if arch == "llama" else "") + _CHATML,
    )


def byte_letters() -> tuple[str, ...]:
    """GPT-2's letter for each byte, in the order of its vocabulary: printable bytes first, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    n_others = 256 - len(printable)
    return tuple(chr(byte) for byte in printable) + tuple(chr(256 + i) for i in range(n_others))


def _first_merges(n: int) -> Iterator[str]:
    seen: set[str] = set()
    for left, right in _pairs():
        if len(seen) >= n:
            return
        if left + right not in seen:
            seen.add(left + right)
            yield f"{left} {right}"


def _pairs() -> Iterator[tuple[str, str]]:
    """Known words letter by letter, then pairs of letters, pairs with a letter, pairs with pairs."""
    yield from ((word[:-1], word[-1]) for word in _WORDS)
    pairs = [first + second for first, second in product(_LETTERS, _LETTERS[1:])]
    yield from product(_LETTERS, _LETTERS[1:])
    yield from product(pairs, _LETTERS[1:])
    yield from product(pairs, (pair for pair in pairs if not pair.startswith(_SPACE)))
