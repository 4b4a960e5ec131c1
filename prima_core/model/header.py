"""What stands before the weights of a GGUF file (v2 or v3): metadata and tensor table, parsed from untrusted bytes.

`parse_header` is a pure function of a buffer. No number in the buffer is believed before it is compared with how many
bytes there are: nothing is allocated, looped over or indexed by a count that the rest of the file could not hold.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from types import MappingProxyType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.model.quant import GGUFType, known_type, tensor_bytes, type_name

MAGIC = b"GGUF"
READ_VERSIONS = (2, 3)  # of the same layout: 3 only says that big-endian files exist
DEFAULT_ALIGNMENT = 32

# Far above every real file (a vocabulary of 256k tokens makes a header of 15 MB); bounds of time and memory.
MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own
MAX_NAME_BYTES = 255  # ggml stops at 63
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_STRINGS = 1 << 24
MAX_ALIGNMENT = 1 << 21

_INCOMPLETE = "the file is damaged or its download was not finished: fetch it again"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """An array of strings that stays in the file: whoever looks has all decoded, each time, so that the hundreds of
    thousands of a vocabulary do not lie in memory while a model runs. Make a list of it to look often.

    Bytes that are not UTF-8 (vocabularies hold halves of characters) are kept as lone surrogates, so
    `text.encode("utf-8", "surrogateescape")` gives the bytes of the file back.
    """

    __slots__ = ("_count", "_data")

    def __init__(self, data: memoryview, count: int) -> None:
        self._data = data
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return iter(_decode_strings(self._data, self._count))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return _decode_strings(self._data, self._count)[index]

    def __repr__(self) -> str:
        return f"<StringArray of {self._count}>"


Value = bool | int | float | str | StringArray | NDArray[np.generic]
"""A metadata value. Arrays of numbers are read-only views into the file; strings decode as in `StringArray`."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An entry of the tensor table. `shape` is in numpy order, `offset` counts from the start of the file, which of a
    split model is the one with index `part`.

    `type` is None for a type that prima does not read; then `n_bytes` is 0, and only `type_name` says more.
    """

    name: str
    type: GGUFType | None
    type_name: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header; `n_bytes` is its length without the padding before the weights."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    n_bytes: int


def parse_header(data: memoryview) -> Header:
    """The header of a file that is given whole. Raises ModelError; `field` names the field, key or tensor at fault."""
    cursor = _Cursor(data)
    _check_version(cursor)
    n_tensors = cursor.count("tensor_count", entry_bytes=33, most=MAX_TENSORS)
    n_keys = cursor.count("metadata_kv_count", entry_bytes=14, most=MAX_KEYS)
    metadata = _read_metadata(cursor, n_keys)
    alignment = _alignment(metadata)
    entries = [_read_entry(cursor, index) for index in range(n_tensors)]
    data_offset = -(-cursor.pos // alignment) * alignment
    tensors = {entry.name: _place(entry, data_offset, alignment, len(data)) for entry in entries}
    if len(tensors) < n_tensors:
        raise ModelError("is in the tensor table twice", field=_first_twice(entries))
    _refuse_overlap(tensors)
    return Header(MappingProxyType(metadata), MappingProxyType(tensors), alignment, cursor.pos)


def printable(name: str) -> str:
    """A name from a file as it may stand in a message: no control characters, no lone surrogates, no novel."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]


# ---------------------------------------------------------------- bytes


