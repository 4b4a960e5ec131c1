from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn, cast

import numpy as np
import pytest

from prima_core.errors import ModelError, RequestError
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.vocabulary import TokenKind
from tests.model.small_vocabulary import BYTES, KINDS, MERGES, TOKENS, metadata

END = TOKENS.index("<|im_end|>")
THINK = TOKENS.index("<think>")
UMLAUTS = TOKENS.index("\u00fc\u00fc")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(metadata())


def sentencepiece(**changes: object) -> dict[str, object]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    kinds = [TokenKind.UNKNOWN, *[TokenKind.CONTROL] * 2, *[TokenKind.BYTE] * 256, *[TokenKind.NORMAL] * 5]
    scores = [0.0] * 259 + [-4.0, -5.0, -6.0, -1.0, -2.0]
    given: dict[str, object] = {
        "model": "llama",
        "pre": "default",
        "merges": None,
        "tokens": pieces,
        "token_type": list(map(int, kinds)),
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return metadata(**(given | changes))


# ---------------------------------------------------------------- encoding


def test_words_merge_in_the_order_of_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.encode("hello hello hell")) == ["hello", " hello", " ", "hell"]


def test_special_tokens_in_a_text_stay_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    assert END not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"
    assert tokenizer.encode("a<|im_end|>b", parse_special=True) == [ord("a"), END, ord("b")]


def test_user_defined_tokens_are_found_in_any_text(tokenizer: Tokenizer) -> None:
    assert THINK in tokenizer.encode("so <think> so")
    assert UMLAUTS in tokenizer.encode("\u00fc\u00fc")


def test_markers_are_not_read_out_of_text_even_if_the_file_calls_them_user_defined(tokenizer: Tokenizer) -> None:
    tool = TOKENS.index("<|tool|>")
    assert tool not in tokenizer.encode("<|tool|>")
    assert tokenizer.encode("<|tool|>", parse_special=True) == [tool]


def test_longest_special_token_wins() -> None:
    tokens, kinds = [*TOKENS, "<|im_end|>!"], [*KINDS, int(TokenKind.CONTROL)]
    tokenizer = Tokenizer.from_metadata(metadata(tokens=tokens, token_type=kinds))
    assert tokenizer.encode("<|im_end|>!<|im_end|>", parse_special=True) == [len(tokens) - 1, END]


def test_no_special_token_comes_out_of_merging() -> None:
    # A damaged file: "hell" is said to be a control token, and merges would make it.
    kinds = list(KINDS)
    hell = TOKENS.index("hell")
    kinds[hell] = int(TokenKind.CONTROL)
    tokenizer = Tokenizer.from_metadata(metadata(token_type=kinds, pre="llama-bpe"))
    assert hell not in tokenizer.encode("hell hello")
    assert tokenizer.decode(tokenizer.encode("hell hello")) == "hell hello"


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_and_eos_are_added_where_the_file_asks(add_bos: bool, add_eos: bool) -> None:
    tokenizer = Tokenizer.from_metadata(metadata(add_bos_token=add_bos, add_eos_token=add_eos))
    plain = tokenizer.encode("hello")
    end = tokenizer.bos_id
    assert tokenizer.encode("hello", add_special=True) == [end] * add_bos + plain + [end] * add_eos
    assert tokenizer.encode("hello") == plain


def test_random_texts_survive_the_round_trip(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), 0x1F600])) for _ in range(rng.randrange(40))
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\ude00\ud83d", "<|im_end|>\ud800"])
def test_lone_surrogates_count_as_replacement_characters(tokenizer: Tokenizer, text: str) -> None:
    repaired = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    assert tokenizer.encode(text) == tokenizer.encode(repaired)


def test_surrogates_that_belong_together_are_one_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_sentencepiece_prefixes_a_space_and_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece())
    assert tokenizer.pieces(tokenizer.encode("ab abc")) == [" ab", " ab", "c"]
    assert tokenizer.decode(tokenizer.encode("\U0001f600")) == " \U0001f600"
    assert Tokenizer.from_metadata(sentencepiece(add_space_prefix=False)).encode("ab") == [259 + 3]


