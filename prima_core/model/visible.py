"""What strangers wrote (names of files, texts out of models, answers of hubs) as it may stand on a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with a `?` for each character that a terminal would obey or that is none; lines stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