class _Cursor:
    """Reads forward through the header; every read is checked against what is left."""

    __slots__ = ("data", "end", "pos")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.pos = 0

    def skip(self, n_bytes: int, field: str) -> int:
        """Step over `n_bytes` and return where they begin."""
        begin = self.pos
        if n_bytes > self.end - begin:
            raise self._ends(n_bytes, field)
        self.pos = begin + n_bytes
        return begin

    def unpack(self, form: struct.Struct, field: str) -> int | float:
        value: int | float = form.unpack_from(self.data, self.skip(form.size, field))[0]
        return value

    def u32(self, field: str) -> int:
        return int(self.unpack(_U32, field))

    def u64(self, field: str) -> int:
        return int(self.unpack(_U64, field))

    def count(self, field: str, *, entry_bytes: int, most: int) -> int:
        """A u64 that announces so many entries of at least `entry_bytes` each."""
        number = self.u64(field)
        left = self.end - self.pos
        if number * entry_bytes > left:
            raise ModelError(f"says {number} entries, but only {left} bytes follow", field=field, hint=_INCOMPLETE)
        if number > most:
            raise ModelError(f"says {number} entries; prima reads at most {most}", field=field)
        return number

    def text(self, field: str, *, most: int, errors: str) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.u64(field)
        if length > self.end - self.pos:
            raise self._ends(length, field)
        if length > most:
            raise ModelError(f"is a text of {length} bytes; prima reads at most {most}", field=field)
        begin = self.skip(length, field)
        try:
            return str(self.data[begin : begin + length], "utf-8", errors)
        except UnicodeDecodeError as error:
            raise ModelError(f"is not UTF-8 at byte {error.start}", field=field, hint=_INCOMPLETE) from None

    def _ends(self, n_bytes: int, field: str) -> ModelError:
        if self.end < len(self.data):
            return ModelError(f"the header is longer than {MAX_HEADER_BYTES} bytes", field=field)
        return ModelError(
            f"the file ends inside it: {n_bytes} bytes wanted at {self.pos} of {self.end}",
            field=field,
            hint=_INCOMPLETE,
        )


def _check_version(cursor: _Cursor) -> None:
    begin = cursor.skip(len(MAGIC), "magic")
    found = bytes(cursor.data[begin : cursor.pos])
    if found != MAGIC:
        raise ModelError(f"{found!r} is not {MAGIC!r}", field="magic", hint="this is not a GGUF file")
    version = cursor.u32("version")
    if version in READ_VERSIONS:
        return
    if version and version & 0xFFFF == 0:  # a small number seen from the wrong end
        raise ModelError(
            "the file is big-endian, made for machines like IBM Z; prima reads little-endian GGUF",
            field="version",
            hint="download the model's ordinary file, or convert this one: pip install gguf, gguf-convert-endian",
        )
    raise ModelError(
        f"GGUF version {version} is not supported, only 2 and 3",
        field="version",
        hint="convert the file anew with a current llama.cpp" if version < 2 else "a newer prima may read it",
    )


# ---------------------------------------------------------------- metadata


class _Kind(IntEnum):
    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


_FORMATS = MappingProxyType(
    {
        _Kind.UINT8: struct.Struct("<B"),
        _Kind.INT8: struct.Struct("<b"),
        _Kind.UINT16: struct.Struct("<H"),
        _Kind.INT16: struct.Struct("<h"),
        _Kind.UINT32: _U32,
        _Kind.INT32: struct.Struct("<i"),
        _Kind.FLOAT32: struct.Struct("<f"),
        _Kind.BOOL: struct.Struct("<B"),
        _Kind.UINT64: _U64,
        _Kind.INT64: struct.Struct("<q"),
        _Kind.FLOAT64: struct.Struct("<d"),
    }
)


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(n_keys):
        key = cursor.text(f"metadata key {index}", most=MAX_KEY_BYTES, errors="strict")
        field = printable(key) or f"metadata key {index}"
        if not key or key in metadata:
            raise ModelError("is in the metadata twice" if key else "is empty", field=field)
        metadata[key] = _read_value(cursor, _read_kind(cursor, field), field)
    return metadata


def _read_kind(cursor: _Cursor, field: str) -> _Kind:
    number = cursor.u32(field)
    try:
        return _Kind(number)
    except ValueError:
        raise ModelError(f"metadata type {number} does not exist", field=field, hint=_INCOMPLETE) from None


def _read_value(cursor: _Cursor, kind: _Kind, field: str) -> Value:
    if kind is _Kind.STRING:
        return cursor.text(field, most=MAX_TEXT_BYTES, errors="surrogateescape")
    if kind is _Kind.ARRAY:
        return _read_array(cursor, field)
    number = cursor.unpack(_FORMATS[kind], field)
    if kind is not _Kind.BOOL:
        return number
    if number > 1:
        raise ModelError(f"is a truth value of {number}, not 0 or 1", field=field, hint=_INCOMPLETE)
    return bool(number)