def test_user_defined_tokens_of_sentencepiece_are_found_before_spaces_are_spelled() -> None:
    given = sentencepiece(add_space_prefix=False)
    given["tokenizer.ggml.tokens"] = [*cast("list[str]", given["tokenizer.ggml.tokens"]), "  ", "<b>"]
    given["tokenizer.ggml.token_type"] = [*cast("list[int]", given["tokenizer.ggml.token_type"]), 4, 4]
    given["tokenizer.ggml.scores"] = [*cast("list[float]", given["tokenizer.ggml.scores"]), 0.0, 0.0]
    tokenizer = Tokenizer.from_metadata(given)
    ids = tokenizer.encode("ab   ab<b></s>")
    assert tokenizer.pieces(ids[:4]) == ["ab", "  ", " ab", "<b>"]
    assert 2 not in ids
    assert tokenizer.decode(ids) == "ab   ab<b></s>"


def test_sentencepiece_has_usual_ids_where_the_file_names_none() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece(bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.eos_ids == {2}
    assert tokenizer.encode("ab", add_special=True)[0] == 1


def test_sentencepiece_adds_bos_unless_the_file_says_no() -> None:
    assert Tokenizer.from_metadata(sentencepiece()).encode("ab", add_special=True)[0] == 1
    assert Tokenizer.from_metadata(sentencepiece(add_bos_token=False)).encode("ab", add_special=True)[0] != 1


def raw_bpe(**changes: object) -> dict[str, object]:
    letters = ["\u2581", "h", "i", "\n", "hi", "\u2581hi", "\n\n\n"]
    tokens = ["<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    given: dict[str, object] = {
        "model": "gemma4",
        "pre": None,
        "tokens": tokens,
        "token_type": [*map(int, [TokenKind.CONTROL, *[TokenKind.BYTE] * 256, *[TokenKind.NORMAL] * len(letters)])],
        "merges": ["h i", "\u2581 hi"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return metadata(**(given | changes))


def test_raw_bpe_spells_spaces_and_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(raw_bpe())
    assert tokenizer.pieces(tokenizer.encode("hi hi h")) == ["hi", " hi", " ", "h"]
    ids = tokenizer.encode("hi \u20ac\n")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"hi", b" ", b"\xe2", b"\x82", b"\xac", b"\n"]
    assert tokenizer.decode(ids) == "hi \u20ac\n"


def test_gemma_4_takes_a_run_of_newlines_that_is_a_token_whole() -> None:
    tokenizer = Tokenizer.from_metadata(raw_bpe())
    assert [len(tokenizer.encode("\n" * n)) for n in (1, 2, 3, 4)] == [1, 2, 1, 4]
    assert tokenizer.decode(tokenizer.encode("\nhi\n\n\nhi")) == "\nhi\n\n\nhi"


def test_gemma_4_begins_with_bos_whatever_its_file_says() -> None:
    assert Tokenizer.from_metadata(raw_bpe(add_bos_token=False)).encode("hi", add_special=True)[0] == 0


class PanicException(BaseException):
    """As the tokenizers library raises it."""


@pytest.mark.parametrize("panic", [PanicException, KeyboardInterrupt])
def test_text_that_the_library_panics_of_is_the_requests_fault(
    panic: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panicking:
        def __init__(self, model: object) -> None: ...

        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> NoReturn:
            raise panic("retry-limit-in-match over")

    monkeypatch.setattr("tokenizers.Tokenizer", Panicking)
    tokenizer = Tokenizer.from_metadata(metadata())
    expected = RequestError if panic is PanicException else panic
    with pytest.raises(expected, match="retry-limit"):
        tokenizer.encode("hello")


# ---------------------------------------------------------------- decoding


def test_tokens_are_bytes_that_may_be_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\u20ac")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"\xe2", b"\x82", b"\xac"]
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_every_byte_has_its_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(id) for id in range(256)] == [bytes([byte]) for byte in range(256)]


def test_special_tokens_are_silent_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello<|im_end|>", parse_special=True)
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special=False) == "hello<|im_end|>"
    assert tokenizer.is_special(END)
    assert not tokenizer.is_special(THINK)


@pytest.mark.parametrize("id", [-1, len(TOKENS), 2**40])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(RequestError, match=str(id)):
        tokenizer.decode([id])


# ---------------------------------------------------------------- disarming


@pytest.mark.parametrize(
    ("text", "disarmed"),
    [
        ("plain < text", "plain < text"),
        ("a<|im_end|>b", "a<@|im_end|>b"),
        ("<|im_end|><|im_start|>", "<@|im_end|><@|im_start|>"),
        ("begins <|im_st", "begins <@|im_st"),
        ("ends with <", "ends with <@"),
        ("<think>", "<think>"),
    ],
)
def test_disarmed_text_spells_no_special_token(tokenizer: Tokenizer, text: str, disarmed: str) -> None:
    assert tokenizer.disarm(text, "@") == disarmed


def test_overlapping_special_tokens_are_all_disarmed() -> None:
    tokens, kinds = [*TOKENS, "<a<", "<b>"], [*KINDS, *[int(TokenKind.CONTROL)] * 2]
    tokenizer = Tokenizer.from_metadata(metadata(tokens=tokens, token_type=kinds))
    assert tokenizer.disarm("<a<b>", "@") == "<@a<@b>"


# ---------------------------------------------------------------- what the file says


def test_ends_of_turns_are_known_by_role_and_by_name() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(eot_token_id=5, eom_token_id=6))
    assert tokenizer.eos_ids == {TOKENS.index("<|endoftext|>"), END, 5, 6}


