"""The vocabulary of a model file, read from its metadata and checked: nothing that a file says is used before.

Keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; an absent optional key is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite
from types import MappingProxyType

import numpy as np

from prima_core.errors import ModelError

KEY = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"
TEMPLATES_KEY = "tokenizer.chat_templates"
DEFAULT_TEMPLATE = "default"

_DAMAGED = "the file is damaged or was converted badly: fetch it again or convert it anew"

# Texts that end a turn in well-known models, as in llama.cpp. Files often name only one of them as eos.
_END_NAMES = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"}
    | {"<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["}
    | {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
    | {"<\uff5cend\u2581of\u2581sentence\uff5c>"}
)
# Nor does anything follow these, which stand between the files of a repository where code is completed.
_FILL_END_NAMES = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>"}),
}
# What stands before, after and for the code to fill in.
_FILL_NAMES = frozenset(
    {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"}
    | {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"}
    | {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>"}
    | {f"<\uff5cfim\u2581{place}\uff5c>" for place in ("begin", "hole", "end")}
)

# SentencePiece's own ids, which old files do not say.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


class TokenKind(IntEnum):
    """What a token is: CONTROL never stands for text, USER_DEFINED is text that is found before any merging."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id as the file spells them, what each is, and the ids that have a role."""

    model: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_ids: frozenset[int]
    space_eaters: frozenset[int]
    chat_templates: Mapping[str, str]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Vocabulary:
        """Read and check. Raises ModelError whose `field` is the key at fault."""
        model = text_value(metadata, KEY + "model")
        if model is None:
            raise ModelError("is missing: the file has no tokenizer", field=KEY + "model", hint=_DAMAGED)
        tokens = _texts(metadata, KEY + "tokens")
        ids = {token: id for id, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            raise _twice(tokens)
        kinds = _kinds(metadata, len(tokens))
        named_ends = _named_end_ids(metadata, ids, kinds)
        for id in named_ends.union(ids[name] for name in _FILL_NAMES & ids.keys()):
            if kinds[id] == TokenKind.USER_DEFINED:  # so some converters call them, and a text would spell them
                kinds[id] = TokenKind.CONTROL
        roles = {role: _role_id(metadata, role, model, kinds) for role in ("bos", "eos", "unknown")}
        return cls(
            model=model,
            tokens=tokens,
            kinds=kinds,
            ids=MappingProxyType(ids),
            bos_id=roles["bos"],
            eos_id=roles["eos"],
            unknown_id=roles["unknown"],
            end_ids=frozenset({*named_ends, *_role_end_ids(metadata, roles["eos"], len(tokens))}),
            space_eaters=_space_eaters(metadata, ids, kinds),
            chat_templates=MappingProxyType(_chat_templates(metadata)),
        )

    def of_kind(self, *kinds: TokenKind) -> dict[str, int]:
        """The tokens of these kinds, by text."""
        return {
            token: id for id, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind in kinds
        }


def read_merges(
    metadata: Mapping[str, object], vocabulary: Vocabulary, usable: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Pairs of tokens in the order in which they merge, without those that need a token that is not `usable`."""
    key = KEY + "merges"
    merges = []
    for index, line in enumerate(_texts(metadata, key)):
        left, _, right = line.partition(" ")
        if left in usable and right in usable and left + right in usable:
            merges.append((left, right))
        elif not {left, right, left + right} <= vocabulary.ids.keys():
            missing = next(token for token in (left, right, left + right) if token not in vocabulary.ids)
            raise ModelError(
                f"{line!r:.80} needs {missing!r:.80}, which is no token", field=f"{key}[{index}]", hint=_DAMAGED
            )
    return merges


def read_scores(metadata: Mapping[str, object], n_tokens: int) -> list[float]:
    """One finite score for each token."""
    key = KEY + "scores"
    scores = [float(score) for score in _numbers(metadata, key, n_tokens)]
    if not all(map(isfinite, scores)):
        index = next(index for index, score in enumerate(scores) if not isfinite(score))
        raise ModelError(f"{scores[index]} is not a finite number", field=f"{key}[{index}]", hint=_DAMAGED)
    return scores


def text_value(metadata: Mapping[str, object], key: str) -> str | None:
    """A text, or None where the key is absent."""
    value = metadata.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    raise ModelError(f"is {_kind_name(value)}, not a text", field=key, hint=_DAMAGED)


def flag_value(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    """A truth value, or `default` where the key is absent."""
    value = metadata.get(key, default)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ModelError(f"is {_kind_name(value)}, not a truth value", field=key, hint=_DAMAGED)


def _id_value(metadata: Mapping[str, object], key: str, n_tokens: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ModelError(f"is {_kind_name(value)}, not a token id", field=key, hint=_DAMAGED)
    if not 0 <= value < n_tokens:
        raise ModelError(f"{value} is not the id of one of the {n_tokens} tokens", field=key, hint=_DAMAGED)
    return int(value)


def _texts(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if value is None:
        raise ModelError("is missing", field=key, hint=_DAMAGED)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ModelError(f"is {_kind_name(value)}, not a list of texts", field=key, hint=_DAMAGED)
    texts = list(value)
    try:  # the common case in one sweep: 150,000 tokens and twice as many merges
        "\n".join(texts).encode()
    except (TypeError, UnicodeEncodeError):
        return [_text(item, f"{key}[{index}]") for index, item in enumerate(texts)]
    return texts


def _text(item: object, field: str) -> str:
    if not isinstance(item, str | bytes):
        raise ModelError(f"is {_kind_name(item)}, not a text", field=field, hint=_DAMAGED)
    raw = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ModelError(f"{raw!r:.80} is not UTF-8", field=field, hint=_DAMAGED) from None


def _numbers(metadata: Mapping[str, object], key: str, n_tokens: int) -> list[int | float]:
    value = metadata.get(key)
    if value is None:
        raise ModelError("is missing", field=key, hint=_DAMAGED)
    numbers = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(numbers, list | tuple) or {type(number) for number in numbers} - {int, float}:
        raise ModelError(f"is {_kind_name(value)}, not a list of numbers", field=key, hint=_DAMAGED)
    if len(numbers) != n_tokens:
        raise ModelError(f"has {len(numbers)} entries for {n_tokens} tokens", field=key, hint=_DAMAGED)
    return list(numbers)


def _kinds(metadata: Mapping[str, object], n_tokens: int) -> list[int]:
    key = KEY + "token_type"
    if key not in metadata:
        return [TokenKind.NORMAL] * n_tokens
    kinds = _numbers(metadata, key, n_tokens)
    wrong = set(kinds) - set(TokenKind)
    if wrong:
        index = next(index for index, kind in enumerate(kinds) if kind in wrong)
        raise ModelError(f"{kinds[index]} is not a kind of token", field=f"{key}[{index}]", hint=_DAMAGED)
    return [int(kind) for kind in kinds]


def _role_id(metadata: Mapping[str, object], role: str, model: str, kinds: Sequence[int]) -> int | None:
    """The id that the file gives; else SentencePiece's own, if the token there is of a kind for it."""
    id = _id_value(metadata, f"{KEY}{role}_token_id", len(kinds))
    usual = _SENTENCEPIECE_IDS[role] if model == "llama" else len(kinds)
    is_usual = id is None and usual < len(kinds) and kinds[usual] in (TokenKind.CONTROL, TokenKind.UNKNOWN)
    return usual if is_usual else id


def _role_end_ids(metadata: Mapping[str, object], eos_id: int | None, n_tokens: int) -> Iterator[int]:
    others = (_id_value(metadata, f"{KEY}{role}_token_id", n_tokens) for role in ("eot", "eom", *_FILL_END_NAMES))
    yield from (id for id in (eos_id, *others) if id is not None)


def _named_end_ids(metadata: Mapping[str, object], ids: Mapping[str, int], kinds: Sequence[int]) -> set[int]:
    """Tokens that end a turn by their well-known names, and are no ordinary ones: to Qwen2, </s> is HTML.

    To llama.cpp ordinary ones end it too.
    """
    fills = (names for role, names in _FILL_END_NAMES.items() if f"{KEY}{role}_token_id" not in metadata)
    names = _END_NAMES.union(*fills) & ids.keys()
    ends = {name for name in names if kinds[ids[name]] in (TokenKind.CONTROL, TokenKind.USER_DEFINED)}
    return {ids[name] for name in ends - _not_ends(ends)}


def _not_ends(names: set[str]) -> set[str]:
    """Names that end a turn elsewhere but not in a vocabulary that has these others beside them."""
    has_call = "<|call|>" in names or "<|calls|>" in names
    ends_messages = has_call and ("<|return|>" in names or "<|flush|>" in names)  # gpt-oss, Solar Open
    is_html = "<|tool_response>" in names  # Gemma 4
    return ({"<|end|>"} if ends_messages else set()) | ({"</s>"} if is_html else set())


def _space_eaters(metadata: Mapping[str, object], ids: Mapping[str, int], kinds: Sequence[int]) -> frozenset[int]:
    """Tokens after which white space is no text. Files do not say it; llama.cpp knows it by the model's name, too."""
    name = (text_value(metadata, "general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    kept = {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    added = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
    eaters = {id for id, kind in enumerate(kinds) if kind in added} | {id for id in [ids.get("</s>")] if id is not None}
    return frozenset(eaters - kept)


def _chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """The template without a name as DEFAULT_TEMPLATE, and those that the file lists by name."""
    keys = {DEFAULT_TEMPLATE: TEMPLATE_KEY}
    if TEMPLATES_KEY in metadata:
        keys |= {name: f"{TEMPLATE_KEY}.{name}" for name in _texts(metadata, TEMPLATES_KEY) if name != DEFAULT_TEMPLATE}
    found = {name: text_value(metadata, key) for name, key in keys.items()}
    return {name: _legible(source) for name, source in found.items() if source is not None}


def _legible(source: str) -> str:
    """With U+FFFD where the file has no UTF-8: clients are told the template."""
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _twice(tokens: Sequence[str]) -> ModelError:
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in seen:
            break
        seen[token] = index
    return ModelError(f"{token!r:.80} is token {seen[token]} too", field=f"{KEY}tokens[{index}]", hint=_DAMAGED)


def _kind_name(value: object) -> str:
    return f"of type {type(value).__name__}"
