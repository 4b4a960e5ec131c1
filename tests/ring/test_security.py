"""The token: written, typed, kept private; and the proofs made with its secret."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import threading
from pathlib import Path

import pytest

from prima_core.errors import AuthError, ConfigError
from prima_core.ring import security

SECRET = bytes(range(32))
TOKEN = security.format_token(SECRET)


def test_a_token_comes_back_as_its_secret() -> None:
    for _ in range(100):
        secret = security.new_secret()
        assert len(secret) == 32
        assert security.parse_token(security.format_token(secret)) == secret


def test_a_token_is_one_word() -> None:
    assert TOKEN.startswith("prima_")
    assert len(TOKEN) == 6 + 56
    assert TOKEN.islower()


@pytest.mark.parametrize(
    "spoil", [str.upper, str.title, lambda text: f"  {text}\n", lambda text: text[:30] + "-\n" + text[30:]]
)
def test_a_token_may_be_wrapped_and_shouted(spoil: object) -> None:
    assert callable(spoil)
    assert security.parse_token(spoil(TOKEN)) == SECRET


def test_the_prefix_may_be_left_out() -> None:
    assert security.parse_token(TOKEN.removeprefix("prima_")) == SECRET


def test_every_single_typo_is_told() -> None:
    for place in range(6, len(TOKEN)):
        letter = "b" if TOKEN[place] != "b" else "c"
        with pytest.raises(ConfigError, match="typo"):
            security.parse_token(TOKEN[:place] + letter + TOKEN[place + 1 :])


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "this one has 0"), (TOKEN[:-1], "this one has 55"), (TOKEN + "a", "57"), (TOKEN[:-1] + "!", "letters a-z"),
     (TOKEN[:-1] + "é", "letters a-z")],
)  # fmt: skip
def test_what_is_no_token_is_refused_with_a_hint(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        security.parse_token(text)
    assert "prima serve" in caught.value.hint


def test_an_error_does_not_show_the_token() -> None:
    with pytest.raises(ConfigError) as caught:
        security.parse_token(TOKEN[:-1] + "a" if TOKEN[-1] != "a" else TOKEN[:-1] + "b")
    assert TOKEN[6:20] not in str(caught.value)


# ---------------------------------------------------------------- files


def test_a_token_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "state" / "prima" / "token"
    secret = security.load_or_create_token(file)
    assert security.load_or_create_token(file) == secret
    assert security.read_token(file) == secret
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["token"]


def test_makers_at_the_same_time_agree(tmp_path: Path) -> None:
    secrets: list[bytes] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        secrets.append(security.load_or_create_token(tmp_path / "token"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(secrets) == 8
    assert len(set(secrets)) == 1


def test_a_token_file_is_made_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    secret = security.load_or_create_token(tmp_path / "token")
    assert security.read_token(tmp_path / "token") == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    security.load_or_create_token(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="other users") as caught:
        security.load_or_create_token(file)
    assert caught.value.hint == f"chmod 600 {file}"


def test_a_damaged_token_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for content in (b"", b"\xff\xfe\0" * 1000, TOKEN[:-5].encode()):
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises(ConfigError, match=f"^{file}: "):
            security.read_token(file)


def test_a_missing_token_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            security.read_token(path)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        security.load_or_create_token(tmp_path / "file" / "token")


def test_the_users_own_file_goes_before_the_token_and_that_before_the_state(tmp_path: Path) -> None:
    mine, state = tmp_path / "mine", tmp_path / "state"
    in_mine, in_state = security.load_or_create_token(mine), security.load_or_create_token(state)
    assert security.find_secret(TOKEN, mine, state) == in_mine
    assert security.find_secret(TOKEN, None, state) == SECRET
    assert security.find_secret(None, None, state) == in_state
    assert security.find_secret("", None, tmp_path / "nowhere") is None
    assert security.find_secret(None, None) is None


# ---------------------------------------------------------------- keys and proofs


def test_keys_are_hkdf_of_the_secret() -> None:
    """RFC 5869, written out with the standard library."""
    extracted = hmac.new(b"prima cluster secret 1", SECRET, hashlib.sha256).digest()
    assert security.derive(SECRET, "tls") == hmac.new(extracted, b"tls\x01", hashlib.sha256).digest()


def test_keys_differ_by_purpose_and_secret() -> None:
    keys = {security.derive(secret, purpose) for secret in (SECRET, bytes(32), b"") for purpose in ("tls", "hello", "")}
    assert len(keys) == 9
    assert all(len(key) == 32 for key in keys)


def test_a_proof_holds_for_its_own_parts_only() -> None:
    claimed = security.proof(SECRET, "hello", b"ab", b"c")
    security.check_proof(claimed, SECRET, "hello", b"ab", b"c")
    for secret, purpose, parts in (
        (bytes(32), "hello", (b"ab", b"c")),
        (SECRET, "answer", (b"ab", b"c")),
        (SECRET, "hello", (b"a", b"bc")),
        (SECRET, "hello", (b"abc",)),
        (SECRET, "hello", (b"ab", b"c", b"")),
    ):
        with pytest.raises(AuthError, match="token"):
            security.check_proof(claimed, secret, purpose, *parts)
    with pytest.raises(AuthError):
        security.check_proof(claimed[:-1], SECRET, "hello", b"ab", b"c")
