"""The held-out questions: many, of every kind, and none of them in the training text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.builtin.rewordings import Case, load_cases, normalised, score
from training import batches
from training.corpus import Corpus


def training_questions() -> Iterator[str]:
    """Every question of the training text: of each batch as many chats as can be in it, and the vocabulary's."""
    corpus = Corpus()
    for step in range(batches.N_STEPS):
        n_rows = batches.BATCH_TOKENS // batches.row_tokens(step)
        for chat in islice(batches.chats(corpus, step), n_rows + n_rows // 2 + 2):
            yield from (turn.text for turn in chat if turn.role == "user")
    for chat in batches.vocabulary_chats(corpus):
        yield from (turn.text for turn in chat if turn.role == "user")


def test_there_are_enough_rewordings_of_every_kind() -> None:
    cases = load_cases()
    kinds = Counter(case.kind for case in cases)

    assert len(cases) >= 120
    assert len({normalised(case.ask) for case in cases}) == len(cases)
    assert all(kinds[kind] >= 10 for kind in ("fact", "arithmetic", "spelling", "greeting", "out-of-scope"))


@pytest.mark.timeout(300)  # it makes the whole training text
def test_no_rewording_occurs_in_the_training_text() -> None:
    held_out = {normalised(case.ask) for case in load_cases()}

    seen = held_out.intersection(normalised(question) for question in training_questions())

    assert seen == set()


def test_an_answer_needs_a_member_of_every_group_as_a_whole_word() -> None:
    case = Case("fact", "q", (("machines", "computers"), ("MIT",)))

    assert case.accepts("The mit licence, for all machines.")
    assert not case.accepts("The mit licence.")
    assert not case.accepts("A submitted licence for all machines.")


def test_a_score_counts_right_answers_and_keeps_the_wrong_ones() -> None:
    right, wrong = Case("sum", "2+2", (("4",),)), Case("sum", "8+8", (("16",),), before=("hi", "hello"))

    result = score([right, wrong], lambda messages: "4" if len(messages) == 1 else f"{len(messages)}")

    assert (result.n_right, result.n_asked, result.share) == (1, 2, 0.5)
    assert result.wrong == ((wrong, "3"),)
