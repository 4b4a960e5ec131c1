from __future__ import annotations

import random
import re

import pytest

from prima_core.engine.reasoning import Part, PartKind, ReasoningStream
from prima_core.model.reasoning import ReasoningTags

THINK = ReasoningTags("<think>", "</think>")
REASONING, CONTENT = PartKind.REASONING, PartKind.CONTENT


def pushed(pieces: list[str], starts_inside: bool = False, tags: ReasoningTags | None = THINK) -> list[list[Part]]:
    """What each piece lets through, and what the end does."""
    stream = ReasoningStream(tags, starts_inside)
    return [*map(stream.push, pieces), stream.flush()]


def whole(text: str, starts_inside: bool = False) -> tuple[str, str]:
    """Reasoning and content of a text that comes in one piece."""
    return joined(pushed([text], starts_inside))


def joined(given: list[list[Part]]) -> tuple[str, str]:
    parts = [part for some in given for part in some]
    kinds = [part.kind for part in parts]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    assert all(part.text for part in parts)
    by_kind = {kind: "".join(part.text for part in parts if part.kind is kind) for kind in PartKind}
    return by_kind[REASONING], by_kind[CONTENT]


def cut(text: str, starts_inside: bool) -> tuple[str, str]:
    """What shall come out, said differently: with the whole text in hand."""
    inside = text if starts_inside else None
    if opened := re.fullmatch(r"\s*<think>(.*)", text, re.DOTALL):
        inside = inside or opened[1]
    if inside is None:
        return "", text
    before, closed, after = inside.partition("</think>")
    return (before.strip(), after.lstrip()) if closed else (before.lstrip(), "")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("\n<think>hm</think>yes ", "hm", "yes "),
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>hm", "hm", ""),
        ("<think>hm </thi", "hm </thi", ""),
        ("<thin", "", "<thin"),
        (" \n yes", "", " \n yes"),
        ("yes <think>no</think>", "", "yes <think>no</think>"),
        ("yes </think>", "", "yes </think>"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("<think>a<think>b</think>c", "a<think>b", "c"),
        ("", "", ""),
    ],
)
def test_reasoning_is_what_stands_between_the_tags_at_the_beginning(text: str, reasoning: str, content: str) -> None:
    assert whole(text) == (reasoning, content)


def test_prompt_may_have_opened_the_reasoning() -> None:
    assert whole("\nhm\n</think>\n\nyes", starts_inside=True) == ("hm", "yes")
    assert whole("</think>yes", starts_inside=True) == ("", "yes")


def test_model_without_reasoning_may_spell_the_tags() -> None:
    assert joined(pushed(["<think>x</think>"], tags=None)) == ("", "<think>x</think>")


def test_text_comes_at_once_where_it_can_begin_no_tag() -> None:
    given = pushed(["<th", "ink>", "hm", " so <", "b", "> \n", "</", "think>", "\n", "\nyes", " <think>"])
    assert given == [
        [],
        [],
        [Part(REASONING, "hm")],
        [Part(REASONING, " so")],
        [Part(REASONING, " <b")],
        [Part(REASONING, ">")],
        [],
        [],
        [],
        [Part(CONTENT, "yes")],
        [Part(CONTENT, " <think>")],
        [],
    ]


def test_one_piece_may_hold_both_parts() -> None:
    assert pushed(["<think>a</think>b"])[0] == [Part(REASONING, "a"), Part(CONTENT, "b")]


def test_end_may_be_told_twice() -> None:
    stream = ReasoningStream(THINK)
    stream.push("<thi")
    assert (stream.flush(), stream.flush()) == ([Part(CONTENT, "<thi")], [])


@pytest.mark.parametrize("starts_inside", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_parts_do_not_depend_on_how_the_text_was_cut(seed: int, starts_inside: bool) -> None:
    rng = random.Random(seed)
    alphabet = ["<think>", "</think>", "</", "think", "<", ">", " ", "\n", "a", "\u00e9"]
    for _ in range(300):
        opening = rng.choice([[], ["<think>"], ["\n", "<think>"]])
        text = "".join([*opening, *rng.choices(alphabet, k=rng.randrange(12))])
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert joined(pushed(pieces, starts_inside)) == cut(text, starts_inside), pieces
