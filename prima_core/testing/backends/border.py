"""The border of a backend: descriptor, devices, the arrays that go in and out, wrong input, memory, closing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from prima_core.errors import ConfigError, DeviceMemoryError, FrameError, PlanError, PrimaError
from prima_core.interfaces import (
    API,
    MAX_GROWTH,
    Backend,
    BackendOptions,
    BackendPlugin,
    Chunk,
    Device,
    KvType,
    Layers,
    Probe,
    Shard,
    Slice,
    Step,
)
from prima_core.model.quant import GGUFType
from prima_core.testing.backends.kv import KV_MODEL
from prima_core.testing.backends.subject import IDS, WHOLE, FloatArray, Subject, close_to_exact
from prima_core.testing.driving import joined, opened, step_of
from prima_core.testing.report import Figures, NotOffered, Wrong, expect, expect_refusal

TINY = KV_MODEL
ALL = Layers(0, TINY.n_layers)
PART = Slice((ALL,), True, True, KvType.F32)

# ---------------------------------------------------------------- descriptor and devices


def check_descriptor(plugin: BackendPlugin) -> Figures:
    name = plugin.name
    right = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9._+-]*", name) is not None and name != "auto"
    expect(right, "a name in lower case that starts with a letter, and not 'auto'", repr(name))
    hint = f"write api={API} yourself; do not import the number"
    expect(plugin.api == API, f"api {API}, the version of the hooks that this prima speaks", repr(plugin.api), hint)
    expect(plugin.extra is None or isinstance(plugin.extra, str), "extra to be a name or None", repr(plugin.extra))
    return {"name": name}


def check_probe(plugin: BackendPlugin) -> Figures:
    """It never raises, and says the same twice; where the backend cannot be used it says why."""
    probe = plugin.probe()
    expect(isinstance(probe, Probe), "a Probe", repr(probe))
    expect(isinstance(probe.reason, str), "a reason that is text", repr(probe.reason))
    expect(probe == plugin.probe(), "the same answer twice", f"{probe}, then another")
    expect(probe.usable or bool(probe.reason and probe.hint), "a reason and a hint for what is not usable", repr(probe))
    return {"usable": str(probe.usable).lower(), **({"reason": probe.reason} if probe.reason else {})}


def check_options(open_backend: Callable[[BackendOptions], Backend]) -> None:
    """Kernels that nobody has are refused by name; `auto` may choose, an explicit ask fails loudly."""
    wrong = "no-such-kernels"

    def open_and_close() -> None:
        open_backend(BackendOptions(kernels=wrong)).close()

    error = expect_refusal(ConfigError, f"kernels={wrong!r}", open_and_close)
    expect(wrong in error.message, f"the error to name {wrong!r}", error.message)


def check_devices(backend: Backend, name: str | None) -> Figures:
    """`name` None: that of the first device's id."""
    devices = backend.devices()
    is_sequence = isinstance(devices, Sequence) and all(isinstance(device, Device) for device in devices)
    expect(is_sequence and len(devices) > 0, "a sequence of at least one Device", repr(devices))
    ids = [device.id for device in devices]
    expect(len(set(ids)) == len(ids), "each id once", ", ".join(ids))
    for device in devices:
        _check_device(device, name or ids[0].partition(":")[0])
    return {device.id: f"{device.memory_bytes / 1e9:.1f} GB" for device in devices}


def _check_device(device: Device, name: str) -> None:
    expect(device.id.startswith(f"{name}:") and device.id != f"{name}:", f"an id like {name}:cpu", repr(device.id))
    expect(
        type(device.memory_bytes) is int and 0 < device.memory_bytes < 1 << 50,
        f"the bytes that weights and KV may take now on {device.id}",
        repr(device.memory_bytes),
        "a positive int, less than a petabyte: plans are made by it",
    )
    types = {known.name for known in GGUFType}
    for grown, growth in device.growth.items():
        expect(grown in types, f"growth by names of tensor types, e.g. 'Q4_K', on {device.id}", repr(grown))
        expect(1 <= growth <= MAX_GROWTH, f"{grown} to grow by 1 to {MAX_GROWTH:g} on {device.id}", repr(growth))


def check_describe(backend: Backend) -> Figures:
    facts = backend.describe()
    expect(isinstance(facts, Mapping), "a mapping of facts for `prima doctor`", repr(facts))
    strings = all(isinstance(key, str) and isinstance(value, str) for key, value in facts.items())
    expect(strings, "facts that are strings", repr(dict(facts)))
    return dict(facts)


# ---------------------------------------------------------------- arrays


