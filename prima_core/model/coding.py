"""What turns text into the ids of a vocabulary and ids into bytes, for each kind of vocabulary."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prima_core.errors import ModelError, RequestError
from prima_core.model.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from prima_core.model.vocabulary import KEY, TokenKind, Vocabulary, flag_value, read_merges, read_scores, text_value

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Split

_log = logging.getLogger(__name__)

_SPACE = "\u2581"  # how SentencePiece vocabularies write a space
_TEXT_BYTES = (
    *range(0xC0),
    *range(0xC2, 0xF1),
    0xF3,
    0xF4,
)  # no assigned character has the others
_MAX_SPLIT_CHARACTERS = 1 << 30  # real vocabularies: some ten million
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_OTHER_KINDS = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV's",
    "plamo2": "PLaMo-2's",
    "hybriddna": "k-mers of DNA",
    "whitespace": "words as they are",
}

MODELS = ("gpt2", "gemma4", "llama")
"""What `tokenizer.ggml.model` may be: two byte-pair encodings and SentencePiece."""

Encode = Callable[[str], list[int]]
"""Token ids of a text in which nothing is special. Raises RequestError for a text that cannot be split."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How a vocabulary is used. `table`: the bytes of each token by id. `add_bos`: what a file means that does not say,
    `always_bos`: whatever it says."""

    encode: Encode
    table: Sequence[bytes]
    add_bos: bool = False
    always_bos: bool = False


def coding_of(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Coding:
    """The coding that the file asks for. Raises ModelError whose `field` is the key at fault or not supported."""
    if vocabulary.model not in MODELS:
        kind = f" ({_OTHER_KINDS[vocabulary.model]})" if vocabulary.model in _OTHER_KINDS else ""
        message = f"tokenizer {vocabulary.model!r:.80}{kind} is not supported yet"
        hint = "gpt2 and gemma4 (byte-pair encodings) and llama (SentencePiece) are"
        raise ModelError(message, field=KEY + "model", hint=hint)
    if vocabulary.model == "llama":
        return Coding(_sentencepiece_encode(metadata, vocabulary), _sentencepiece_table(vocabulary), add_bos=True)
    pre = PRE_TOKENIZERS["gemma4"] if vocabulary.model == "gemma4" else _pre_tokenizer(metadata)
    if pre.is_raw:
        encode, table = _raw_encode(metadata, vocabulary, pre), _sentencepiece_table(vocabulary)
    else:
        encode, table = _byte_level_encode(metadata, vocabulary, pre), _byte_level_table(vocabulary)
    return Coding(encode, table, pre.add_bos, pre.always_bos)


# ---------------------------------------------------------------- byte-level BPE ("gpt2") and raw BPE ("gemma4")


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    key = KEY + "pre"
    name = text_value(metadata, key)
    if name is None:  # llama.cpp guesses here, and warns that quality will be degraded
        raise ModelError("is missing", field=key, hint="convert the model anew with a current llama.cpp")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(f"{name!r:.80} is not supported yet", field=key, hint=f"known are {known}")
    return PRE_TOKENIZERS[name]


def _byte_level_encode(metadata: Mapping[str, object], vocabulary: Vocabulary, pre: PreTokenizer) -> Encode:
    from tokenizers import Tokenizer as Encoder
    from tokenizers import pre_tokenizers

    usable = _text_tokens(vocabulary)
    encoder = Encoder(_bpe(usable, read_merges(metadata, vocabulary, usable), ignore_merges=pre.ignore_merges))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*_cuts(pre), spell])
    spellings = _byte_spellings()
    _warn_of_lost_bytes(n_lost=sum(spellings[byte] not in usable for byte in _TEXT_BYTES))
    return _encode_with(encoder)


def _raw_encode(metadata: Mapping[str, object], vocabulary: Vocabulary, pre: PreTokenizer) -> Encode:
    from tokenizers import Tokenizer as Encoder
    from tokenizers import normalizers, pre_tokenizers

    usable = _text_tokens(vocabulary)
    encoder = Encoder(_bpe(usable, read_merges(metadata, vocabulary, usable), byte_fallback=True))
    encoder.normalizer = normalizers.Replace(" ", _SPACE)
    encoder.pre_tokenizer = pre_tokenizers.Sequence(_cuts(pre))
    _warn_of_lost_bytes(n_lost=sum(f"<0x{byte:02X}>" not in usable for byte in _TEXT_BYTES))
    encode = _encode_with(encoder)
    return _with_whole_newlines(encode, usable) if pre.whole_newlines else encode


def _with_whole_newlines(encode: Encode, usable: Mapping[str, int]) -> Encode:
    whole = {text: id for text, id in usable.items() if text and not text.strip("\n")}

    def encode_lines(text: str) -> list[int]:
        parts = filter(None, re.split(r"(\n+)", text))
        return [id for part in parts for id in ([whole[part]] if part in whole else encode(part))]

    return encode_lines


def _cuts(pre: PreTokenizer) -> list[Split]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return [Split(Regex(pattern), "isolated") for pattern in pre.patterns]


def _byte_level_table(vocabulary: Vocabulary) -> list[bytes]:
    spelled = {ord(character): byte for byte, character in enumerate(_byte_spellings())}
    return [_byte_level_bytes(*entry, spelled) for entry in zip(vocabulary.tokens, vocabulary.kinds, strict=True)]


def _byte_level_bytes(token: str, kind: int, spelled: Mapping[int, int]) -> bytes:
    if kind == TokenKind.NORMAL:
        try:
            return token.translate(spelled).encode("latin-1")
        except UnicodeEncodeError:  # a token that was added as plain text
            return token.encode()
    return _plain_bytes(token, kind)


def _byte_spellings() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


# ---------------------------------------------------------------- SentencePiece BPE ("llama")


def _sentencepiece_encode(metadata: Mapping[str, object], vocabulary: Vocabulary) -> Encode:
    """SentencePiece joins the neighbours whose union has the best score: the same as merging every split of every piece
    in the order of scores. Bytes stand in for characters that no piece has."""
    from tokenizers import Tokenizer as Encoder
    from tokenizers import normalizers

    if flag_value(metadata, KEY + "remove_extra_whitespaces", False):
        raise ModelError("is not supported yet", field=KEY + "remove_extra_whitespaces")
    scores = read_scores(metadata, len(vocabulary.tokens))
    usable = _text_tokens(vocabulary)
    pieces = sorted(vocabulary.of_kind(TokenKind.NORMAL).items(), key=lambda piece: -scores[piece[1]])
    _refuse_long_pieces(text for text, _ in pieces)
    merges = [pair for text, _ in pieces for pair in _splits(text) if pair[0] in usable and pair[1] in usable]
    unknown = None if vocabulary.unknown_id is None else vocabulary.tokens[vocabulary.unknown_id]
    if unknown is not None:
        usable[unknown] = vocabulary.ids[unknown]
    encoder = Encoder(_bpe(usable, merges, byte_fallback=True, unk_token=unknown))
    prefix = [normalizers.Prepend(_SPACE)] if flag_value(metadata, KEY + "add_space_prefix", True) else []
    encoder.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    _warn_of_lost_bytes(n_lost=sum(f"<0x{byte:02X}>" not in usable for byte in _TEXT_BYTES))
    return _encode_with(encoder)


def _splits(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:at], piece[at:]) for at in range(1, len(piece)))


def _refuse_long_pieces(pieces: Iterable[str]) -> None:
    """Every split is made and looked up: work by the square of a piece's length."""
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_SPLIT_CHARACTERS:
        raise ModelError("there are tokens of absurd length", field=KEY + "tokens")


