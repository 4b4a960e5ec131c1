"""The control plane: what head and workers tell each other, and how they know that it was really said.

A worker dials the head and says Hello, with the proof that it knows the cluster's token. The head dials back and
answers with Welcome, or with the reason why not. From the two nonces both derive the keys of a `Session`; everything
after that is sealed with it: a tag over the whole message and a counter that only grows, so that nothing can be
forged, changed, replayed or sent back to its author. A Hello can be replayed by a stranger: a node has joined only
when the first message of the new session has been opened; until then an older session of the same node stays.

    magic, version, kind, session, counter      24 bytes (`_ENVELOPE`)
    body                                        msgpack of one message
    tag                                         32 bytes, HMAC-SHA256 over all before it
"""

from __future__ import annotations

import hmac
import secrets
import struct
import threading
from enum import IntEnum
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from prima_core import errors
from prima_core.errors import AuthError, FrameError, PrimaError
from prima_core.interfaces import MAX_GROWTH, Buffer, Device, SendLink
from prima_core.plan.problem import Rate, Seconds
from prima_core.plan.profile import Profile
from prima_core.ring.probes import ID_BYTES, MAX_PING_BYTES
from prima_core.ring.security import PROOF_BYTES, check_proof, derive, proof
from prima_core.ring.times import NodeTimes
from prima_core.ring.wire import Epoch, WirePolicy

VERSION = 1
MAX_CONTROL_BYTES = 4 * 1024 * 1024
"""Longest control frame: for the `Limits` of control links."""

_MAGIC = b"PRMC"
_ENVELOPE = struct.Struct("<4sBBxxQQ")
_NONCE_BYTES = 16

T = TypeVar("T")

# ---------------------------------------------------------------- messages

