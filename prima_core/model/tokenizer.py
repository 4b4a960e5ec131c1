"""Text to token ids and back, from nothing but a model file's metadata.

Encoding is the `tokenizers` library's BPE with the file's vocabulary; finding special tokens and decoding are our own:
the library's decoder gets tokens wrong that are stored as plain text, and a table of bytes per id streams by nature.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prima_core.errors import ModelError, RequestError
from prima_core.model.coding import Coding, coding_of
from prima_core.model.reasoning import find_reasoning_tags
from prima_core.model.vocabulary import KEY, TokenKind, Vocabulary, flag_value

# Some converters store turn markers as USER_DEFINED. They are never read out of plain text all the same.
_MARKER = re.compile(r"<\|.*\|>", re.DOTALL)


_MAX_FIRSTS = 256
"""Tokens of a real vocabulary begin with few characters; each has a branch of its own in a pattern."""

_C_SPACE = re.compile(r"[ \t\n\v\f\r]*")  # C's isspace, as in llama.cpp


class Tokenizer:
    """A model's tokenizer. Immutable; any thread may use it.

    `eos_id` is the file's own end token; generation ends at any of `eos_ids`: eos, eot, eom and control tokens with a
    well-known name such as <|im_end|>. `chat_templates`: the file's Jinja sources by name; "default" is the one without
    a name; empty where there are none.
    """

    def __init__(self, vocabulary: Vocabulary, coding: Coding, *, add_bos: bool, add_eos: bool) -> None:
        # The vocabulary itself is not kept: a hundred thousand strings, which the coding has in a form of its own.
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.end_ids
        self.chat_templates = vocabulary.chat_templates
        self._encode = coding.encode
        self._bytes = _Table(coding.table)
        self._special = frozenset(vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN).values())
        anywhere = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
        in_text = {text: id for text, id in anywhere.items() if id not in self._special and not _MARKER.fullmatch(text)}
        self._anywhere = _Finder(anywhere, vocabulary.space_eaters)
        self._in_text = _Finder(in_text, vocabulary.space_eaters)
        self._hidden = _Finder({text: id for text, id in anywhere.items() if text not in in_text})
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.reasoning_tags = find_reasoning_tags(anywhere, vocabulary.chat_templates.values())
        self._silent = self._special - (self.reasoning_tags.ids if self.reasoning_tags else frozenset())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build from the metadata of a GGUF file. Raises ModelError; `field` is the key at fault or not supported."""
        vocabulary = Vocabulary.from_metadata(metadata)
        coding = coding_of(metadata, vocabulary)
        add_bos = _added(metadata, "bos", vocabulary.bos_id, coding.add_bos)
        return cls(
            vocabulary,
            coding,
            add_bos=add_bos or (coding.always_bos and vocabulary.bos_id is not None),
            add_eos=_added(metadata, "eos", vocabulary.eos_id, False),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def is_special(self, id: int) -> bool:
        """Whether the token is a control token, which stands for no text."""
        return id in self._special

    def is_silent(self, id: int) -> bool:
        """Whether the token is none of an answer's text: a control token that is no tag around a model's reasoning."""
        return id in self._silent

    def find_special(self, text: str) -> int | None:
        """The id of the control or user-defined token that the file spells exactly so, or None."""
        return self._anywhere.ids.get(text)

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. Lone surrogates count as U+FFFD.

        Special tokens that are spelled out in the text stay text unless `parse_special`. `add_special` puts bos before
        and eos after, where the file asks for them.
        """
        finder = self._anywhere if parse_special else self._in_text
        ids: list[int] = []
        for part in finder.split(_without_surrogates(text)):
            ids.extend([part] if isinstance(part, int) else self._encode(part))
        return self._framed(ids) if add_special else ids

    def split_special(self, text: str) -> list[str | int]:
        """The text cut at special tokens: their ids, and the texts between them, in order."""
        return self._anywhere.split(text)

    def disarm(self, text: str, mark: str) -> str:
        """The text with the character `mark` inside each special token that it spells, or begins to spell at its end.

        What was disarmed does not become special in whatever it is put into; taking the marks out gives the text back.
        """
        return self._hidden.disarm(text, mark)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, maybe half a character in UTF-8. Special tokens: their spelling."""
        if 0 <= id < len(self._bytes):
            return self._bytes[id]
        raise RequestError(f"token id {id} is not in [0, {len(self._bytes)})", param="prompt")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        shown = (id for id in ids if not (skip_special and id in self._special))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token's own text, for people to look at."""
        return [self.token_bytes(id).decode("utf-8", "replace") for id in ids]

    def _framed(self, ids: list[int]) -> list[int]:
        before = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        after = [self.eos_id] if self.add_eos and self.eos_id is not None else []
        return before + ids + after


class _Table:
    """Short texts by id, in a fifth of a list's memory: there each is an object of its own."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._joined = b"".join(texts)
        self._ends = array("Q", accumulate(map(len, texts), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, id: int) -> bytes:
        return self._joined[self._ends[id] : self._ends[id + 1]]


class _Finder:
    """Finds given tokens in a text, the longest that fits at the first place where one does.

    Of them, the `space_eaters` take away the white space that follows. The work for each character is bounded by the
    number of lengths that tokens have, however many tokens there are.
    """

    def __init__(self, ids: Mapping[str, int], space_eaters: frozenset[int] = frozenset()) -> None:
        self.ids = {text: id for text, id in ids.items() if text}
        lengths: dict[str, set[int]] = {}
        seconds: dict[str, set[str]] = {}
        for text in self.ids:
            lengths.setdefault(text[0], set()).add(len(text))
            seconds.setdefault(text[0], set()).add(text[1:2])
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = _beginnings(seconds) if seconds else None
        self._space_eaters = space_eaters

    def split(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        begin = at = 0
        while self._first is not None and (match := self._first.search(text, at)):
            at = match.start()
            token = self._token_at(text, at)
            if token is None:
                at += 1
                continue
            parts += [text[begin:at], self.ids[token]]
            begin = at = self._end_after(text, at + len(token), self.ids[token])
        parts.append(text[begin:])
        return [part for part in parts if part != ""]

    def disarm(self, text: str, mark: str) -> str:
        return text if self._first is None else self._first.sub(lambda match: self._disarmed(match, mark), text)

    def _disarmed(self, match: re.Match[str], mark: str) -> str:
        text, at, first = match.string, match.start(), match[0]
        if self._token_at(text, at) is None and not self._begins_at(text, at):
            return first
        return "\ufffd" if first in self.ids else first + mark  # nothing can be put inside a token of one character

    def _begins_at(self, text: str, at: int) -> bool:
        """Whether the rest of the text is the beginning of a token. A letter alone is not taken for one."""
        is_short = len(text) - at < self._lengths[text[at]][0]
        return is_short and not text[at].isalnum() and any(token.startswith(text[at:]) for token in self.ids)

    def _end_after(self, text: str, end: int, id: int) -> int:
        space = _C_SPACE.match(text, end) if id in self._space_eaters else None
        return end if space is None else space.end()

    def _token_at(self, text: str, at: int) -> str | None:
        spelled = (text[at : at + length] for length in self._lengths[text[at]])
        return next((token for token in spelled if token in self.ids), None)


def _beginnings(seconds: Mapping[str, set[str]]) -> re.Pattern[str]:
    """A pattern for the first character of a token, if the second fits too or the text ends before it. `seconds` are
    the second characters by the first; "": there may be none."""
    if len(seconds) > _MAX_FIRSTS:
        return re.compile(_any_of(seconds))
    follows = {first: "" if "" in found else rf"(?={_any_of(found)}|\Z)" for first, found in seconds.items()}
    return re.compile("|".join(re.escape(first) + rest for first, rest in follows.items()))


def _any_of(characters: Iterable[str]) -> str:
    return f"[{''.join(map(re.escape, characters))}]"


def _added(metadata: Mapping[str, object], role: str, id: int | None, default: bool) -> bool:
    """Whether `role` is added to a text. A file that asks for a token which it does not name is refused."""
    added = flag_value(metadata, f"{KEY}add_{role}_token", default and id is not None)
    if added and id is None:
        raise ModelError(f"is missing, though add_{role}_token is true", field=f"{KEY}{role}_token_id")
    return added


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