def check_handed_out(subject: Subject) -> None:
    """Activations and logits are float32 host arrays that later calls leave as they are."""
    with subject.part(TINY, PART) as shard:
        kept: list[tuple[str, FloatArray, bytes]] = []
        for sequence in range(3):
            step = step_of(sequence, IDS[sequence : sequence + 5], kv=[opened(sequence, 8)])
            x = shard.embed(step)
            y = shard.run(ALL, x, step)
            for what, array, width in (
                ("embed", x, TINY.d_model),
                ("run", y, TINY.d_model),
                ("logits", shard.logits(y, range(5)), TINY.vocab_size),
            ):
                _check_array(what, array, (5, width))
                kept.append((what, array, array.tobytes()))
    for what, array, before in kept:
        expect(array.tobytes() == before, f"what {what} gave to stay as it is", "other values after later calls", _OWN)


_OWN = "copy what the device or the next call may write to again"


def _check_array(what: str, array: FloatArray, shape: tuple[int, int]) -> None:
    expect(type(array) is np.ndarray, f"{what} to give a numpy array", type(array).__name__)
    expected = f"{what} to give float32 {list(shape)}, C-contiguous"
    came = f"{array.dtype} {list(array.shape)}, strides {list(array.strides)}"
    expect(array.dtype == np.float32 and array.shape == shape and array.flags.c_contiguous, expected, came)


def check_taken_in(subject: Subject) -> None:
    """Activations may lie at any address in read-only memory, as in a message, and nothing is written to them."""
    step = step_of(0, IDS[:7], kv=[opened(0, 8)])
    with subject.part(TINY, PART) as shard:
        expected_x = shard.embed(step)
        message = bytearray(b"odd" + expected_x.tobytes())
        before = bytes(message)
        x = np.frombuffer(memoryview(message).toreadonly(), np.float32, offset=3).reshape(expected_x.shape)
        y = shard.run(ALL, x, step)
        expect(bytes(message) == before, "run to leave its input as it is", "other values", _IN)
        message[3:] = y.tobytes()
        before = bytes(message)
        rows = shard.logits(x, range(7))
        expect(bytes(message) == before, "logits to leave its input as it is", "other values", _IN)
        writable = y.copy()
        shard.run(ALL, writable, step_of(1, IDS[:7], kv=[opened(1, 8)]))
        shard.logits(writable, [3])
        expect(np.array_equal(writable, y), "writable input to stay as it is too", "other values", _IN)
    close_to_exact(rows, subject.models.exact(TINY, IDS[:7]), subject.tolerance.of(TINY), "logits")


_IN = "copy the input where an operation writes in place: it belongs to the caller"


def check_rows(subject: Subject) -> None:
    """`logits` gives the rows that are asked for, in that order."""
    with subject.part(TINY, PART) as shard:
        step = step_of(0, IDS[:9], kv=[opened(0, 9)])
        y = shard.run(ALL, shard.embed(step), step)
        exact = subject.models.exact(TINY, IDS[:9])
        for rows in ([8], [4, 0, 4], list(range(9))):
            limit = subject.tolerance.of(TINY)
            close_to_exact(shard.logits(y, rows), exact[rows], limit, f"logits of rows {rows}")


def check_ends(subject: Subject) -> None:
    """The ends of the model are only where they were asked for, alone too."""
    step = step_of(0, IDS[:3], kv=[opened(0, 4)])
    for tied in (False, True):
        tiny = replace(TINY, tied_output=tied)
        with ExitStack() as exits:
            first, middle, last, ends = (
                exits.enter_context(subject.part(tiny, part))
                for part in (
                    Slice((), has_input=True, kv_type=KvType.F32),
                    Slice((ALL,), kv_type=KvType.F32),
                    Slice((), has_output=True, kv_type=KvType.F32),
                    replace(WHOLE, kv_type=KvType.F32),
                )
            )
            y = middle.run(ALL, first.embed(step), step)
            for shard in (last, ends):
                exact, limit = subject.models.exact(tiny, IDS[:3]), subject.tolerance.of(tiny)
                close_to_exact(shard.logits(y, range(3)), exact, limit, f"logits of an end, tied {tied}")
            expect(np.array_equal(ends.embed(step), first.embed(step)), "both input parts to say the same", "not")
            for shard in (middle, last):
                _refused(PlanError, "embed without the input part", shard.embed, step)
            for shard in (first, middle):
                _refused(PlanError, "logits without the output part", shard.logits, y, [0])


# ---------------------------------------------------------------- wrong input


