"""Where the sockets of transports are: hosts and ports, paths that are checked, and folders closed to other users."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prima_core.errors import LinkBroken

_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path without its final zero, unix(7)


_OWN_FOLDER = "prima-"


@dataclass(frozen=True, slots=True)
class SocketPlace:
    """Where a socket listens. `own_folder`: a folder made for this socket alone, which goes with it."""

    address: str
    own_folder: Path | None = None

    def remove(self) -> None:
        """Give back the folder; the socket's own file is removed by the transport."""
        if self.own_folder is not None:
            shutil.rmtree(self.own_folder, ignore_errors=True)


def listen_place(scheme: str, address: str) -> SocketPlace:
    """The place to listen at, a fresh one for `scheme://` alone: its folder is ours alone. Raises LinkBroken."""
    if address == f"{scheme}://":
        folder = Path(tempfile.mkdtemp(prefix=_OWN_FOLDER))
        return SocketPlace(f"{address}{_checked(folder / 's')}", own_folder=folder)  # a short name: paths are limited
    path = socket_path(scheme, address)
    _prepare_folder(path.parent)
    if path.exists() and not path.is_socket():  # a library might replace any file
        raise LinkBroken(f"{path} is there and is not a socket", hint="choose another path")
    return SocketPlace(f"{scheme}://{path}")


def abandon(address: str) -> None:
    """For a process that ends without closing its links: remove the socket at an address that it listens at, if there
    is one, and the folder that was made for it."""
    path = Path(address.partition("://")[2])
    with suppress(OSError):
        if path.is_socket():
            path.unlink()
            if path.parent.name.startswith(_OWN_FOLDER):
                path.parent.rmdir()


def socket_path(scheme: str, address: str) -> Path:
    """The absolute path in an address. Raises LinkBroken for a path that can never be a socket."""
    if not address.startswith(f"{scheme}://") or address == f"{scheme}://":
        raise LinkBroken(f"{address!r} is not an {scheme} address", hint=f"it looks like {scheme}:///folder/name")
    if "\0" in address:
        raise LinkBroken(f"{address!r} has a zero in its path", hint="choose another path")
    return _checked(Path(address.removeprefix(f"{scheme}://")).absolute())


def host_and_port(scheme: str, address: str, *, lowest_port: int) -> tuple[str, int]:
    """Of `scheme://HOST:PORT`, an IPv6 literal without its brackets. Raises LinkBroken for what can never work."""
    hint = f"an address looks like {scheme}://192.168.1.5:7747"
    if any(ord(letter) <= ord(" ") or letter == "\x7f" for letter in address):  # urlsplit would drop some in silence
        raise LinkBroken(f"{address!r} has a blank in it", hint=hint)
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise LinkBroken(f"bad address {address!r}: {error}", hint=hint) from None
    beyond = parts.path or parts.query or parts.fragment or parts.username is not None
    if parts.scheme != scheme or not parts.hostname or port is None or beyond:
        raise LinkBroken(f"{address!r} is not a {scheme} address", hint=hint)
    if port < lowest_port:
        raise LinkBroken(f"port {port} of {address!r} cannot be dialled", hint=hint)
    return parts.hostname, port


def close_at_exit(close: Callable[[], None], exits: ExitStack) -> None:
    """Close a link that was forgotten when the process ends, before its library's own clean-up."""
    atexit.register(close)
    exits.callback(atexit.unregister, close)


def _checked(path: Path) -> Path:
    size = len(os.fsencode(path))
    if size > _MAX_PATH_BYTES:
        raise LinkBroken(
            f"the socket path {path} has {size} bytes, the system allows {_MAX_PATH_BYTES}",
            hint="choose a shorter path, or set TMPDIR to a shorter folder",
        )
    return path


def _prepare_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise LinkBroken(f"cannot make the folder {folder}: {error.strerror}", hint="choose another path") from None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid != os.geteuid():
        raise LinkBroken(f"other users can enter {folder}", hint=f"use a folder of your own: chmod 700 {folder}")
