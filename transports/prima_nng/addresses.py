"""What nng does not check or tidy about addresses: ports, and the files of ipc sockets."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prima_core.errors import LinkBroken

_IPC = "ipc://"
_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path without its final zero, unix(7)


# ---------------------------------------------------------------- tcp and tls+tcp


def check_tcp(address: str, scheme: str, *, lowest_port: int) -> None:
    """Raises LinkBroken unless the address is SCHEME://HOST:PORT; nng takes port 99999 and blanks in silence."""
    hint = f"an address looks like {scheme}://192.168.1.5:7747"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise LinkBroken(f"bad address {address!r}: {error}", hint=hint) from None
    if parts.scheme != scheme or not parts.hostname or port is None or parts.path or " " in address:
        raise LinkBroken(f"{address!r} is not a {scheme} address", hint=hint)
    if port < lowest_port:
        raise LinkBroken(f"port {port} of {address!r} cannot be dialled", hint=hint)


def with_port(address: str, port: str) -> str:
    return f"{address.rpartition(':')[0]}:{port}"


# ---------------------------------------------------------------- ipc


@dataclass(frozen=True, slots=True)
class IpcPlace:
    """Where an ipc socket lives. `own_folder`: a folder made for this socket alone, which goes with it."""

    address: str
    own_folder: Path | None = None

    def remove(self) -> None:
        """Give back the folder; the socket's own file is removed by nng."""
        if self.own_folder is not None:
            shutil.rmtree(self.own_folder, ignore_errors=True)


def ipc_place(address: str) -> IpcPlace:
    """The place to listen at: its folder exists, is ours, and is closed to other users. Raises LinkBroken."""
    if sys.platform == "win32":  # a named pipe, not a file
        return IpcPlace(address if address != _IPC else f"{_IPC}prima-{secrets.token_hex(8)}")
    if address == _IPC:
        folder = Path(tempfile.mkdtemp(prefix="prima-"))
        return IpcPlace(_IPC + str(_checked(folder / "s")), own_folder=folder)  # a short name: paths are limited
    path = _checked(_path(address))
    _prepare_folder(path.parent)
    if path.exists() and not path.is_socket():  # nng would replace any file
        raise LinkBroken(f"{path} is there and is not a socket", hint="choose another path")
    return IpcPlace(_IPC + str(path))


def ipc_peer(address: str) -> str:
    """The address to dial. Raises LinkBroken for a path that can never be a socket."""
    if sys.platform == "win32":
        return address
    return _IPC + str(_checked(_path(address)))


def _path(address: str) -> Path:
    if not address.startswith(_IPC) or address == _IPC:
        raise LinkBroken(f"{address!r} is not an ipc address", hint="it looks like ipc:///folder/name")
    return Path(address.removeprefix(_IPC)).absolute()


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