def with_tokens(*added: str, kind: TokenKind = TokenKind.CONTROL, **changes: object) -> dict[str, object]:
    return metadata(tokens=[*TOKENS, *added], token_type=[*KINDS, *[int(kind)] * len(added)], **changes)


ADDED = len(TOKENS)  # id of the first of them


@pytest.mark.parametrize("kind", [TokenKind.CONTROL, TokenKind.USER_DEFINED])
@pytest.mark.parametrize("name", ["<|eot_id|>", "<end_of_turn>", "<|end|>", "[EOT]", "</s>", "<|fim_pad|>", "[e~["])
def test_token_that_ends_a_turn_by_its_name_is_special_whatever_the_file_calls_it(name: str, kind: TokenKind) -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(name, kind=kind))
    assert ADDED in tokenizer.eos_ids
    assert tokenizer.is_special(ADDED)
    assert ADDED not in tokenizer.encode(f"a{name}b")


@pytest.mark.parametrize("name", ["<|fim_prefix|>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>"])
def test_marks_around_code_to_fill_in_are_special_and_end_nothing(name: str) -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens(name, kind=TokenKind.USER_DEFINED))
    assert tokenizer.is_special(ADDED)
    assert ADDED not in tokenizer.eos_ids
    assert ADDED not in tokenizer.encode(f"a{name}b")


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|calls|>", "<|flush|>"], ["<|calls|>", "<|flush|>"]),
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["</s>", "<|tool_response>", "<turn|>"], ["<|tool_response>", "<turn|>"]),
    ],
)
def test_some_names_end_no_turn_beside_others(names: list[str], kept: list[str]) -> None:
    ends = Tokenizer.from_metadata(with_tokens(*names)).eos_ids
    assert [name for id, name in enumerate(names, ADDED) if id in ends] == kept


def test_file_may_name_the_token_that_ends_filled_in_code() -> None:
    tokenizer = Tokenizer.from_metadata(with_tokens("<|fim_pad|>", "<x>", fim_pad_token_id=ADDED + 1))
    assert {ADDED, ADDED + 1} & tokenizer.eos_ids == {ADDED + 1}


def test_phi_3_takes_away_white_space_after_special_tokens() -> None:
    given = with_tokens("<|user|>", "<|end|>", "<s>", bos_token_id=ADDED + 2) | {"general.name": "Phi-3 Mini"}
    tokenizer = Tokenizer.from_metadata(given)
    ids = tokenizer.encode("<s> <|user|>\n hello <|end|>\n<|user|>\u00a0", parse_special=True)
    assert tokenizer.decode(ids, skip_special=False) == "<s> <|user|>hello <|end|><|user|>\u00a0"
    others = Tokenizer.from_metadata(given | {"general.name": "Qwen"})
    assert others.decode(others.encode("<|user|>\n hello", parse_special=True)) == "\n hello"


def test_ordinary_tokens_with_such_a_name_do_not_end_a_turn() -> None:
    kinds = list(KINDS)
    kinds[END] = int(TokenKind.NORMAL)
    assert END not in Tokenizer.from_metadata(metadata(token_type=kinds)).eos_ids


