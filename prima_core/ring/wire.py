"""The data frame: how activations, and the steps that they belong to, travel between nodes.

One frame is one message of a transport, little-endian:

    64 bytes            header (`_HEADER`)
    16 bytes a chunk    sequence, start, count (`_CHUNK`)
    32 bytes a KV op    kind, length, capacity, sequence, source (`_KV_OP`)
    4 bytes a row       whose logits are wanted
    zeros up to a multiple of 64
    payload             [n_tokens, d_model] in f32 or f16, or the UTF-8 message of an error

Behind the layers a step is nothing but its wanted rows: then there are no tables, and `n_tokens` counts these. To the
output part they come as activations; from one that is not on the head as logits, [n_tokens, vocab_size] in f32.

There is no checksum: TCP and TLS have theirs, and a hostile sender could compute ours. Instead every count and length
is checked against the frame's own size and against the plan's limits before anything is allocated. The token ids of a
step never travel: nodes on the way see activations only.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import FrameError
from prima_core.interfaces import Buffer, Chunk, KvKind, KvOp, Step

VERSION = 2
MAX_ERROR_BYTES = 1024

_MAGIC = b"PRMA"
_ALIGNMENT = 64
_MAX_F16 = 65504.0

# magic, version, kind, dtype | run id, counter | number, visit | chunks, KV ops, tokens, columns | payload, wanted rows
_HEADER = struct.Struct("<4sBBBx QI QI IIII Q I4x")
_CHUNK = struct.Struct("<QII")
_KV_OP = struct.Struct("<IIIIQQ")
_ROW = np.dtype("<u4")

_KV_CODES = {KvKind.OPEN: 1, KvKind.FORK: 2, KvKind.DROP: 4, KvKind.MOVE: 5}
_KV_KINDS = {code: kind for kind, code in _KV_CODES.items()}


class StaleEpoch(FrameError):
    """A sound frame of another epoch: to be dropped without a word."""


class Epoch(NamedTuple):
    """One assignment of the model to the nodes. `run_id` is random (64 bits), so that nobody can guess a live epoch."""

    run_id: int
    counter: int

    @classmethod
    def first(cls) -> Epoch:
        return cls(secrets.randbits(64), 1)

    def next(self) -> Epoch:
        return Epoch(self.run_id, self.counter + 1)


class WireDtype(IntEnum):
    """Type of the activations in a frame; the value is its code in the header."""

    F32 = 0
    F16 = 1

    @property
    def numpy(self) -> np.dtype[np.float32] | np.dtype[np.float16]:
        return np.dtype("<f4") if self is WireDtype.F32 else np.dtype("<f2")


class WirePolicy(StrEnum):
    """Which type the activations of a step travel in. AUTO: prefill in f16, decoding in f32."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"

    def dtype(self, step: Step) -> WireDtype:
        if self is WirePolicy.AUTO:
            return WireDtype.F16 if any(chunk.count > 1 for chunk in step.chunks) else WireDtype.F32
        return WireDtype.F16 if self is WirePolicy.F16 else WireDtype.F32


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a frame of this epoch may hold. `max_tokens`: the plan's KV positions, which bound rows and positions.
    `vocab_size`: columns of logits; 0: the output part is on the head, so none travel."""

    epoch: Epoch
    d_model: int
    n_visits: int
    max_tokens: int
    max_chunks: int = 1024
    max_kv_ops: int = 4096
    vocab_size: int = 0

    @property
    def last_visit(self) -> int:
        return self.n_visits + (self.vocab_size > 0)

    def columns(self, visit: int) -> int:
        """Of a row of what comes to a visit."""
        return self.d_model if visit <= self.n_visits else self.vocab_size


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A decoded frame, due at `visit` (as many as there are visits: at the output part; one more: at the head, which
    samples, where that is another node).

    `activation` is [n_tokens, d_model] float32, read-only: a view of the message where it came in f32. `wanted` are the
    rows of it whose logits are. From the output part on `step` and `wanted` are empty, and the rows are the wanted ones
    alone, at the head logits. With `error` set the step failed on the way: all is empty.
    """

    epoch: Epoch
    number: int
    visit: int
    step: Step
    activation: NDArray[np.float32]
    error: str | None = None
    wanted: tuple[int, ...] = ()


