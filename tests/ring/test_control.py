"""The control plane: a handshake that only the token opens, and sessions that only take what was really said."""

from __future__ import annotations

import math
import random
import threading
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from math import inf, nan
from typing import Any, cast

import msgspec
import pytest

from prima_core.errors import AuthError, ClusterError, ConfigError, FrameError, ModelError, PrimaError
from prima_core.interfaces import Buffer
from prima_core.ring import control
from prima_core.ring.control import (
    Answer,
    Assign,
    Bye,
    Channel,
    DeviceInfo,
    Fault,
    FrameKind,
    Heartbeat,
    Hello,
    Message,
    ModelId,
    Progress,
    Ready,
    Refused,
    Rejected,
    Release,
    Session,
    Welcome,
)
from prima_core.ring.times import NodeTimes
from prima_core.ring.wire import Epoch, WirePolicy

SECRET = b"s" * 32
EPOCH = Epoch(2**64 - 1, 7)
HELLO = Hello(
    node_id="n-1",
    nonce=b"w" * 16,
    name="kitchen laptop",
    version="0.1.0",
    control_address="tcp://192.168.1.7:4001",
    data_addresses=("tcp://192.168.1.7:4002", "ipc:///tmp/x/s"),
    memory_bytes=8 * 2**30,
    devices=(DeviceInfo("mlx:gpu", 2**33, "M9", True, {"Q6_K": 1.5}), DeviceInfo("numpy:cpu", 8 * 2**30, "4 cores")),
)
WELCOME = Welcome(node_id="head", nonce=b"h" * 16, name="desk", version="0.1.0")
MESSAGES: tuple[Message, ...] = (
    Assign(
        epoch=EPOCH,
        plan=b'{"n_layers": 8}',
        model=ModelId("sha256:0123", 12_000_000, "prima-tiny"),
        wire=WirePolicy.AUTO,
        addresses={"n-1": "tcp://192.168.1.7:4002", "head": "tcp://192.168.1.2:4002"},
    ),
    Progress(EPOCH, 10, 100),
    Ready(EPOCH),
    Refused(EPOCH, Fault("ModelError", "no file with fingerprint sha256:0123", "--models DIR")),
    Refused(EPOCH, Fault("DeviceMemoryError", "3 of the layers would fit"), "torch:cuda:0", 2**32),
    Heartbeat(NodeTimes(9.0, 1.5, 0.0, 2.5, 1e-7, 3, 4, 2**40)),
    Heartbeat(),
    Release(),
    Bye("the user pressed Ctrl-C"),
)


def sessions(hello: Hello = HELLO, welcome: Welcome = WELCOME, secret: bytes = SECRET) -> tuple[Session, Session]:
    """Head's and worker's."""
    return control.head_session(hello, welcome, secret), control.worker_session(hello, welcome, secret)


# ---------------------------------------------------------------- handshake


def test_both_sides_come_to_a_session() -> None:
    hello = control.open_hello(control.hello_frame(HELLO, SECRET), SECRET)
    assert hello == HELLO
    welcome = control.open_answer(control.answer_frame(WELCOME, hello, SECRET), HELLO, SECRET)
    assert welcome == WELCOME
    head, worker = sessions(hello, welcome)
    assert head.id == worker.id
    assert worker.open(head.seal(Release())) == Release()
    assert head.open(worker.seal(Ready(EPOCH))) == Ready(EPOCH)


def test_an_empty_secret_works() -> None:
    assert control.open_hello(control.hello_frame(HELLO, b""), b"") == HELLO
    head, worker = sessions(secret=b"")
    assert head.open(worker.seal(Release())) == Release()


def test_nonces_are_random() -> None:
    assert len({control.new_nonce() for _ in range(100)}) == 100
    assert len(control.new_nonce()) == 16


def test_a_hello_without_the_token_is_not_opened() -> None:
    with pytest.raises(AuthError, match="token"):
        control.open_hello(control.hello_frame(HELLO, b"x" * 32), SECRET)


def test_an_answer_to_another_hello_is_not_opened() -> None:
    other = msgspec.structs.replace(HELLO, nonce=b"v" * 16)
    with pytest.raises(AuthError):
        control.open_answer(control.answer_frame(WELCOME, other, SECRET), HELLO, SECRET)


def test_an_answer_of_someone_without_the_token_is_not_opened() -> None:
    with pytest.raises(AuthError):
        control.open_answer(control.answer_frame(WELCOME, HELLO, b"x" * 32), HELLO, SECRET)


def test_a_hello_cannot_be_passed_off_as_an_answer() -> None:
    frame = bytearray(control.hello_frame(HELLO, SECRET))
    with pytest.raises(FrameError, match="kind ANSWER"):
        control.open_answer(frame, HELLO, SECRET)
    frame[5] = FrameKind.ANSWER
    with pytest.raises(AuthError):
        control.open_answer(frame, HELLO, SECRET)