def test_arrays_of_numbers_may_be_numpy_and_texts_may_be_bytes() -> None:
    given = metadata(token_type=np.array(KINDS, np.int32), tokens=[token.encode() for token in TOKENS], model=b"gpt2")
    assert Tokenizer.from_metadata(given).encode("hello") == [TOKENS.index("hello")]


def test_files_without_kinds_have_normal_tokens_only() -> None:
    assert not Tokenizer.from_metadata(metadata(token_type=None)).is_special(END)


def test_chat_template_is_the_files_own() -> None:
    assert Tokenizer.from_metadata(metadata()).chat_templates == {}
    assert Tokenizer.from_metadata({**metadata(), "tokenizer.chat_template": "{{ 1 }}"}).chat_templates == {
        "default": "{{ 1 }}"
    }


def test_bytes_without_a_token_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    tokens = [token if token != BYTES[0x20] else "spare" for token in TOKENS]
    merges = [merge for merge in MERGES if "\u0120" not in merge]
    Tokenizer.from_metadata(metadata(tokens=tokens, merges=merges))
    assert "no token for 1 of the bytes" in caplog.text


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (metadata(model=None), "model"),
        (metadata(model=3), "model"),
        (metadata(model="rwkv"), "model"),
        (metadata(model="whitespace"), "model"),
        (metadata(pre=None), "pre"),
        (metadata(pre="whitespace"), "pre"),
        (metadata(pre="never-heard-of"), "pre"),
        (metadata(tokens=None), "tokens"),
        (metadata(tokens="abc"), "tokens"),
        (metadata(tokens=7), "tokens"),
        (metadata(tokens=[]), "token_type"),
        (metadata(tokens=[*TOKENS[:-1], 5]), f"tokens[{len(TOKENS) - 1}]"),
        (metadata(tokens=[*TOKENS[:-1], "\udcff"]), f"tokens[{len(TOKENS) - 1}]"),
        (metadata(tokens=[*TOKENS[:-1], b"\xff"]), f"tokens[{len(TOKENS) - 1}]"),
        (metadata(tokens=[*TOKENS[:-1], TOKENS[0]]), f"tokens[{len(TOKENS) - 1}]"),
        (metadata(tokens=TOKENS[:-1]), "token_type"),
        (metadata(token_type=KINDS[:-1]), "token_type"),
        (metadata(token_type=["1"] * len(KINDS)), "token_type"),
        (metadata(token_type=[*KINDS[:-1], 7]), f"token_type[{len(KINDS) - 1}]"),
        (metadata(token_type=[*KINDS[:-1], -1]), f"token_type[{len(KINDS) - 1}]"),
        (metadata(token_type=np.zeros((2, 2))), "token_type"),
        (metadata(merges=None), "merges"),
        (metadata(merges=["h e", "q x"]), "merges[1]"),
        (metadata(merges=["nospace"]), "merges[0]"),
        (metadata(merges=["h e l"]), "merges[0]"),
        (metadata(merges=[""]), "merges[0]"),
        (metadata(merges=[3]), "merges[0]"),
        (metadata(bos_token_id=len(TOKENS)), "bos_token_id"),
        (metadata(eos_token_id=-1), "eos_token_id"),
        (metadata(eos_token_id=2**32 - 1), "eos_token_id"),
        (metadata(eot_token_id=10**6), "eot_token_id"),
        (metadata(eom_token_id="x"), "eom_token_id"),
        (metadata(bos_token_id=True), "bos_token_id"),
        (metadata(bos_token_id=1.0), "bos_token_id"),
        (metadata(bos_token_id=None, add_bos_token=True), "bos_token_id"),
        (metadata(add_bos_token=1), "add_bos_token"),
        (sentencepiece(scores=None), "scores"),
        (sentencepiece(scores=[0.0]), "scores"),
        (sentencepiece(scores=[float("nan")] * 264), "scores[0]"),
        (sentencepiece(scores=["a"] * 264), "scores"),
        (sentencepiece(unknown_token_id=999), "unknown_token_id"),
        (sentencepiece(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
    ],
)
def test_damaged_vocabularies_are_refused_by_the_key_at_fault(given: dict[str, object], field: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_metadata(given)
    assert caught.value.field == f"tokenizer.ggml.{field}"


@pytest.mark.parametrize(
    ("model", "said"), [("bert", "WordPiece"), ("t5", "Unigram"), ("rwkv", "RWKV"), ("abacus", "'abacus'")]
)
def test_kind_of_vocabulary_that_is_not_supported_is_named(model: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        Tokenizer.from_metadata(metadata(model=model))
    assert "SentencePiece" in caught.value.hint


def test_named_chat_templates_are_those_that_the_file_lists() -> None:
    named = {f"tokenizer.chat_template.{name}": f"{name} template" for name in ("tool_use", "rag", "unlisted")}
    given = {**metadata(), **named, "tokenizer.chat_template": "plain", "tokenizer.chat_templates": ["tool_use", "rag"]}
    assert Tokenizer.from_metadata(given).chat_templates == {
        "default": "plain",
        "tool_use": "tool_use template",
        "rag": "rag template",
    }


def test_chat_template_of_another_type_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.chat_template"):
        Tokenizer.from_metadata({**metadata(), "tokenizer.chat_template": 5})


def _random_value(rng: random.Random) -> object:
    makers: list[Callable[[], object]] = [
        lambda: None,
        lambda: rng.randrange(-5, 400),
        lambda: "hello",
        lambda: [rng.randrange(-2, 9) for _ in range(rng.choice([0, 3, len(TOKENS)]))],
        lambda: rng.sample(TOKENS, rng.randrange(len(TOKENS))),
        lambda: [rng.choice(TOKENS) + " " + rng.choice(TOKENS) for _ in range(5)],
        lambda: np.array([rng.random()] * len(TOKENS), np.float32),
        lambda: b"\xff\xfe",
    ]
    return rng.choice(makers)()


def test_random_damage_is_a_model_error_or_a_tokenizer_that_works() -> None:
    rng = random.Random(11)
    keys = [*metadata(), "tokenizer.ggml.add_bos_token", "tokenizer.ggml.scores", "tokenizer.chat_template"]
    n_works = n_refused = 0
    for _ in range(500):
        given = {**metadata(), rng.choice(keys): _random_value(rng)}
        try:
            tokenizer = Tokenizer.from_metadata(given)
        except ModelError as error:
            n_refused += error.field.startswith("tokenizer.")
        else:
            tokenizer.decode(tokenizer.encode("hello <think> <|im_end|>", add_special=True, parse_special=True))
            n_works += 1
    assert n_works + n_refused == 500
    assert min(n_works, n_refused) > 50


# ---------------------------------------------------------------- hostile files and texts


def test_other_threads_run_while_a_long_text_is_split() -> None:
    tokenizer = Tokenizer.from_metadata(metadata())
    text, ticks, done = "hello world " * 40_000, [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            done.wait(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    tokenizer.encode(text)
    seconds = time.perf_counter() - begin
    done.set()
    ticker.join()
    assert ticks[0] > 50 * seconds  # a thousand in a second where nothing stands in the way


def test_a_vocabulary_of_very_many_different_special_tokens_is_read_and_found_soon() -> None:
    tokens = [f"{chr(0x4E00 + n % 20_000)}{n}" for n in range(60_000)]
    kinds = [*KINDS, *[int(TokenKind.CONTROL)] * len(tokens)]
    tokenizer = Tokenizer.from_metadata(metadata(tokens=[*TOKENS, *tokens], token_type=kinds))
    ids = tokenizer.encode(f"hello{tokens[-1]}hello", parse_special=True)
    assert tokenizer.pieces(ids) == ["hello", tokens[-1], "hello"]


def test_a_piece_of_absurd_length_is_refused_and_not_split() -> None:
    with pytest.raises(ModelError, match="absurd length") as caught:
        Tokenizer.from_metadata(
            sentencepiece(
                tokens=[*cast(list[str], sentencepiece()["tokenizer.ggml.tokens"]), "ab" * 50_000],
                token_type=[*cast(list[int], sentencepiece()["tokenizer.ggml.token_type"]), int(TokenKind.NORMAL)],
                scores=[*cast(list[float], sentencepiece()["tokenizer.ggml.scores"]), -3.0],
            )
        )
    assert caught.value.field == "tokenizer.ggml.tokens"


def test_a_chat_template_that_is_no_text_can_be_told_all_the_same() -> None:
    given = metadata() | {"tokenizer.chat_template": "a\udcffb"}
    assert Tokenizer.from_metadata(given).chat_templates["default"] == "a\ufffdb"