class _Kind(IntEnum):
    ACTIVATION = 1
    ERROR = 2


class _Header(NamedTuple):
    magic: bytes
    version: int
    kind: int
    dtype: int
    run_id: int
    counter: int
    number: int
    visit: int
    n_chunks: int
    n_kv: int
    n_tokens: int
    n_columns: int
    payload_bytes: int
    n_wanted: int


# ---------------------------------------------------------------- encode


def encode_activation(
    epoch: Epoch,
    number: int,
    visit: int,
    step: Step,
    activation: NDArray[np.float32],
    dtype: WireDtype,
    wanted: Sequence[int] = (),
) -> list[Buffer]:
    """The parts of a frame that carries `activation` ([n_tokens, d_model] float32) to `visit`, a layer's. `wanted`:
    rows of it whose logits are.

    The payload is not copied where it travels in f32: send the parts before the array changes. With F16 a frame whose
    values do not fit (over 65504, infinite, or not a number) travels in f32 all the same.
    """
    if activation.ndim != 2 or activation.shape[0] != step.n_tokens or activation.dtype != np.float32:
        raise ValueError(
            f"activation is {activation.dtype} {activation.shape}, the step wants float32 [{step.n_tokens}, d_model]"
        )
    return _encoded(epoch, number, visit, step, activation, dtype, wanted)


def encode_rows(
    epoch: Epoch, number: int, visit: int, rows: NDArray[np.float32], dtype: WireDtype = WireDtype.F32
) -> list[Buffer]:
    """The parts of a frame behind the layers: activations of wanted rows to the output part, or their logits to the
    head. As `encode_activation` otherwise."""
    return _encoded(epoch, number, visit, Step(()), rows, dtype, ())


def _encoded(
    epoch: Epoch,
    number: int,
    visit: int,
    step: Step,
    rows: NDArray[np.float32],
    dtype: WireDtype,
    wanted: Sequence[int],
) -> list[Buffer]:
    if dtype is WireDtype.F16 and not _fits_f16(rows):
        dtype = WireDtype.F32
    payload = np.ascontiguousarray(rows, dtype=dtype.numpy)
    n_tokens, n_columns = payload.shape
    header = _Header(
        _MAGIC, VERSION, _Kind.ACTIVATION, dtype, epoch.run_id, epoch.counter, number, visit,
        len(step.chunks), len(step.kv), n_tokens, n_columns, payload.nbytes, len(wanted),
    )  # fmt: skip
    parts: list[Buffer] = [_head(header, step, wanted)]
    if payload.size:
        parts.append(payload.data.cast("B"))
    return parts


def encode_error(epoch: Epoch, number: int, visit: int, message: str) -> list[Buffer]:
    """The parts of a frame that says why the step failed; a message over 1 KiB is cut."""
    text = message.encode("utf-8", "replace")[:MAX_ERROR_BYTES].decode("utf-8", "ignore").encode()
    header = _Header(
        _MAGIC, VERSION, _Kind.ERROR, 0, epoch.run_id, epoch.counter, number, visit, 0, 0, 0, 0, len(text), 0
    )
    return [_head(header, Step(())), text]


def _head(header: _Header, step: Step, wanted: Sequence[int] = ()) -> bytes:
    """Header and tables, padded to where the payload starts."""
    chunks = b"".join(_CHUNK.pack(chunk.sequence, chunk.start, chunk.count) for chunk in step.chunks)
    kv = b"".join(_KV_OP.pack(_KV_CODES[op.kind], op.length, op.capacity, 0, op.sequence, op.source) for op in step.kv)
    head = _HEADER.pack(*header) + chunks + kv + np.array(wanted, _ROW).tobytes()
    return head.ljust(_aligned(len(head)), b"\0")


