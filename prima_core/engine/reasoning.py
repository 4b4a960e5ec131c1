"""An answer cut into what the model thought and what it says, while it streams."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from prima_core.model.reasoning import ReasoningTags


class PartKind(StrEnum):
    REASONING = "reasoning"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class Part:
    kind: PartKind
    text: str


class _Place(Enum):
    BEFORE = auto()  # nothing but white space has come
    INSIDE = auto()
    AFTER = auto()  # the reasoning has ended, and nothing but white space has come since
    CONTENT = auto()


class ReasoningStream:
    """Takes the text of one answer in pieces of any size and gives its parts; joined, they do not depend on the pieces.

    Reasoning is what stands between the tags at the beginning of an answer: later tags are content, since a model may
    well speak of them. The tags are left out, and with them the white space at the borders of the parts that they
    make, which is form (`<think>\\n`, `\\n</think>\\n\\n`). Held back is only what may yet turn out to be one of these.

    `tags` None: all is content. `starts_inside`: the prompt has opened the reasoning. One thread at a time.

        stream = ReasoningStream(tags)
        stream.push("<think>\\nLet me")  # [Part(REASONING, "Let me")]
        stream.push(" see.</think>Yes")  # [Part(REASONING, " see."), Part(CONTENT, "Yes")]
    """

    def __init__(self, tags: ReasoningTags | None, starts_inside: bool = False) -> None:
        self._opens, self._closes = (tags.opens, tags.closes) if tags else ("", "")
        self._place = _Place.CONTENT if tags is None else _Place.INSIDE if starts_inside else _Place.BEFORE
        self._held = ""
        self._has_reasoned = False

    def push(self, text: str) -> list[Part]:
        """What can be told now, in order; never an empty text."""
        self._held += text
        parts: list[Part] = []
        if self._place is _Place.BEFORE:
            self._look_for_beginning()
        if self._place is _Place.INSIDE:
            parts += self._reasoning()
        if self._place is _Place.AFTER:
            self._skip_space()
        if self._place is _Place.CONTENT:
            parts += self._all_held(PartKind.CONTENT)
        return parts

    def flush(self) -> list[Part]:
        """The end: what was held back. A tag that is not complete is text."""
        return self._all_held(PartKind.REASONING if self._place is _Place.INSIDE else PartKind.CONTENT)

    def _look_for_beginning(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._opens):
            self._held = text.removeprefix(self._opens)
            self._place = _Place.INSIDE
        elif not self._opens.startswith(text):
            self._place = _Place.CONTENT

    def _reasoning(self) -> list[Part]:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        end = self._held.find(self._closes)
        if end < 0:
            return self._up_to(len(self._held[: -self._n_suspect() or None].rstrip()))
        parts = self._up_to(len(self._held[:end].rstrip()))
        self._held = self._held[self._held.find(self._closes) + len(self._closes) :]
        self._place = _Place.AFTER
        return parts

    def _n_suspect(self) -> int:
        """Length of the longest end of the held text that begins the closing tag."""
        longest = min(len(self._held), len(self._closes) - 1)
        return next((n for n in range(longest, 0, -1) if self._closes.startswith(self._held[-n:])), 0)

    def _up_to(self, end: int) -> list[Part]:
        text, self._held = self._held[:end], self._held[end:]
        self._has_reasoned = self._has_reasoned or bool(text)
        return [Part(PartKind.REASONING, text)] if text else []

    def _skip_space(self) -> None:
        self._held = self._held.lstrip()
        if self._held:
            self._place = _Place.CONTENT

    def _all_held(self, kind: PartKind) -> list[Part]:
        text, self._held = self._held, ""
        return [Part(kind, text)] if text else []