def check_wrong_input(subject: Subject) -> None:
    """Each is refused by the documented error, and the shard goes on as if it had not been asked."""
    step, more = step_of(0, IDS[:4], kv=[opened(0, 8)]), step_of(0, IDS[4:6], 4)
    with subject.part(TINY, replace(PART, layers=(Layers(0, 1), Layers(1, 2)))) as shard:
        x = shard.embed(step)
        y = shard.run(Layers(1, 2), shard.run(Layers(0, 1), x, step), step)
        _check_tokens(shard)
        _check_activations(shard, x[:2], more)
        for layers in (Layers(0, 3), Layers(2, 3), Layers(-1, 1), Layers(0, 2)):
            _refused(PlanError, f"layers {layers} of ranges [0, 1) and [1, 2)", shard.run, layers, x[:2], more)
        for rows in ([4], [0, -1], [99]):
            _refused(FrameError, f"logits of rows {rows} of 4", shard.logits, y, rows)
        z = shard.embed(more)
        for layers in (Layers(0, 1), Layers(1, 2)):
            z = shard.run(layers, z, more)
        rows_after = shard.logits(z, [0, 1])
    exact = subject.models.exact(TINY, IDS[:6])[4:]
    close_to_exact(rows_after, exact, subject.tolerance.of(TINY), "logits after refusals", "a refusal changed K or V")


def _check_tokens(shard: Shard) -> None:
    for wrong in (-1, TINY.vocab_size, 1 << 40):
        _refused(FrameError, f"token id {wrong} of {TINY.vocab_size}", shard.embed, step_of(0, [1, wrong], 4))
    for tokens in ((), (1,), (1, 2, 3)):
        step = Step((Chunk(0, 4, 2),), tokens=tokens)
        _refused(FrameError, f"{len(tokens)} token ids for 2 rows", shard.embed, step)


def _check_activations(shard: Shard, x: FloatArray, step: Step) -> None:
    wrong: Sequence[tuple[str, object]] = (
        ("too few rows", x[:1]),
        ("too many rows", np.concatenate([x, x])),
        ("a wrong width", x[:, :-1]),
        ("one dimension", x[0]),
        ("float64", x.astype(np.float64)),
        ("float16", x.astype(np.float16)),
    )
    for what, activation in wrong:
        _refused(FrameError, f"an activation of {what}", shard.run, Layers(0, 1), activation, step)
    for what, activation in wrong[2:]:
        _refused(FrameError, f"logits of an activation of {what}", shard.logits, activation, [0])


def _refused(kind: type[PrimaError], what: str, call: Callable[..., object], *arguments: object) -> None:
    expect_refusal(kind, what, lambda: call(*arguments))


def check_unknown_device(subject: Subject) -> None:
    model = subject.models.open(TINY)
    wrong = f"{subject.device.id}99"
    _refused(PrimaError, f"device {wrong!r}", subject.backend.load, model.spec, wrong, PART, model.store())


# ---------------------------------------------------------------- memory and the end


def check_memory(subject: Subject) -> Figures:
    """More KV than the device has memory is refused when it is loaded, with the number of layers that would fit."""
    kv_tokens = 1 << 44
    try:
        with subject.part(TINY, replace(PART, kv_tokens=kv_tokens)):
            pass
    except DeviceMemoryError as error:
        says_so = "fit" in error.message and not re.search(r"[1-9] of the layers", error.message)
        expect(says_so, "the error to say that no layer would fit with so much KV", error.message, _COUNT)
        return {"says": error.message}
    except PrimaError as error:
        raise Wrong("DeviceMemoryError for 2^44 positions", f"{type(error).__name__}: {error}") from error
    if not subject.device.shares_host:
        raise Wrong("DeviceMemoryError for room for 2^44 positions", "a shard", _COUNT)
    raise NotOffered("room for KV is taken as it fills, from the host's memory")


_COUNT = "let arch.fits.check_fits count in load: weights and KV"


def check_close(subject: Subject) -> None:
    """A closed shard refuses everything, and closing it again does nothing. Another shard lives on."""
    with subject.part(TINY, PART) as shard, subject.part(TINY, PART) as other:
        step = step_of(0, IDS[:3], kv=[opened(0, 4)])
        x = shard.embed(step)
        other.run(ALL, x, step)
        shard.run(ALL, x, step)
        shard.close()
        shard.close()
        _refused(PlanError, "embed after close", shard.embed, step)
        _refused(PlanError, "run after close", shard.run, ALL, x, step_of(0, IDS[3:4], 3))
        _refused(PlanError, "logits after close", shard.logits, x, [0])
        more = joined(step_of(0, IDS[3:4], 3), step_of(1, IDS[:1], kv=[opened(1, 2)]))
        rows = other.logits(other.run(ALL, other.embed(more), more), [0])
    exact = subject.models.exact(TINY, IDS[:4])[3:]
    close_to_exact(rows, exact, subject.tolerance.of(TINY), "logits of another shard after a close")
