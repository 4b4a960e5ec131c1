"""One file of a model, mapped read-only with its header checked; or what the file is instead."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.model.header import MAGIC, Header, TensorInfo, parse_header


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells whether a path still leads to the same unchanged file."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class Part:
    """An open file: most models are one, larger ones are split into several. Views outlive `close`."""

    def __init__(self, path: Path, state: FileState, mapped: mmap.mmap, header: Header) -> None:
        self.path = path
        self.state = state
        self.size = len(mapped)
        self.header = header
        self._map: mmap.mmap | None = mapped

    @classmethod
    def open(cls, path: Path) -> Part:
        """Map the file and check its whole header.

        Raises ModelError: no such file, not GGUF, another version, damaged; `field` names the culprit.
        """
        mapped, state = _map_file(path)
        try:
            header = parse_header(memoryview(mapped))
        except BaseException:
            _release(mapped)
            raise
        return cls(path, state, mapped, header)

    def data(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """The bytes of a tensor of this file as they lie in the map."""
        return np.frombuffer(self._open_map(), np.uint8, tensor.n_bytes, tensor.offset)

    def header_bytes(self) -> memoryview:
        """The bytes before the weights: metadata and tensor table."""
        return memoryview(self._open_map())[: self.header.n_bytes]

    @contextmanager
    def read_sparsely(self) -> Iterator[None]:
        """Meanwhile touching a page reads that page. Systems else read up to some MiB around it, which for a page of
        each tensor can be half of the file."""
        self._advise_random(True)
        try:
            yield
        finally:
            self._advise_random(False)

    def _advise_random(self, is_random: bool) -> None:
        if sys.platform != "win32":
            self._open_map().madvise(mmap.MADV_RANDOM if is_random else mmap.MADV_NORMAL)

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the map lies in this process: begin and end."""
        whole = np.frombuffer(self._open_map(), np.uint8)
        return int(whole.ctypes.data), int(whole.ctypes.data) + len(whole)

    def check_unchanged(self) -> None:
        """Raise ModelError when the file at the path is not the one that was opened, or was written to since."""
        try:
            now = FileState.of(os.stat(self.path))
        except OSError as error:
            raise ModelError(
                f"{self.path} went away while it was in use: {error.strerror}",
                field="file",
                hint="put it back, and start again",
            ) from error
        if now != self.state:
            raise ModelError(
                f"{self.path} was changed or replaced while it was in use", field="file", hint="start again"
            )

    def close(self) -> None:
        """Give the file back; the map itself goes with the last view of it. Idempotent."""
        mapped, self._map = self._map, None
        if mapped is not None:
            _release(mapped)

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map


def _release(mapped: mmap.mmap) -> None:
    try:
        mapped.close()
    except BufferError:  # somebody still holds a view: freeing the map would pull the memory from under it
        return


def _map_file(path: Path) -> tuple[mmap.mmap, FileState]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would wait for a writer
            raise _not_a_file(path)
        with open(path, "rb") as file:
            _refuse_other_formats(file, path)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), FileState.of(os.fstat(file.fileno()))
    except (OSError, ValueError, OverflowError) as error:
        raise _explain(error, path) from error


def _not_a_file(path: Path) -> ModelError:
    if path.is_dir():
        return ModelError(f"{path} is a folder", field="file", hint="name the .gguf file inside it")
    return ModelError(f"{path} is not a regular file", field="file")


def _explain(error: Exception, path: Path) -> ModelError:
    if isinstance(error, FileNotFoundError):
        return ModelError(f"there is no file {path}", field="file", hint="check the path of the model")
    if isinstance(error, PermissionError):
        return ModelError(f"{path} may not be read by this user", field="file", hint="change its permissions")
    return ModelError(f"{path} cannot be opened: {error}", field="file")


# ---------------------------------------------------------------- other kinds of files

_CONVERT = "convert the model with llama.cpp's convert_hf_to_gguf.py, or download its GGUF version"
_LOOKALIKES: Mapping[bytes, tuple[str, str]] = MappingProxyType(
    {
        b"version https://git-lfs": ("a git-lfs pointer, not the model itself", "run `git lfs pull`"),
        b"<": ("a web page", "the download went wrong: take the link to the file itself"),
        b"PK\x03\x04": ("a zip archive, as PyTorch's checkpoints are", _CONVERT),
        b"\x80": ("a Python pickle, as old PyTorch checkpoints are", _CONVERT),
        b"\x1f\x8b": ("a gzip archive", "unpack it first"),
        b"tjgg": ("a GGML file from before GGUF", "download the model's GGUF version"),
        b"fmgg": ("a GGML file from before GGUF", "download the model's GGUF version"),
        b"lmgg": ("a GGML file from before GGUF", "download the model's GGUF version"),
        b"{": ("a JSON file", "name the .gguf file of the model"),
    }
)


def _refuse_other_formats(file: BinaryIO, path: Path) -> None:
    """Tell what the file is instead, when it is something that users often have at hand."""
    start = file.read(64)
    if not start:
        raise ModelError(f"{path} is empty", field="magic", hint="fetch it again")
    if start.startswith(MAGIC[: len(start)]):
        return
    if start[8:10] == b'{"':
        raise ModelError(f"{path} is a safetensors file", field="magic", hint=_CONVERT)
    for beginning, (what, hint) in _LOOKALIKES.items():
        if start.startswith(beginning):
            raise ModelError(f"{path} is {what}", field="magic", hint=hint)
    raise ModelError(f"{path} is not a GGUF file: it begins with {start[:4]!r}", field="magic", hint=_CONVERT)
