"""The training text says what is so, and is the same for the same seed."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from training.arithmetic import Sums
from training.corpus import Corpus
from training.facts import load_facts
from training.phrases import expand
from training.spelling import Spelling, answer_about
from training.stories import Stories
from training.wordings import Wordings


def test_the_same_seed_gives_the_same_chats() -> None:
    first, second = Corpus(), Corpus()
    list(islice(second.chats(7, 3), 5))  # what was asked before does not matter

    assert list(islice(first.chats(3, 4), 20)) == list(islice(second.chats(3, 4), 20))
    assert list(islice(first.chats(4, 4), 20)) != list(islice(first.chats(3, 4), 20))


def test_chats_are_questions_and_answers_in_turn() -> None:
    for chat in islice(Corpus().chats(1, 5), 200):
        turns = chat[1:] if chat[0].role == "system" else chat
        assert [turn.role for turn in turns] == ["user", "assistant"] * 5
        assert all(turn.text and turn.text == turn.text.strip("\n") for turn in turns)
        assert not any(mark in turn.text for turn in chat for mark in ("{", "}", "@", "$", "HERO", "WORD", "ARTICLE"))


def test_sums_are_right() -> None:
    rng, sums = Random(5), Sums()
    for _ in range(2000):
        question, answer = sums.ask(rng)
        left, sign, right, result = re.fullmatch(r"(\d+) ([+x-]) (\d+) = (\d+)\.", answer).groups()  # type: ignore[union-attr]  # a miss fails the test
        a, b = int(left), int(right)
        assert int(result) == {"+": a + b, "-": a - b, "x": a * b}[sign]
        assert not re.search(r"\b(A|B)\b|THINGS|PERSON", question)


def test_spelling_spells_before_it_counts() -> None:
    assert answer_about("cat", "spell") == "The word cat is spelled c-a-t."
    assert answer_about("cat", "count") == "The word cat is spelled c-a-t: that is 3 letters."
    assert answer_about("cat", "last") == "The word cat is spelled c-a-t: the last letter is t."
    assert answer_about("cat", "first") == "The first letter of cat is c."


def test_a_spelling_question_names_its_word() -> None:
    rng, spelling = Random(2), Spelling()
    for _ in range(500):
        question, answer = spelling.ask(rng)
        word = re.search(r"(?:word|letter of) (\w+)", answer)
        assert word is not None
        assert word.group(1) in question.lower()


def test_a_story_is_about_the_one_asked_for() -> None:
    assert "owl" in Stories().tell("owl", Random(0))


@pytest.mark.parametrize("name", ["facts.toml", "smalltalk.toml"])
def test_every_pattern_of_every_fact_can_be_read(name: str) -> None:
    facts = load_facts(name)
    for fact in facts.facts:
        for patterns in fact.patterns.values():
            assert all(expand(pattern, Random(0), facts.phrases).strip() for pattern in patterns)


def test_phrases_nest_and_name_others() -> None:
    readings = {expand("{a|b{c|d}} $who", Random(seed), {"who": ["me", "{you}"]}) for seed in range(60)}

    assert readings == {f"{left} {right}" for left in ("a", "bc", "bd") for right in ("me", "you")}


@pytest.mark.parametrize(("pattern", "cause"), [("{a|b", "brace"), ("$nobody", "nobody"), ("$loop", "deeper")])
def test_a_bad_phrase_is_refused(pattern: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        expand(pattern, Random(0), {"loop": ["$loop"]})


def test_dressing_keeps_the_numbers_of_a_question_nearly_always() -> None:
    rng, wordings = Random(1), Wordings()

    dressed = [wordings.dress("what is 12 + 34", rng) for _ in range(300)]

    assert len(set(dressed)) > 100
    assert sum("12 + 34" in question for question in dressed) > 280
