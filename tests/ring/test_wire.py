"""The data frame: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import random
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import FrameError
from prima_core.interfaces import Buffer, Chunk, KvKind, KvOp, Step
from prima_core.ring import wire
from prima_core.ring.wire import Epoch, Frame, FrameLimits, StaleEpoch, WireDtype, WirePolicy

EPOCH = Epoch(0xFEED_BEEF_0123_4567, 3)
LIMITS = FrameLimits(epoch=EPOCH, d_model=8, n_visits=4, max_tokens=256, max_chunks=16, max_kv_ops=16)
STEP = Step(
    chunks=(Chunk(sequence=2**40, start=10, count=3), Chunk(sequence=7, start=0, count=2)),
    kv=(
        KvOp(KvKind.OPEN, 7, capacity=64),
        KvOp(KvKind.FORK, 2**40, length=10, capacity=32, source=5),
        KvOp(KvKind.MOVE, 5, length=4, capacity=9, source=5),
        KvOp(KvKind.DROP, 5),
        KvOp(KvKind.MOVE, 8, length=30, capacity=32, source=7),
    ),
    tokens=(1, 2, 3, 4, 5),
)


def activation(n_tokens: int = 5, d_model: int = 8, scale: float = 1.0) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, scale, (n_tokens, d_model)).astype(np.float32)


def encoded(step: Step = STEP, dtype: WireDtype = WireDtype.F32, values: NDArray[np.float32] | None = None) -> bytes:
    values = activation(step.n_tokens) if values is None else values
    return b"".join(wire.encode_activation(EPOCH, 9, 2, step, values, dtype))


def decoded(data: Buffer, limits: FrameLimits = LIMITS) -> Frame:
    return wire.decode(memoryview(data), limits)


def with_field(offset: int, format: str, value: int, data: bytes | None = None) -> bytes:
    changed = bytearray(data or encoded())
    struct.pack_into("<" + format, changed, offset, value)
    return bytes(changed)


# ---------------------------------------------------------------- round trips


def test_a_step_comes_back_whole_but_without_its_tokens() -> None:
    frame = decoded(encoded())
    assert frame.epoch == EPOCH
    assert (frame.number, frame.visit, frame.error) == (9, 2, None)
    assert frame.step == replace(STEP, tokens=())
    np.testing.assert_array_equal(frame.activation, activation())


def test_token_ids_never_travel() -> None:
    assert encoded() == encoded(replace(STEP, tokens=(9, 9, 9, 9, 9)))


def test_a_step_without_tokens_carries_its_kv_changes() -> None:
    step = Step((), (KvOp(KvKind.DROP, 3),))
    frame = decoded(encoded(step))
    assert frame.step == step
    assert frame.activation.shape == (0, 8)


def test_f32_is_exact_for_every_value() -> None:
    values = activation()
    values[0, :4] = [np.inf, -np.inf, np.nan, 1e-45]
    np.testing.assert_array_equal(decoded(encoded(values=values)).activation, values)


def test_f32_is_not_copied() -> None:
    data = encoded()
    assert np.shares_memory(decoded(data).activation, np.frombuffer(data, np.uint8))


def test_the_activation_is_read_only() -> None:
    for dtype in WireDtype:
        assert not decoded(bytearray(encoded(dtype=dtype))).activation.flags.writeable


def test_the_payload_lies_on_a_multiple_of_64() -> None:
    for n_chunks in range(1, 6):
        step = Step(tuple(Chunk(number, 0, 1) for number in range(n_chunks)))
        head, payload = wire.encode_activation(EPOCH, 1, 0, step, activation(n_chunks), WireDtype.F32)
        assert len(head) % 64 == 0
        assert len(payload) == n_chunks * 8 * 4


def test_a_message_at_an_odd_address_is_read_all_the_same() -> None:
    data = encoded()
    odd = memoryview(bytearray(len(data) + 1))[1:]
    odd[:] = data
    frame = decoded(odd)
    assert frame.activation.flags.aligned
    np.testing.assert_array_equal(frame.activation, activation())


def test_an_array_of_any_layout_is_sent_right() -> None:
    values = np.asfortranarray(activation())
    np.testing.assert_array_equal(decoded(encoded(values=values)).activation, values)
    strided = activation(10)[::2]
    np.testing.assert_array_equal(decoded(encoded(values=strided)).activation, strided)


# ---------------------------------------------------------------- f16


def test_f16_halves_the_payload_and_rounds_once() -> None:
    data = encoded(dtype=WireDtype.F16)
    assert len(encoded()) - len(data) == 5 * 8 * 2
    np.testing.assert_array_equal(decoded(data).activation, activation().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [65505.0, -65505.0, 1e30, np.inf, -np.inf, np.nan])
def test_values_that_do_not_fit_f16_send_the_frame_in_f32(value: float) -> None:
    values = activation()
    values[3, 3] = value
    np.testing.assert_array_equal(decoded(encoded(dtype=WireDtype.F16, values=values)).activation, values)


def test_the_largest_f16_still_travels_in_f16() -> None:
    values = activation()
    values[0, :2] = [65504.0, -65504.0]
    assert len(encoded(dtype=WireDtype.F16, values=values)) < len(encoded(values=values))
    assert decoded(encoded(dtype=WireDtype.F16, values=values)).activation[0, 0] == 65504.0


def test_auto_sends_prefill_in_f16_and_decoding_in_f32() -> None:
    prefill, decoding = Step((Chunk(1, 0, 16),)), Step((Chunk(1, 16, 1), Chunk(2, 5, 1)))
    assert [policy.dtype(prefill).name for policy in WirePolicy] == ["F16", "F32", "F16"]
    assert [policy.dtype(decoding).name for policy in WirePolicy] == ["F32", "F32", "F16"]


# ---------------------------------------------------------------- errors on the way


def test_an_error_comes_through_with_its_step() -> None:
    frame = decoded(b"".join(wire.encode_error(EPOCH, 9, 4, "node 'b': disk gone")))
    assert (frame.number, frame.visit, frame.error) == (9, 4, "node 'b': disk gone")
    assert frame.step == Step(())
    assert frame.activation.shape == (0, 8)


def test_a_long_error_is_cut_between_letters() -> None:
    frame = decoded(b"".join(wire.encode_error(EPOCH, 9, 4, "ü€" * 1000)))
    assert frame.error is not None
    assert ("ü€" * 1000).startswith(frame.error)
    assert 1020 <= len(frame.error.encode()) <= 1024


def test_an_error_cannot_drive_the_terminal() -> None:
    frame = decoded(b"".join(wire.encode_error(EPOCH, 9, 4, "\x1b[2Jgone\n\x9b1m \udc80")))
    assert frame.error is not None
    assert frame.error.isprintable()
    assert "gone" in frame.error


def test_an_empty_error_is_still_an_error() -> None:
    assert decoded(b"".join(wire.encode_error(EPOCH, 9, 4, ""))).error == ""


# ---------------------------------------------------------------- epochs


def test_epochs_are_random_and_count() -> None:
    first = Epoch.first()
    assert first.run_id != Epoch.first().run_id
    assert first.next() == Epoch(first.run_id, first.counter + 1)


@pytest.mark.parametrize("epoch", [Epoch(EPOCH.run_id, 2), Epoch(EPOCH.run_id, 4), Epoch(1, 3)])
def test_another_epoch_is_stale_even_with_another_model(epoch: Epoch) -> None:
    with pytest.raises(StaleEpoch):
        decoded(encoded(), replace(LIMITS, epoch=epoch, d_model=16, n_visits=1, max_tokens=1))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, -1])
def test_a_cut_frame_is_refused(length: int) -> None:
    with pytest.raises(FrameError):
        decoded(encoded()[:length])


def test_a_frame_with_more_than_it_says_is_refused() -> None:
    with pytest.raises(FrameError, match="header says"):
        decoded(encoded() + b"\0")


@pytest.mark.parametrize(
    ("offset", "format", "value", "said"),
    [
        (0, "B", 0, "not a data frame"),
        (4, "B", 1, "format 1"),
        (5, "B", 3, "kind of frame 3"),
        (6, "B", 2, "activation type 2"),
        (28, "I", 5, "visit 5"),
        (32, "I", 17, "17 chunks"),
        (32, "I", 2**32 - 1, "4294967295 chunks"),
        (32, "I", 12, "bytes, its header says"),
        (36, "I", 17, "17 KV changes"),
        (36, "I", 2**32 - 1, "4294967295 KV changes"),
        (40, "I", 257, "257 tokens"),
        (40, "I", 4, "payload"),
        (40, "I", 2**32 - 1, "4294967295 tokens"),
        (44, "I", 9, "9 columns"),
        (44, "I", 2**32 - 1, "4294967295 columns"),
        (48, "Q", 2**64 - 1, "payload of 18446744073709551615 bytes"),
        (64 + 8, "I", 254, r"\[254, 257\)"),
        (64 + 8, "I", 2**32 - 1, "room for 256 positions"),
        (64 + 12, "I", 0, "room for 256 positions"),
        (64 + 12, "I", 2, "the chunks have 4 tokens"),
        (96, "I", 0, "KV change 0"),
        (96, "I", 6, "KV change 6"),
        (96 + 8, "I", 257, "capacity 257"),
        (128 + 4, "I", 33, "fork of sequence"),
        (160 + 4, "I", 257, "length 257"),
        (224 + 4, "I", 33, "move of sequence"),
    ],
)
def test_a_wrong_field_is_named(offset: int, format: str, value: int, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        decoded(with_field(offset, format, value))


def test_an_error_frame_with_a_step_or_a_long_message_is_refused() -> None:
    error = b"".join(wire.encode_error(EPOCH, 9, 4, "x"))
    with pytest.raises(FrameError, match="carries no step"):
        decoded(with_field(40, "I", 1, error))
    with pytest.raises(FrameError, match="over 1024"):
        decoded(with_field(48, "Q", 1025, error))
    with pytest.raises(FrameError, match="UTF-8"):
        decoded(error[:-1] + b"\xff")


def test_an_activation_that_is_not_the_steps_is_never_sent() -> None:
    for values in (activation(4), activation().astype(np.float64), activation()[0]):
        with pytest.raises(ValueError, match="the step wants float32"):
            wire.encode_activation(EPOCH, 1, 0, STEP, values, WireDtype.F32)  # type: ignore[arg-type]  # on purpose


def test_mutated_frames_are_read_or_refused_and_never_cost_much_memory() -> None:
    chance = random.Random(7746)
    originals = [encoded(), encoded(dtype=WireDtype.F16), b"".join(wire.encode_error(EPOCH, 9, 4, "node 'b' failed"))]
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(6000):
        data = mutated(chance.choice(originals), chance)
        try:
            frame = decoded(data)
        except FrameError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert frame.activation.shape == (frame.step.n_tokens, 8)
            assert frame.visit <= LIMITS.n_visits
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert min(outcomes.values()) > 200


def mutated(original: bytes, chance: random.Random) -> bytes:
    data = bytearray(original)
    for _ in range(chance.choice((1, 1, 2, 4))):
        where = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[where] ^= 1 << chance.randrange(8)
            case 1:
                data[where] = chance.choice((0, 1, 127, 255))
            case 2:
                where = min(where, len(data) - 4) // 4 * 4
                data[where : where + 4] = struct.pack("<I", chance.choice((0, 1, 2**31, 2**32 - 1, 1000)))
            case 3:
                del data[where : where + chance.choice((1, 4, 64))]
            case _:
                data[where:where] = chance.randbytes(chance.choice((1, 4, 64)))
        if len(data) < 4:
            break
    return bytes(data)
