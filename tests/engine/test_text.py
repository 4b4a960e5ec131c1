from __future__ import annotations

import random

import pytest

from prima_core.engine.text import TextStream
from prima_core.errors import RequestError

SPECIAL = 1_000_000


class Pieces:
    """A tokenizer whose tokens are the given pieces of bytes; `SPECIAL` is a control token."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, id: int) -> bytes:
        return b"<|special|>" if id == SPECIAL else self.pieces[id]

    def is_silent(self, id: int) -> bool:
        return id == SPECIAL


def stream(pieces: list[bytes], stop: list[str]) -> tuple[list[str], TextStream]:
    """What each piece lets through, and what the end does."""
    text = TextStream(Pieces(pieces), stop)
    return [*(text.push(id) for id in range(len(pieces))), text.flush()], text


def split(data: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.sample(range(len(data) + 1), rng.randrange(len(data) + 1)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def cut(text: str, stop: list[str]) -> str:
    """What shall come out, said differently: read character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_text_comes_at_once_when_nothing_can_begin_a_stop_string() -> None:
    assert stream([b"one ", b"six"], ["two"])[0] == ["one ", "six", ""]


def test_halves_of_characters_wait_for_each_other() -> None:
    assert stream([b"a\xe2", b"\x82", b"\xacb"], [])[0] == ["a", "", "\u20acb", ""]


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    assert stream([b"a\xe2\x82"], [])[0] == ["a", "\ufffd"]


def test_bytes_that_are_never_utf8_become_replacements_at_once() -> None:
    assert stream([b"a\xffb"], [])[0] == ["a\ufffdb", ""]


def test_bytes_of_sentencepiece_wait_until_they_are_a_character() -> None:
    emoji = "\U0001f468\u200d\U0001f469"  # three characters in one sign: each may come alone, none in halves
    pushed, _ = stream([b" ok", *(bytes([byte]) for byte in emoji.encode()), b"!"], [])
    assert pushed == [" ok", "", "", "", emoji[0], "", "", emoji[1], "", "", "", emoji[2], "!", ""]


def test_byte_that_goes_on_no_character_gives_up_the_one_before() -> None:
    assert stream([b"\xf0\x9f", b"a", b"\xf0", b"\xf0\x9f\x98", b"\x80", b"\x80"], [])[0] == [
        "",
        "\ufffda",
        "",
        "\ufffd",
        "\U0001f600",
        "\ufffd",
        "",
    ]


def test_special_token_does_not_part_the_halves_of_a_character() -> None:
    text = TextStream(Pieces([b"\xe2\x82", b"\xac"]))
    assert [text.push(id) for id in (0, SPECIAL, 1)] == ["", "", "\u20ac"]


def test_stop_string_across_tokens_is_never_seen() -> None:
    pushed, text = stream([b"hello", b" ST", b"O", b"P and more", b"!"], ["STOP"])
    assert pushed == ["hello", " ", "", "", "", ""]
    assert text.stopped


def test_what_looked_like_a_stop_string_comes_when_it_is_none() -> None:
    assert stream([b"ST", b"O", b"RE"], ["STOP"])[0] == ["", "", "STORE", ""]


def test_held_text_comes_at_the_end() -> None:
    pushed, text = stream([b"never ST"], ["STOP"])
    assert pushed == ["never ", "ST"]
    assert not text.stopped


def test_end_may_be_told_twice() -> None:
    text = TextStream(Pieces([b"S"]), ["STOP"])
    assert (text.push(0), text.flush(), text.flush()) == ("", "S", "")


def test_stop_string_may_overlap_with_its_own_beginning() -> None:
    assert "".join(stream([b"a", b"a", b"a", b"b"], ["aab"])[0]) == "a"


def test_stop_string_that_is_complete_first_wins() -> None:
    assert "".join(stream([b"xabcd"], ["abcd", "bc"])[0]) == "xa"
    assert "".join(stream([b"xabc"], ["bc", "abc"])[0]) == "x"


def test_stop_string_between_halves_of_characters() -> None:
    data = "gr\u00fc\u00dfe \U0001f600 aus".encode()
    assert "".join(stream([data[i : i + 1] for i in range(len(data))], ["\u00dfe \U0001f600"])[0]) == "gr\u00fc"


def test_replacement_at_the_end_may_complete_a_stop_string() -> None:
    pushed, text = stream([b"ab\xe2\x82"], ["b\ufffd"])
    assert pushed == ["a", ""]
    assert text.stopped


def test_special_tokens_are_silent() -> None:
    text = TextStream(Pieces([b"ST", b"OP"]), ["STOP"])
    assert [text.push(id) for id in (0, SPECIAL, 1)] == ["", "", ""]
    assert text.stopped


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        TextStream(Pieces([]), ["a", ""])
    assert caught.value.param == "stop"


@pytest.mark.parametrize("seed", range(20))
def test_every_split_of_a_text_gives_the_same_text(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = ["a", "b", "ab", "\u00e9", "\U0001f600", "\u20ac"]
    for _ in range(100):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 20)))
        stop = ["".join(rng.choices(alphabet, k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        pushed, streamed = stream(split(text.encode(), rng), stop)
        assert "".join(pushed) == cut(text, stop)
        assert streamed.stopped == any(word in text for word in stop)


def test_every_split_of_broken_bytes_gives_the_same_text() -> None:
    rng = random.Random(3)
    for _ in range(500):
        data = bytes(rng.choices(b"ab\xe2\x82\xac\xf0\x9f\xff\xc3", k=rng.randrange(1, 16)))
        assert "".join(stream(split(data, rng), ["b\u20ac"])[0]) == cut(data.decode("utf-8", "replace"), ["b\u20ac"])