def _sentencepiece_table(vocabulary: Vocabulary) -> list[bytes]:
    return [
        token.replace(_SPACE, " ").encode() if kind == TokenKind.NORMAL else _plain_bytes(token, kind)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]


# ---------------------------------------------------------------- all


def _encode_with(encoder: Encoder) -> Encode:
    def encode(text: str) -> list[int]:
        try:
            # A batch of one: only for batches the library lets other threads run, and a text may take seconds.
            return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            # The regex engine gives up after ten million steps back in one place. The library then panics, which is no
            # Exception, of a class that cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            message = f"the tokenizer cannot split a text of {len(text)} characters: {error}"
            raise RequestError(message, param="prompt", hint="shorten it") from None

    return encode


def _text_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens that merging may make: no special token ever comes out of plain text."""
    return vocabulary.of_kind(
        TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.BYTE, TokenKind.UNDEFINED
    )


def _plain_bytes(token: str, kind: int) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token) if kind == TokenKind.BYTE else None
    return bytes.fromhex(byte[1]) if byte else token.encode()


def _bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unk_token: str | None = None,
) -> BPE:
    from tokenizers.models import BPE

    try:
        return BPE(
            vocab, merges, ignore_merges=ignore_merges, byte_fallback=byte_fallback, unk_token=unk_token, fuse_unk=False
        )
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"the vocabulary is not usable: {error}", field=KEY + "tokens") from error


def _warn_of_lost_bytes(n_lost: int) -> None:
    if n_lost:
        _log.warning("the vocabulary has no token for %d of the bytes that texts are made of: they get lost", n_lost)