_NO_CONTROL = r"\A[^\x00-\x1f\x7f-\x9f]*\Z"  # these strings end on terminals
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=_NO_CONTROL)]
Line = Annotated[str, Meta(max_length=1024, pattern=_NO_CONTROL)]
Nonce = Annotated[bytes, Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
Size = Annotated[int, Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class _Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Fault(_Part, frozen=True):
    """An error that crosses a process border: the name of its class, its message and its hint."""

    kind: Name
    message: Line
    hint: Line = ""

    @classmethod
    def of(cls, error: PrimaError) -> Fault:
        return cls(type(error).__name__, _line(error.message), _line(error.hint))

    def error(self) -> PrimaError:
        """The error again; ClusterError where this side does not know its class."""
        kind: object = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, PrimaError):
            return kind(self.message, hint=self.hint)
        return errors.ClusterError(self.message, hint=self.hint)


class DeviceInfo(_Part, frozen=True):
    """A device of a node; the fields are those of `interfaces.Device`."""

    id: Name
    memory_bytes: Size
    summary: Line = ""
    shares_host: bool = True
    growth: Annotated[dict[Name, float], Meta(max_length=64)] = {}
    copies: bool = False

    def __post_init__(self) -> None:
        for name, factor in self.growth.items():
            if not 1 <= factor <= MAX_GROWTH:  # also false for what is no number
                raise ValueError(f"tensors of {name} cannot grow to {factor} times their size")

    @classmethod
    def of(cls, device: Device) -> DeviceInfo:
        summary, growth = _line(device.summary), dict(device.growth)
        return cls(device.id, device.memory_bytes, summary, device.shares_host, growth, device.copies)


class Hello(_Message, frozen=True):
    """Worker to head, first. The head answers to `control_address`; `data_addresses` are where frames may be sent."""

    node_id: Name
    nonce: Nonce
    name: Name
    version: Name
    control_address: Line
    data_addresses: Annotated[tuple[Line, ...], Meta(min_length=1, max_length=16)]
    memory_bytes: Size
    devices: Annotated[tuple[DeviceInfo, ...], Meta(min_length=1, max_length=64)]
    profile: Profile = Profile()

    def __post_init__(self) -> None:
        if len({device.id for device in self.devices}) != len(self.devices):
            raise ValueError("two devices have the same id")


class Welcome(_Message, frozen=True):
    """Head to worker: the answer to a Hello."""

    node_id: Name
    nonce: Nonce
    name: Name
    version: Name


class Rejected(_Message, frozen=True):
    """Head to worker: the other answer to a Hello."""

    fault: Fault


class ModelId(_Part, frozen=True):
    """The model file that a node has to find among its own."""

    fingerprint: Name
    size_bytes: Size
    name: Line


class Assign(_Message, frozen=True):
    """Head to worker: take your part of this plan. `addresses`: data address of each node of the plan, by its name."""

    epoch: Epoch
    plan: Annotated[bytes, Meta(max_length=MAX_CONTROL_BYTES)]
    model: ModelId
    wire: WirePolicy
    addresses: Annotated[dict[Name, Line], Meta(max_length=1024)]


class Progress(_Message, frozen=True):
    """Worker to head: how much of its weights is loaded."""

    epoch: Epoch
    done_bytes: Size
    total_bytes: Size


class Ready(_Message, frozen=True):
    """Worker to head: steps of this epoch may come."""

    epoch: Epoch


class Refused(_Message, frozen=True):
    """Worker to head: the assignment could not be taken, e.g. because the model was not found here.

    `device`: where memory did not suffice; it now has `memory_bytes`."""

    epoch: Epoch
    fault: Fault
    device: Annotated[str, Meta(max_length=128, pattern=_NO_CONTROL)] = ""
    memory_bytes: Size = 0


class Unreachable(_Message, frozen=True):
    """Worker to head: the plan's next node, by its name, takes no frames of this one."""

    epoch: Epoch
    node: Name
    fault: Fault


ProbeId = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class Echo(_Message, frozen=True):
    """Head to worker: answer the pings of this probe, at the address of the node that sends them."""

    id: ProbeId
    address: Line


class Probe(_Message, frozen=True):
    """Head to worker: ping the node at the address, which answers, to find out how long `n_bytes` take to it.
    `is_brief`: with them alone, which says nothing of the rate."""

    id: ProbeId
    address: Line
    n_bytes: Annotated[int, Meta(ge=0, le=MAX_PING_BYTES)]
    is_brief: bool = False


class Probed(_Message, frozen=True):
    """Worker to head: what was found; as in `LinkFacts`. `is_known`: whether the other node answered."""

    id: ProbeId
    is_known: bool
    latency_s: Seconds = 0.0
    bytes_s: Rate = 0.0


class Heartbeat(_Message, frozen=True):
    """Both ways, twice a second. `times` are a worker's, for display only."""

    times: NodeTimes | None = None


class Release(_Message, frozen=True):
    """Head to worker: give up what is loaded and wait for the next assignment."""


class Bye(_Message, frozen=True):
    """Both ways: the sender leaves, on purpose."""

    reason: Line = ""

    @classmethod
    def because(cls, reason: str) -> Bye:
        return cls(_line(reason))


Answer = Welcome | Rejected
Message = Assign | Progress | Ready | Refused | Unreachable | Echo | Probe | Probed | Heartbeat | Release | Bye


_HELLO = msgspec.msgpack.Decoder(Hello)
_ANSWER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_MESSAGE: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.encode


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def _line(text: str) -> str:
    """`text` cut and cleaned so that the other side will take it as a Line."""
    cut = text if len(text) <= 1024 else text[:1023] + "…"
    return "".join(letter if letter.isprintable() else " " for letter in cut)


# ---------------------------------------------------------------- envelope


class FrameKind(IntEnum):
    HELLO = 1
    ANSWER = 2
    SEALED = 3


class Envelope(NamedTuple):
    """The outside of a control frame; nothing in it is proven yet. `session` finds the Session that can open it."""

    kind: FrameKind
    session: int
    counter: int


def read_envelope(frame: Buffer) -> Envelope:
    """Raises FrameError for what is not a control frame of this version."""
    size = memoryview(frame).nbytes
    if not _ENVELOPE.size + PROOF_BYTES <= size <= MAX_CONTROL_BYTES:
        raise FrameError(f"a control frame of {size} bytes is too short or too long")
    magic, version, kind, session, counter = _ENVELOPE.unpack_from(frame)
    if magic != _MAGIC:
        raise FrameError(f"not a control frame: it starts with {magic!r}")
    if version != VERSION:
        raise FrameError(
            f"the control frame has format {version}, this node speaks {VERSION}",
            hint="install the same version of prima on every node",
        )
    if kind not in FrameKind.__members__.values():
        raise FrameError(f"unknown kind of control frame {kind}")
    return Envelope(FrameKind(kind), session, counter)


def _envelope(kind: FrameKind, body: bytes, session: int = 0, counter: int = 0) -> bytes:
    frame = _ENVELOPE.pack(_MAGIC, VERSION, kind, session, counter) + body
    if len(frame) + PROOF_BYTES > MAX_CONTROL_BYTES:
        raise FrameError(f"a control message of {len(body)} bytes is too long, {MAX_CONTROL_BYTES} are allowed")
    return frame


def _split(frame: Buffer, kind: FrameKind) -> tuple[bytes, bytes, bytes]:
    """What the tag is over, the body in it, and the tag."""
    envelope = read_envelope(frame)
    if envelope.kind is not kind:
        raise FrameError(f"expected a control frame of kind {kind.name}, got {envelope.kind.name}")
    signed, tag = bytes(frame[:-PROOF_BYTES]), bytes(frame[-PROOF_BYTES:])
    return signed, signed[_ENVELOPE.size :], tag


def _decode(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"the body of a control frame is damaged: {error}") from None


# ---------------------------------------------------------------- handshake


def hello_frame(hello: Hello, secret: bytes) -> bytes:
    signed = _envelope(FrameKind.HELLO, _encode(hello))
    return signed + proof(secret, "hello", signed)


def open_hello(frame: Buffer, secret: bytes) -> Hello:
    """Raises AuthError when the sender does not know the secret (do not answer it), FrameError for damage."""
    signed, body, tag = _split(frame, FrameKind.HELLO)
    check_proof(tag, secret, "hello", signed)
    return _decode(body, _HELLO)


def answer_frame(answer: Answer, hello: Hello, secret: bytes) -> bytes:
    """The answer to this hello and to no other one."""
    signed = _envelope(FrameKind.ANSWER, _encode(answer))
    return signed + proof(secret, "answer", hello.nonce, signed)


def open_answer(frame: Buffer, hello: Hello, secret: bytes) -> Welcome:
    """Raises the head's error when it rejected the hello, AuthError for an answer that was not made for this hello."""
    signed, body, tag = _split(frame, FrameKind.ANSWER)
    check_proof(tag, secret, "answer", hello.nonce, signed)
    answer = _decode(body, _ANSWER)
    if isinstance(answer, Rejected):
        raise answer.fault.error()
    return answer


def head_session(hello: Hello, welcome: Welcome, secret: bytes) -> Session:
    """The head's end of the session that this handshake made."""
    return Session(_session_key(hello, welcome, secret), is_head=True)


def worker_session(hello: Hello, welcome: Welcome, secret: bytes) -> Session:
    """The worker's end of the session that this handshake made."""
    return Session(_session_key(hello, welcome, secret), is_head=False)


def _session_key(hello: Hello, welcome: Welcome, secret: bytes) -> bytes:
    names = (hello.node_id.encode(), welcome.node_id.encode())
    return proof(secret, "session", hello.nonce, welcome.nonce, *names)


# ---------------------------------------------------------------- session


class Session:
    """One end of the talk between the head and a worker. `id` is the same on both ends, and in every envelope.

    Messages must arrive in the order in which they were sealed (gaps are fine): several threads send by a Channel.
    """

    def __init__(self, key: bytes, *, is_head: bool) -> None:
        self.id = int.from_bytes(derive(key, "id")[:8], "little")
        to_head, to_worker = derive(key, "to head"), derive(key, "to worker")
        self._send_key, self._receive_key = (to_worker, to_head) if is_head else (to_head, to_worker)
        self._sent = 0
        self._received = 0

    def seal(self, message: Message) -> bytes:
        self._sent += 1
        signed = _envelope(FrameKind.SEALED, _encode(message), self.id, self._sent)
        return signed + hmac.digest(self._send_key, signed, "sha256")

    def open(self, frame: Buffer) -> Message:
        """Raises AuthError for a message that is forged, replayed or of another session, FrameError for damage."""
        signed, body, tag = _split(frame, FrameKind.SEALED)
        envelope = read_envelope(frame)
        if envelope.session != self.id:
            raise AuthError("the control frame belongs to another session")
        if not hmac.compare_digest(tag, hmac.digest(self._receive_key, signed, "sha256")):
            raise AuthError("the control frame was changed on the way, or its sender does not know the session's key")
        if envelope.counter <= self._received:
            raise AuthError(f"control frame {envelope.counter} was replayed, {self._received} have been read")
        self._received = envelope.counter
        return _decode(body, _MESSAGE)


class Channel:
    """The sending side of a session over a link, for any number of threads: sealing and sending are one act."""

    def __init__(self, link: SendLink, session: Session) -> None:
        self.session = session
        self._link = link
        self._lock = threading.Lock()

    def send(self, message: Message, timeout_s: float) -> None:
        """Raises what the link raises."""
        with self._lock:
            self._link.send([self.session.seal(message)], timeout_s)

    def close(self) -> None:
        self._link.close()
