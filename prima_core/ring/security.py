"""The cluster's secret: its text form, its file, and the keys and proofs that are derived from it.

Whoever knows the 32 bytes belongs to the cluster. They never travel; each use has a key of its own, so that what one
use gives away says nothing about another.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import sys
from pathlib import Path

from prima_core.errors import AuthError, ConfigError

SECRET_BYTES = 32
PROOF_BYTES = 32

_CHECK_BYTES = 3  # with the secret 35 bytes: exactly 56 letters of base32, no padding
_TOKEN_LETTERS = 56
_TOKEN_PREFIX = "prima_"
_SALT = b"prima cluster secret 1"


# ---------------------------------------------------------------- the token: the secret as text


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def format_token(secret: bytes) -> str:
    """The secret as text: `prima_` and 56 letters of base32, of which the last carry a checksum against typos."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a cluster secret has {SECRET_BYTES} bytes, got {len(secret)}")
    return _TOKEN_PREFIX + base64.b32encode(secret + _check(secret)).decode("ascii").lower()


def parse_token(text: str) -> bytes:
    """The secret of a token. Case, blanks and dashes do not count, 0 and 1 are read as O and L. Raises ConfigError."""
    hint = "copy the whole token from the computer that runs `prima serve`"
    letters = "".join(text.split()).replace("-", "").lower().removeprefix(_TOKEN_PREFIX).upper()
    if len(letters) != _TOKEN_LETTERS:
        raise ConfigError(f"a cluster token has {_TOKEN_LETTERS} letters, this one has {len(letters)}", hint=hint)
    try:
        data = base64.b32decode(letters, map01="L")
    except (binascii.Error, ValueError):
        raise ConfigError("a cluster token is made of the letters a-z and 2-7 only", hint=hint) from None
    secret, check = data[:SECRET_BYTES], data[SECRET_BYTES:]
    if not hmac.compare_digest(check, _check(secret)):
        raise ConfigError("the cluster token has a typo: its checksum is wrong", hint=hint)
    return secret


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(_SALT + secret).digest()[:_CHECK_BYTES]


# ---------------------------------------------------------------- the token's file


def find_secret(token: str | None, token_file: Path | None, state_file: Path | None = None) -> bytes | None:
    """The secret that the user gave: `--token-file`, else the token of `PRIMA_TOKEN`, else `state_file` if it exists.

    None where there is none of them. Raises ConfigError for a bad token and for a file that others can read.
    """
    if token_file is not None:
        return read_token(token_file)
    if token:
        return parse_token(token)
    if state_file is not None and state_file.exists():
        return read_token(state_file)
    return None


def load_or_create_token(path: Path) -> bytes:
    """The secret in the file, which is made (mode 0600, its folder 0700) where there is none.

    When two processes make it at once both get the same. Raises ConfigError.
    """
    try:
        if not path.exists():
            _create_token(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the token file {path}: {error}", hint="name another with --token-file"
        ) from None
    return read_token(path)


def read_token(path: Path) -> bytes:
    """The secret in the file. Raises ConfigError when it is missing, damaged, or open to other users."""
    try:
        with path.open("rb") as file:
            _check_private(path, os.fstat(file.fileno()))
            text = file.read(1024).decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path}: {error.strerror}", hint="check the path") from None
    try:
        return parse_token(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None


def _create_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(format_token(new_secret()) + "\n")
        _publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _publish(draft: Path, path: Path) -> None:
    """Give the finished draft its name unless the name is taken: the first process wins, nobody sees half a file."""
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    except OSError:  # no hard links (Android, FAT): the last process wins instead
        draft.replace(path)


def _check_private(path: Path, status: os.stat_result) -> None:
    if sys.platform == "win32":  # a user's folder is private by its access list; the mode bits say nothing
        return
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"the token file {path} can be read by other users", hint=f"chmod 600 {path}")


# ---------------------------------------------------------------- keys and proofs


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose: HKDF with SHA-256 (RFC 5869), the purpose as its `info`."""
    extracted = hmac.digest(_SALT, secret, "sha256")
    return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


def proof(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """32 bytes that only someone who knows the secret can make for these parts and this purpose."""
    mac = hmac.new(derive(secret, purpose), digestmod="sha256")
    for part in parts:  # with lengths, so that ("ab", "c") and ("a", "bc") differ
        mac.update(len(part).to_bytes(8, "little") + part)
    return mac.digest()


def check_proof(claimed: bytes, secret: bytes, purpose: str, *parts: bytes) -> None:
    """Raises AuthError unless `claimed` is the proof; takes the same time for every wrong one."""
    if not hmac.compare_digest(claimed, proof(secret, purpose, *parts)):
        raise AuthError("the sender does not know the cluster's token", hint="start every node with the same token")