def _read_array(cursor: _Cursor, field: str) -> StringArray | NDArray[np.generic]:
    kind = _read_kind(cursor, field)
    if kind is _Kind.ARRAY:
        raise ModelError("is an array of arrays, which prima does not read", field=field)
    if kind is _Kind.STRING:
        count = cursor.count(field, entry_bytes=8, most=MAX_STRINGS)
        begin = cursor.pos
        cursor.pos = _after_strings(cursor, count, field)
        return StringArray(cursor.data[begin : cursor.pos], count)
    form = _FORMATS[kind]
    count = cursor.count(field, entry_bytes=form.size, most=MAX_HEADER_BYTES)
    begin = cursor.skip(count * form.size, field)
    array = np.frombuffer(cursor.data, form.format, count, begin)
    if kind is not _Kind.BOOL:
        return array
    if count and array.max() > 1:
        raise ModelError("has a truth value that is not 0 or 1", field=field, hint=_INCOMPLETE)
    return array.view(np.bool_)


def _after_strings(cursor: _Cursor, count: int, field: str) -> int:
    """Where `count` strings end. A tight loop on purpose: it runs once per token of a vocabulary."""
    data, pos, last, unpack = cursor.data, cursor.pos, cursor.end - 8, _U64.unpack_from
    for index in range(count):
        if pos > last:
            raise ModelError(f"the file ends inside string {index} of {count}", field=field, hint=_INCOMPLETE)
        pos += 8 + unpack(data, pos)[0]
    if pos > cursor.end:
        raise ModelError(f"the file ends inside string {count - 1} of {count}", field=field, hint=_INCOMPLETE)
    return int(pos)


def _decode_strings(data: memoryview, count: int) -> list[str]:
    raw, pos, unpack = bytes(data), 0, _U64.unpack_from
    strings = []
    for _ in range(count):
        begin = pos + 8
        pos = begin + unpack(raw, pos)[0]
        strings.append(raw[begin:pos].decode("utf-8", "surrogateescape"))
    return strings


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment.bit_count() != 1:
        raise ModelError(f"{alignment!r:.80} is no power of two from 8 to {MAX_ALIGNMENT}", field="general.alignment")
    return alignment


# ---------------------------------------------------------------- tensor table


@dataclass(frozen=True, slots=True)
class _Entry:
    """As it stands in the file: `offset` from the start of the weights."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _read_entry(cursor: _Cursor, index: int) -> _Entry:
    name = cursor.text(f"name of tensor {index}", most=MAX_NAME_BYTES, errors="strict")
    if not name:
        raise ModelError("is empty", field=f"name of tensor {index}")
    field = printable(name)
    n_dims = cursor.u32(field)
    if not 1 <= n_dims <= 4:
        raise ModelError(f"has {n_dims} dimensions, not 1 to 4", field=field, hint=_INCOMPLETE)
    dims = [cursor.u64(field) for _ in range(n_dims)]
    if not 0 < prod(dims) < 1 << 63:
        raise ModelError(f"has the impossible dimensions {dims}", field=field, hint=_INCOMPLETE)
    return _Entry(name, tuple(reversed(dims)), cursor.u32(field), cursor.u64(field))


def _place(entry: _Entry, data_offset: int, alignment: int, file_bytes: int) -> TensorInfo:
    """Say where a tensor lies, after checking that it lies inside the file."""
    field = printable(entry.name)
    if entry.offset % alignment:
        raise ModelError(f"offset {entry.offset} is not a multiple of {alignment}", field=field, hint=_INCOMPLETE)
    type = known_type(entry.type_number)
    n_bytes = 0 if type is None else tensor_bytes(type, entry.shape, name=field)
    begin = data_offset + entry.offset
    if begin + n_bytes > file_bytes:
        raise ModelError(
            f"lies at {begin} to {begin + n_bytes}, but the file has {file_bytes} bytes", field=field, hint=_INCOMPLETE
        )
    return TensorInfo(entry.name, type, type_name(entry.type_number), entry.shape, begin, n_bytes)


def _first_twice(entries: Sequence[_Entry]) -> str:
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            return printable(entry.name)
        seen.add(entry.name)
    return ""


def _refuse_overlap(tensors: Mapping[str, TensorInfo]) -> None:
    previous: TensorInfo | None = None
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if previous is not None and previous.offset + previous.n_bytes > tensor.offset:
            raise ModelError(f"overlaps {printable(previous.name)}", field=printable(tensor.name), hint=_INCOMPLETE)
        previous = tensor
