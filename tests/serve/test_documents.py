"""docs/api.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from starlette.routing import Route

from prima_core.serve import chat, completions
from prima_core.serve.app import make_app
from prima_core.serve.bodies import LABELS, Neutral
from prima_core.serve.chat import ChatBody
from prima_core.serve.completions import CompletionBody
from prima_core.serve.generation import GenerationBody
from prima_core.serve.guard import Guard
from prima_core.serve.llama_server import DetokenizeBody, TokenizeBody
from tests.serve.fakes import FakeService

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
Rows = list[list[str]]


def tables(heading: str) -> list[Rows]:
    """The tables under a heading, each a list of rows of cells, without their heads."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found: list[Rows] = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append(rows[2:])
    return found


def names(rows: Rows) -> list[str]:
    return [row[0].strip("`") for row in rows]


def fields(*kinds: type[msgspec.Struct]) -> set[str]:
    return {field.name for kind in kinds for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Fields of both kinds of completion", fields(GenerationBody)),
        ("Fields of `/v1/chat/completions` alone", fields(ChatBody) - fields(GenerationBody)),
        ("Fields of `/v1/completions` alone", fields(CompletionBody) - fields(GenerationBody)),
        ("Fields of `/tokenize`", fields(TokenizeBody)),
        ("Fields of `/detokenize`", fields(DetokenizeBody)),
    ],
)
def test_every_field_that_is_acted_on_is_told(heading: str, expected: set[str]) -> None:
    told = names(tables(heading)[0])
    assert len(told) == len(set(told))
    assert set(told) == expected


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Fields of `/v1/chat/completions` alone", chat.UNSUPPORTED),
        ("Fields of `/v1/completions` alone", completions.UNSUPPORTED),
    ],
)
def test_every_field_that_is_refused_is_told_with_what_is_taken(heading: str, table: Neutral) -> None:
    told = {row[0].strip("`"): row[1] for row in tables(heading)[1]}
    assert told == {
        name: ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in values)
        for name, values in table.items()
    }


def test_every_field_that_is_not_looked_at_is_told() -> None:
    sentence = re.search(r"Taken and not looked at: ([^.]*)\.", PAGE.read_text(encoding="utf-8"))
    assert sentence is not None
    assert re.findall(r"`(\w+)`", sentence[1]) == list(LABELS)


def test_every_path_is_told() -> None:
    told = {(path, row[1]) for row in tables("Paths")[0] for path in re.findall(r"`(.*?)`", row[0])}
    routes = [route for route in make_app(FakeService(), Guard("127.0.0.1")).routes if isinstance(route, Route)]
    assert told == {
        (route.path.replace("{name:path}", "NAME"), method)
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
