"""Splits against llama.cpp's own, in vocabularies in which every border shows (fixtures/llamacpp-splits.json)."""

from __future__ import annotations

from typing import Any

import pytest

from prima_core.model.pretokenizers import PRE_TOKENIZERS
from prima_core.model.tokenizer import Tokenizer
from tests.model import splits


@pytest.fixture(scope="module")
def vocabularies() -> dict[bool, splits.SplitVocabulary]:
    texts = splits.fixture()["texts"]
    return {False: splits.byte_level(texts), True: splits.raw(texts)}


def test_fixture_has_every_name() -> None:
    assert sorted(name for group in splits.fixture()["splits"] for name in group["names"]) == sorted(PRE_TOKENIZERS)


@pytest.mark.parametrize("group", splits.fixture()["splits"], ids=lambda group: group["names"][0])
def test_texts_split_as_in_llamacpp(group: dict[str, Any], vocabularies: dict[bool, splits.SplitVocabulary]) -> None:
    vocabulary = vocabularies[group["names"][0] in splits.RAW]
    tokenizer = Tokenizer.from_metadata(vocabulary.metadata(group["names"][0]))
    texts, lengths = splits.fixture()["texts"], splits.fixture()["lengths"]
    expected = [(text, known[which]) for text, known, which in zip(texts, lengths, group["which"], strict=True)]
    assert [(text, vocabulary.lengths(tokenizer.encode(text))) for text in texts] == expected
    assert tokenizer.add_bos == group["add_bos"]
