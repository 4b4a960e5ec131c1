"""From token ids to text that can be sent: whole characters, and nothing that may yet begin a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from prima_core.errors import RequestError


class TokenBytes(Protocol):
    """What a stream needs of a tokenizer."""

    def token_bytes(self, id: int) -> bytes: ...

    def is_silent(self, id: int) -> bool: ...


class TextStream:
    """The text of one sequence as it grows. Special tokens are silent, but for the tags of reasoning.

    The text ends before the stop string that is complete first (of several that end at the same place, the one that
    begins first), wherever tokens end. One thread at a time.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise RequestError("a stop string is empty", param="stop")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, id: int, may_stop: bool = True) -> str:
        """Take a token; give the text that is safe to send now, maybe none. After a stop string: always none.

        Stop strings are not looked for in text that comes while the stream may not stop."""
        if self.stopped or self._tokenizer.is_silent(id):
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(id))
        return self._take(text) if may_stop else text

    def flush(self) -> str:
        """The end: what was held back. Half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        text = self._held + text
        begin = self._stop_begin(text)
        self.stopped = begin is not None
        if begin is None:
            begin = len(text) - self._n_suspect(text)
        self._held = "" if self.stopped else text[begin:]
        return text[:begin]

    def _stop_begin(self, text: str) -> int | None:
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _n_suspect(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)