def _fits_f16(activation: NDArray[np.float32]) -> bool:
    """False for a NaN too: it fails both comparisons."""
    if not activation.size:
        return True
    return bool(activation.max() <= _MAX_F16 and activation.min() >= -_MAX_F16)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# ---------------------------------------------------------------- decode


def decode(data: Buffer, limits: FrameLimits) -> Frame:
    """The frame in a message. Raises StaleEpoch for one of another epoch, FrameError for anything that is not a frame
    within `limits`; allocates no more than twice the message's own size."""
    message = memoryview(data).cast("B")
    header = _read_header(message)
    _check_header(header, limits)
    payload_start = _check_length(message, header)
    payload = message[payload_start:]
    epoch = Epoch(header.run_id, header.counter)
    if header.kind == _Kind.ERROR:
        nothing = np.empty((0, limits.d_model), np.float32)
        return Frame(epoch, header.number, header.visit, Step(()), nothing, _read_error(payload))
    step, wanted = Step(()), tuple[int, ...]()
    if header.visit < limits.n_visits:
        step = Step(_read_chunks(message, header, limits), _read_kv(message, header, limits))
        wanted = _read_wanted(message, header)
    activation = _read_activation(payload, header)
    return Frame(epoch, header.number, header.visit, step, activation, wanted=wanted)


def _read_header(message: memoryview) -> _Header:
    if message.nbytes < _HEADER.size:
        raise FrameError(f"a frame has at least {_HEADER.size} bytes, this one has {message.nbytes}")
    header = _Header(*_HEADER.unpack_from(message))
    if header.magic != _MAGIC:
        raise FrameError(f"not a data frame: it starts with {header.magic!r}")
    if header.version != VERSION:
        raise FrameError(
            f"the frame has format {header.version}, this node speaks {VERSION}",
            hint="install the same version of prima on every node",
        )
    return header


def _check_header(header: _Header, limits: FrameLimits) -> None:
    """The epoch comes first: a frame of an older plan is stale, not wrong."""
    if (header.run_id, header.counter) != limits.epoch:
        raise StaleEpoch(f"the frame is of epoch {header.counter}, not of {limits.epoch.counter} of this run")
    if header.visit > limits.last_visit:
        raise FrameError(f"visit {header.visit} is not one of the plan's {limits.n_visits}")
    if header.kind == _Kind.ERROR:
        _check_error_header(header)
    elif header.kind == _Kind.ACTIVATION:
        _check_activation_header(header, limits)
    else:
        raise FrameError(f"unknown kind of frame {header.kind}")


def _check_error_header(header: _Header) -> None:
    if header.n_chunks or header.n_kv or header.n_tokens or header.n_columns or header.n_wanted or header.dtype:
        raise FrameError("an error frame carries no step")
    if header.payload_bytes > MAX_ERROR_BYTES:
        raise FrameError(f"an error message of {header.payload_bytes} bytes is over {MAX_ERROR_BYTES}")


def _check_activation_header(header: _Header, limits: FrameLimits) -> None:
    if header.dtype not in (WireDtype.F32, WireDtype.F16):
        raise FrameError(f"unknown activation type {header.dtype}")
    if header.n_columns != limits.columns(header.visit):
        raise FrameError(f"rows of {header.n_columns} columns, the model has {limits.columns(header.visit)}")
    if header.visit > limits.n_visits and header.dtype != WireDtype.F32:
        raise FrameError("logits travel in f32")
    if header.visit >= limits.n_visits and (header.n_chunks or header.n_kv or header.n_wanted):
        raise FrameError("a frame behind the layers has no tables")
    for name, count, most in (
        ("tokens", header.n_tokens, limits.max_tokens),
        ("chunks", header.n_chunks, limits.max_chunks),
        ("KV changes", header.n_kv, limits.max_kv_ops),
        ("wanted rows", header.n_wanted, header.n_tokens),
    ):
        if count > most:
            raise FrameError(f"{count} {name} in a frame, the plan allows {most}")
    expected = header.n_tokens * header.n_columns * WireDtype(header.dtype).numpy.itemsize
    if header.payload_bytes != expected:
        raise FrameError(f"payload of {header.payload_bytes} bytes, {header.n_tokens} tokens have {expected}")