def test_a_rejection_is_raised_as_the_heads_error() -> None:
    error = ConfigError("prima 0.2.0 does not work with 0.1.0", hint="install the same version")
    frame = control.answer_frame(Rejected(Fault.of(error)), HELLO, SECRET)
    with pytest.raises(ConfigError, match=r"0\.2\.0") as caught:
        control.open_answer(frame, HELLO, SECRET)
    assert caught.value.hint == "install the same version"


def test_a_session_needs_the_secret_and_both_nonces() -> None:
    ids = {
        sessions(hello, welcome, secret)[0].id
        for hello in (HELLO, msgspec.structs.replace(HELLO, nonce=b"v" * 16))
        for welcome in (WELCOME, msgspec.structs.replace(WELCOME, nonce=b"i" * 16))
        for secret in (SECRET, b"x" * 32)
    }
    assert len(ids) == 8


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_through_both_ways(message: Message) -> None:
    head, worker = sessions()
    assert worker.open(memoryview(head.seal(message))) == message
    assert head.open(memoryview(worker.seal(message))) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e13, "1", None], ids=str)
@pytest.mark.parametrize("field", [field.name for field in fields(NodeTimes)])
def test_times_that_cannot_be_are_refused(field: str, value: Any) -> None:  # Any: what a node might send
    head, worker = sessions()
    with pytest.raises(FrameError, match="damaged"):
        head.open(worker.seal(Heartbeat(replace(NodeTimes(), **{field: value}))))
    assert head.open(worker.seal(Release())) == Release()


def test_the_envelope_tells_whose_session_it_is() -> None:
    head, worker = sessions()
    head.seal(Release())
    assert control.read_envelope(head.seal(Release())) == (FrameKind.SEALED, worker.id, 2)
    assert control.read_envelope(control.hello_frame(HELLO, SECRET)).kind is FrameKind.HELLO


def test_a_replayed_message_is_refused_and_the_session_lives() -> None:
    head, worker = sessions()
    first, second = worker.seal(Ready(EPOCH)), worker.seal(Release())
    assert head.open(first) == Ready(EPOCH)
    with pytest.raises(AuthError, match="replayed"):
        head.open(first)
    assert head.open(second) == Release()
    with pytest.raises(AuthError, match="replayed"):
        head.open(first)


def test_a_lost_message_does_not_end_the_session() -> None:
    head, worker = sessions()
    worker.seal(Ready(EPOCH))
    assert head.open(worker.seal(Release())) == Release()


def test_a_message_sent_back_to_its_author_is_refused() -> None:
    head, _ = sessions()
    with pytest.raises(AuthError, match="changed on the way"):
        head.open(head.seal(Release()))


def test_a_message_of_another_session_is_refused() -> None:
    _, worker = sessions(msgspec.structs.replace(HELLO, nonce=b"v" * 16))
    head, _ = sessions()
    with pytest.raises(AuthError, match="another session"):
        head.open(worker.seal(Release()))


def test_every_changed_byte_is_noticed() -> None:
    head, worker = sessions()
    frame = worker.seal(Progress(EPOCH, 1, 2))
    for place in range(len(frame)):
        changed = bytearray(frame)
        changed[place] ^= 1
        with pytest.raises((AuthError, FrameError)):
            head.open(changed)
    assert head.open(frame) == Progress(EPOCH, 1, 2)


def test_a_forged_message_does_not_move_the_counter() -> None:
    head, worker = sessions()
    frame = worker.seal(Release())
    forged = bytearray(frame)
    forged[16:24] = b"\xff" * 8
    with pytest.raises(AuthError):
        head.open(forged)
    assert head.open(frame) == Release()


# ---------------------------------------------------------------- bounds


SANE: dict[str, object] = {"id": "a:gpu", "memory_bytes": 1, "summary": "", "shares_host": True, "growth": {}}


def with_devices(*devices: dict[str, object]) -> Hello:
    """A hello with devices that were made without any check."""
    hello = msgspec.msgpack.decode(msgspec.msgpack.encode(HELLO))
    hello[-1] = [list(device.values()) for device in devices]
    return cast("Hello", hello)


def with_device(**values: object) -> Hello:
    return with_devices({**SANE, **values})


@pytest.mark.parametrize("frame", [b"", b"PRMC", b"GET / HTTP/1.1" + bytes(100), bytes(5 * 2**20)])
def test_what_is_no_control_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameError):
        control.read_envelope(frame)


def test_another_version_is_told_with_a_hint() -> None:
    frame = bytearray(control.hello_frame(HELLO, SECRET))
    frame[4] = 2
    with pytest.raises(FrameError, match="format 2") as caught:
        control.open_hello(frame, SECRET)
    assert "same version" in caught.value.hint


def test_a_message_that_is_too_long_is_never_sent() -> None:
    head, _ = sessions()
    assign = Assign(EPOCH, bytes(4 * 2**20), ModelId("f", 1, "m"), WirePolicy.F32, {})
    with pytest.raises(FrameError, match="too long"):
        head.seal(assign)


