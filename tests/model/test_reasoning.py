from __future__ import annotations

import pytest

from prima_core.model.reasoning import ReasoningTags
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.vocabulary import TokenKind
from tests.model.small_vocabulary import KINDS, TOKENS, metadata

TEMPLATE = "tokenizer.chat_template"


def tags_of(*added: str, kind: TokenKind = TokenKind.USER_DEFINED, template: str = "") -> ReasoningTags | None:
    tokens, kinds = [*TOKENS, *added], [*KINDS, *[int(kind)] * len(added)]
    given = metadata(tokens=tokens, token_type=kinds) | {TEMPLATE: template}
    return Tokenizer.from_metadata(given).reasoning_tags


def test_model_reasons_if_both_tags_were_added_to_its_vocabulary() -> None:
    found = tags_of("</think>")
    assert found is not None
    assert (found.opens, found.closes) == ("<think>", "</think>")
    assert found.ids == {TOKENS.index("<think>"), len(TOKENS)}


def test_one_tag_or_a_tag_made_of_letters_is_no_sign_of_reasoning() -> None:
    assert tags_of() is None
    assert tags_of("</think>", kind=TokenKind.NORMAL) is None


@pytest.mark.parametrize("template", ["{{ content.split('</think>')[-1] }}", "{{ '<think>\\n' }}"])
def test_model_reasons_if_its_template_names_a_tag(template: str) -> None:
    found = tags_of(template=template)
    assert found is not None
    assert found.closes == "</think>"


def test_each_family_has_its_own_tags() -> None:
    found = tags_of("[THINK]", "[/THINK]", kind=TokenKind.CONTROL)
    assert found is not None
    assert (found.opens, found.closes) == ("[THINK]", "[/THINK]")


def test_tags_that_are_control_tokens_are_text_of_an_answer_all_the_same() -> None:
    tokens, kinds = [*TOKENS, "[THINK]", "[/THINK]"], [*KINDS, *[int(TokenKind.CONTROL)] * 2]
    tokenizer = Tokenizer.from_metadata(metadata(tokens=tokens, token_type=kinds))
    opens = tokens.index("[THINK]")
    assert tokenizer.is_special(opens)
    assert not tokenizer.is_silent(opens)
    assert tokenizer.is_silent(tokens.index("<|im_end|>"))
    assert opens not in tokenizer.encode("[THINK]"), "in a message it stays text"


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_prompt_tells_whether_its_template_opened_the_reasoning(prompt: str, is_open: bool) -> None:
    assert ReasoningTags("<think>", "</think>").are_open_after(prompt) is is_open