def _check_length(message: memoryview, header: _Header) -> int:
    """Where the payload starts."""
    payload_start = _aligned(_wanted_start(header) + header.n_wanted * _ROW.itemsize)
    expected = payload_start + header.payload_bytes
    if message.nbytes != expected:
        raise FrameError(f"the frame has {message.nbytes} bytes, its header says {expected}")
    return payload_start


def _kv_start(header: _Header) -> int:
    return _HEADER.size + header.n_chunks * _CHUNK.size


def _wanted_start(header: _Header) -> int:
    return _kv_start(header) + header.n_kv * _KV_OP.size


def _read_wanted(message: memoryview, header: _Header) -> tuple[int, ...]:
    rows = np.frombuffer(message, _ROW, header.n_wanted, _wanted_start(header)).tolist()
    if rows and max(rows) >= header.n_tokens:
        raise FrameError(f"row {max(rows)} is wanted of {header.n_tokens}")
    return tuple(rows)


def _read_chunks(message: memoryview, header: _Header, limits: FrameLimits) -> tuple[Chunk, ...]:
    table = message[_HEADER.size : _kv_start(header)]
    chunks = tuple(Chunk(*row) for row in _CHUNK.iter_unpack(table))
    for chunk in chunks:
        if chunk.count < 1 or chunk.start + chunk.count > limits.max_tokens:
            raise FrameError(
                f"chunk of sequence {chunk.sequence} is [{chunk.start}, {chunk.start + chunk.count}), "
                f"the plan has room for {limits.max_tokens} positions"
            )
    n_tokens = sum(chunk.count for chunk in chunks)
    if n_tokens != header.n_tokens:
        raise FrameError(f"the chunks have {n_tokens} tokens, the header says {header.n_tokens}")
    return chunks


def _read_kv(message: memoryview, header: _Header, limits: FrameLimits) -> tuple[KvOp, ...]:
    start = _kv_start(header)
    table = message[start : start + header.n_kv * _KV_OP.size]
    return tuple(_kv_op(row, limits) for row in _KV_OP.iter_unpack(table))


def _kv_op(row: tuple[int, int, int, int, int, int], limits: FrameLimits) -> KvOp:
    code, length, capacity, _, sequence, source = row
    kind = _KV_KINDS.get(code)
    if kind is None:
        raise FrameError(f"unknown KV change {code}")
    if max(length, capacity) > limits.max_tokens or (kind in (KvKind.FORK, KvKind.MOVE) and length > capacity):
        raise FrameError(
            f"{kind} of sequence {sequence}: length {length}, capacity {capacity}, "
            f"the plan has room for {limits.max_tokens} positions"
        )
    return KvOp(kind, sequence, length=length, capacity=capacity, source=source)


def _read_activation(payload: memoryview, header: _Header) -> NDArray[np.float32]:
    """f32 as a view of the message; f16, and a message that does not lie on a multiple of 4, are converted."""
    flat = np.frombuffer(payload, dtype=WireDtype(header.dtype).numpy)
    rows = flat.reshape(header.n_tokens, header.n_columns)
    if rows.dtype != np.float32 or not rows.flags.aligned:
        rows = rows.astype(np.float32)
    activation: NDArray[np.float32] = rows.view(np.float32)
    activation.flags.writeable = False
    return activation


def _read_error(payload: memoryview) -> str:
    try:
        text = str(payload, "utf-8")
    except UnicodeDecodeError:
        raise FrameError("the message of an error frame is not UTF-8") from None
    return "".join(letter if letter.isprintable() else " " for letter in text)  # it ends on terminals