@pytest.mark.parametrize(
    "hello",
    [
        msgspec.structs.replace(HELLO, nonce=b"short"),
        msgspec.structs.replace(HELLO, name="x" * 129),
        msgspec.structs.replace(HELLO, name="\x1b[2J"),
        msgspec.structs.replace(HELLO, node_id=""),
        msgspec.structs.replace(HELLO, data_addresses=()),
        msgspec.structs.replace(HELLO, data_addresses=("tcp://a:1",) * 17),
        msgspec.structs.replace(HELLO, memory_bytes=-1),
        msgspec.structs.replace(HELLO, devices=()),
        msgspec.structs.replace(HELLO, devices=tuple(DeviceInfo(f"a:{n}", 1) for n in range(65))),
        with_devices(SANE, SANE),
        *(with_device(memory_bytes=-1), with_device(id="\x1b[2J"), with_device(summary="x" * 1025)),
        *(with_device(growth={"Q6_K": factor}) for factor in (0.0, 0.99, -1.0, 65.0, inf, nan)),
        *(with_device(growth={"x" * 129: 1.0}), with_device(growth={str(n): 1.0 for n in range(65)})),
    ],
)
def test_a_hello_out_of_bounds_is_refused(hello: Hello) -> None:
    with pytest.raises(FrameError, match="damaged"):
        control.open_hello(control.hello_frame(hello, SECRET), SECRET)


def test_garbage_with_a_good_tag_is_refused_or_read_and_costs_no_memory() -> None:
    """What a node with the token, but gone mad, could send: bodies mutated before they are sealed."""
    chance = random.Random(7746)
    head, worker = sessions()
    bodies = [msgspec.msgpack.encode(message) for message in MESSAGES]
    read = 0
    tracemalloc.start()
    for _ in range(4000):
        frame = sealed_raw(worker, mutated(chance.choice(bodies), chance))
        try:
            message = head.open(frame)
        except FrameError:
            continue
        read += 1
        assert isinstance(message, Message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert 100 < read < 3900


def test_garbage_of_a_stranger_is_refused() -> None:
    chance = random.Random(7746)
    head, worker = sessions()
    frames = [worker.seal(message) for message in MESSAGES] + [control.hello_frame(HELLO, SECRET)]
    for _ in range(2000):
        frame = mutated(chance.choice(frames), chance)
        if frame not in frames:
            with pytest.raises((FrameError, AuthError)):
                head.open(frame)
            with pytest.raises((FrameError, AuthError)):
                control.open_hello(frame, SECRET)
            with pytest.raises((FrameError, AuthError)):
                control.open_answer(frame, HELLO, SECRET)


def sealed_raw(session: Session, body: bytes) -> bytes:
    """`body` sealed as it is."""
    return session.seal(msgspec.Raw(body))  # type: ignore[arg-type]  # Raw is written through as it is


def mutated(original: bytes, chance: random.Random) -> bytes:
    data = bytearray(original)
    for _ in range(chance.choice((1, 1, 3))):
        where = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[where] ^= 1 << chance.randrange(8)
            case 1:
                data[where] = chance.choice((0xDC, 0xDD, 0xDF, 0xC6, 0xDB, 0xFF, 0x91, 0x81, 0xC9))
            case 2:
                del data[where : where + chance.choice((1, 8))]
            case _:
                data[where:where] = chance.randbytes(chance.choice((1, 5)))
        if not data:
            break
    return bytes(data)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("error", [ModelError("cut", field="n_tensors", hint="load it again"), ClusterError("alone")])
def test_an_error_keeps_its_class_message_and_hint(error: PrimaError) -> None:
    back = Fault.of(error).error()
    assert type(back) is type(error)
    assert (back.message, back.hint) == (error.message, error.hint)


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "__doc__", "NoSuchError"])
def test_a_class_that_is_no_error_of_ours_becomes_a_cluster_error(kind: str) -> None:
    assert type(Fault(kind, "message", "hint").error()) is ClusterError


def test_an_error_of_any_text_can_be_sent() -> None:
    head, worker = sessions()
    for text in ("two\nlines \x1b[2J", "ü" * 5000, "\udc80 not UTF-8"):
        fault = Fault.of(ModelError(text, hint=text))
        assert head.open(worker.seal(Refused(EPOCH, fault))) == Refused(EPOCH, fault)
        assert head.open(worker.seal(Bye.because(text))) == Bye(fault.message)


# ---------------------------------------------------------------- channel


@dataclass
class Recorder:
    """A link that keeps what is sent."""

    peer: str = "nobody"
    sent: list[bytes] = field(default_factory=list)
    is_closed: bool = False

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        self.sent.append(b"".join(parts))

    def close(self) -> None:
        self.is_closed = True


def test_a_channel_sends_in_the_order_of_its_counters() -> None:
    head, worker = sessions()
    link = Recorder()
    channel = Channel(link, worker)

    def send_on() -> None:
        for _ in range(100):
            channel.send(Release(), 1.0)

    threads = [threading.Thread(target=send_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [head.open(frame) for frame in link.sent] == [Release()] * 400
    channel.close()
    assert link.is_closed


def test_only_the_answers_are_answers() -> None:
    frame = control.answer_frame(WELCOME, HELLO, SECRET)
    assert isinstance(control.open_answer(frame, HELLO, SECRET), Answer)
