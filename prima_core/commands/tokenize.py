"""`prima tokenize`: the token ids of a text."""

from __future__ import annotations

import sys

import msgspec
import rich_click as click

from prima_core.library.folder import find_model, models_folder
from prima_core.model.gguf import GGUFFile
from prima_core.model.tokenizer import Tokenizer


def tokenize(model: str, text: str | None, special: bool, as_json: bool, models: str | None) -> None:
    """Print the token ids and pieces of a text; standard input where TEXT is absent."""
    if text is None:
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    with GGUFFile.open(find_model(model, models_folder(models))) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(text, add_special=special, parse_special=special)
    if as_json:
        click.echo(msgspec.json.encode({"ids": ids, "pieces": tokenizer.pieces(ids)}).decode())
        return
    for id_, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        click.echo(f"{id_:>8} {piece!r}")
