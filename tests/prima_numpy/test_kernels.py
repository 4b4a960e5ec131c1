"""The border of the native module: what it refuses, how it is chosen, and how its pool behaves."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import ConfigError
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy import _kernels
from prima_numpy.kernels import Kernels, KvCache, load_kernels
from prima_numpy.native_module import native_fault
from prima_numpy.threads import default_threads
from prima_numpy.variants import ALL_VARIANTS
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight

Float32s = NDArray[np.float32]
Calls = tuple[Callable[[], None], ...]


@pytest.fixture
def engine() -> _kernels.Engine:
    return _kernels.Engine(2, "auto")


def zeros(*shape: int) -> Float32s:
    return np.zeros(shape, np.float32)


def matrix(
    type: int = GGUFType.Q4_K, n_bytes: int = 2 * 144, rows: int = 2, cols: int = 256, bias: Float32s | None = None
) -> _kernels.Matrix:
    return _kernels.Matrix(_kernels.Engine(1, "auto"), type, np.zeros(n_bytes, np.uint8), rows, cols, bias)


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"n_bytes": 2 * 144 - 1}, "data"),
        ({"n_bytes": 3 * 144}, "data"),
        ({"n_bytes": 0}, "data"),
        ({"rows": 3}, "data"),
        ({"rows": -1}, "matrix"),
        ({"cols": 0}, "matrix"),
        ({"cols": 128}, "cols"),
        ({"cols": 512}, "data"),
        ({"rows": 1 << 62, "cols": 1 << 62}, "matrix"),
        ({"rows": 1 << 39, "cols": 1 << 40}, "data"),
        ({"type": 34}, "type 34"),
        ({"type": -1}, "type -1"),
        ({"type": GGUFType.Q8_0, "n_bytes": 2 * 8 * 34 + 1}, "data"),
        ({"type": GGUFType.Q6_K}, "data"),
        ({"type": GGUFType.F32, "n_bytes": 2 * 256 * 4 - 4}, "data"),
    ],
)
def test_a_matrix_of_wrong_sizes_is_refused(bad: dict[str, int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        matrix(type=bad.get("type", GGUFType.Q4_K), n_bytes=bad.get("n_bytes", 2 * 144), rows=bad.get("rows", 2),
               cols=bad.get("cols", 256))  # fmt: skip


@pytest.mark.parametrize("type", QUANTISED)
def test_a_row_of_part_of_a_block_is_refused(type: GGUFType) -> None:
    block = BLOCKS[type]
    with pytest.raises(ValueError, match=f"multiple of {block.n_weights}"):
        matrix(type, 2 * block.n_bytes, 2, block.n_weights + 16)


@pytest.mark.parametrize("x", [zeros(1, 255), zeros(1, 512), zeros(256), np.zeros((1, 256)), zeros(2, 512)[:, ::2]])
def test_wrong_activations_are_refused_by_every_product(engine: _kernels.Engine, x: Float32s) -> None:
    one, out = matrix(), zeros(len(x), 2)
    calls: Calls = (
        lambda: engine.linear((one,), x, (out,), None, 0),
        lambda: engine.added_linear(one, x, out.copy(), out),
        lambda: engine.gated_linear(one, one, False, x, None, 0, out),
    )
    for call in calls:
        with pytest.raises(ValueError, match="x"):
            call()


@pytest.mark.parametrize("bad", [zeros(1, 3), zeros(2, 2), zeros(2), np.zeros((1, 2)), zeros(1, 4)[:, ::2]])
def test_results_and_sums_of_other_shapes_are_refused_by_every_product(engine: _kernels.Engine, bad: Float32s) -> None:
    one, x, good = matrix(), zeros(1, 256), zeros(1, 2)
    calls: Calls = (
        lambda: engine.linear((one,), x, (bad,), None, 0),
        lambda: engine.added_linear(one, x, good, bad),
        lambda: engine.gated_linear(one, one, False, x, None, 0, bad),
    )
    for call in calls:
        with pytest.raises(ValueError, match="out"):
            call()
    with pytest.raises(ValueError, match="added"):
        engine.added_linear(one, x, bad, good)


def test_a_gain_of_another_length_is_refused(engine: _kernels.Engine) -> None:
    one, x, out = matrix(), zeros(1, 256), zeros(1, 2)
    with pytest.raises(ValueError, match="gain"):
        engine.linear((one,), x, (out,), zeros(255), 0)
    with pytest.raises(ValueError, match="gain"):
        engine.gated_linear(one, one, False, x, zeros(1, 256), 0, out)


def test_a_gate_and_its_up_must_have_as_many_rows(engine: _kernels.Engine) -> None:
    with pytest.raises(ValueError, match="rows"):
        engine.gated_linear(matrix(), matrix(n_bytes=144, rows=1), False, zeros(1, 256), None, 0, zeros(1, 2))


def test_every_matrix_needs_a_place_for_its_result(engine: _kernels.Engine) -> None:
    with pytest.raises(ValueError, match="outs"):
        engine.linear((matrix(),), zeros(1, 256), (), None, 0)
    for bad in ("no matrix", None):
        with pytest.raises(ValueError, match="matrices"):
            engine.linear((bad,), zeros(1, 256), (zeros(1, 2),), None, 0)  # type: ignore[arg-type]  # on purpose


def test_one_bad_result_among_good_ones_is_refused_before_anything_is_written(engine: _kernels.Engine) -> None:
    good = np.full((1, 2), 7, np.float32)
    with pytest.raises(ValueError, match="out"):
        engine.linear((matrix(), matrix()), zeros(1, 256), (good, zeros(1, 3)), None, 0)
    assert np.all(good == 7)


def test_a_matrix_keeps_its_arrays_alive() -> None:
    data, bias = np.full(2 * 4, 2, np.float32).view(np.uint8), np.array([1, 2], np.float32)
    alive = sys.getrefcount(data), sys.getrefcount(bias)
    held = _kernels.Matrix(_kernels.Engine(1, "auto"), GGUFType.F32, data, 2, 4, bias)
    assert (sys.getrefcount(data), sys.getrefcount(bias)) > alive
    del held
    assert (sys.getrefcount(data), sys.getrefcount(bias)) == alive


def test_weights_at_an_odd_address_are_refused_where_elements_are_wider(engine: _kernels.Engine) -> None:
    data = np.zeros(2 * 16 * 4 + 1, np.uint8)[1:]
    with pytest.raises(ValueError, match="aligned"):
        _kernels.Matrix(engine, GGUFType.F32, data, 2, 16, None)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        Kernels(1).linear(random_weight(GGUFType.Q8_0, 4, 32), random_rows(1, 32), bias=zeros(5))


def test_a_result_that_may_not_be_written_is_refused() -> None:
    out = zeros(1, 4)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        Kernels(1).linear(random_weight(GGUFType.Q8_0, 4, 32), random_rows(1, 32), out=out)


def attend(
    engine: _kernels.Engine,
    k: KvCache | None = None,
    v: KvCache | None = None,
    q: Float32s | None = None,
    start: int = 0,
    softcap: float = 0,
    window: int = 0,
) -> None:
    """With what is not given, this is right."""
    rows, cache = zeros(1, 2, 8) if q is None else q, zeros(2, 5, 8)
    keys, values = cache if k is None else k, cache if v is None else v
    engine.attention(rows, ((keys, values, start, len(rows)),), 1, softcap, window, zeros(*rows.shape))


def write(engine: _kernels.Engine, n: int = 1, heads: int = 2, cache: KvCache | None = None, start: int = 0) -> None:
    k, keys = zeros(n, heads, 8), zeros(2, 5, 8) if cache is None else cache
    engine.kv_write(k, k, ((keys, keys, start, n),))


BLOCKS_OF_32 = np.zeros((2, 5, 34), np.uint8)
Call = Callable[[_kernels.Engine], None]
CALLS: dict[str, Call] = {
    "gain": lambda e: e.rms_norm(zeros(2, 8), zeros(7), 1e-5, zeros(2, 8)),
    "out of rms_norm": lambda e: e.rms_norm(zeros(2, 8), zeros(8), 1e-5, zeros(2, 7)),
    "x of rms_norm": lambda e: e.rms_norm(zeros(16, 2).T, zeros(16), 1e-5, zeros(2, 16)),
    "up": lambda e: e.swiglu(zeros(2, 8), zeros(2, 9), zeros(2, 8)),
    "out of swiglu": lambda e: e.swiglu(zeros(2, 8), zeros(2, 8), zeros(3, 8)),
    "y": lambda e: e.add(zeros(2, 8), zeros(1, 8), zeros(2, 8)),
    "cos for wider heads": lambda e: e.rope(zeros(1, 2, 8), zeros(1, 5), zeros(1, 5), True),
    "cos for other rows": lambda e: e.rope(zeros(2, 2, 8), zeros(1, 4), zeros(1, 4), True),
    "sin": lambda e: e.rope(zeros(1, 2, 8), zeros(1, 4), zeros(1, 3), False),
    "q with other heads": lambda e: attend(e, q=zeros(1, 3, 8)),
    "q without heads": lambda e: attend(e, q=zeros(1, 0, 8)),
    "q with wider heads": lambda e: attend(e, q=zeros(1, 2, 9)),
    "v_cache": lambda e: attend(e, v=zeros(2, 4, 8)),
    "start past the end": lambda e: attend(e, q=zeros(2, 2, 8), start=4),
    "start below 0": lambda e: attend(e, start=-1),
    "start near 2^63": lambda e: attend(e, start=2**63 - 1),
    "no K/V heads": lambda e: attend(e, k=zeros(0, 5, 8), v=zeros(0, 5, 8)),
    "caches of two types": lambda e: attend(e, v=np.zeros((2, 5, 8), np.float16)),
    "blocks that do not fit the heads": lambda e: attend(e, BLOCKS_OF_32, BLOCKS_OF_32),
    "blocks of wider heads": lambda e: attend(e, BLOCKS_OF_32, BLOCKS_OF_32, q=zeros(1, 2, 64)),
    "softcap below 0": lambda e: attend(e, softcap=-1),
    "softcap that is no number": lambda e: attend(e, softcap=math.nan),
    "window below 0": lambda e: attend(e, window=-1),
    "a double cache": lambda e: write(e, cache=np.zeros((2, 5, 8))),  # type: ignore[arg-type]  # on purpose
    "k with other heads": lambda e: write(e, heads=3),
    "k past the end": lambda e: write(e, n=3, start=3),
    "k before the start": lambda e: write(e, start=-1),
    "k in a part of a cache": lambda e: write(e, cache=zeros(2, 10, 8)[:, ::2]),
    "v of other rows": lambda e: e.kv_write(zeros(1, 2, 8), zeros(2, 2, 8), ((zeros(2, 5, 8), zeros(2, 5, 8), 0, 1),)),
    "spans of fewer rows": lambda e: e.kv_write(zeros(1, 2, 8), zeros(1, 2, 8), ()),
    "spans of more rows": lambda e: e.kv_write(
        zeros(1, 2, 8), zeros(1, 2, 8), ((zeros(2, 5, 8), zeros(2, 5, 8), 0, 2),)
    ),
    "a span of -1 rows": lambda e: e.kv_write(
        zeros(1, 2, 8), zeros(1, 2, 8), ((zeros(2, 5, 8), zeros(2, 5, 8), 0, -1),)
    ),
    "a span without n": lambda e: e.attention(zeros(1, 2, 8), ((zeros(2, 5, 8),),), 1, 0, 0, zeros(1, 2, 8)),  # type: ignore[arg-type]  # on purpose
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_wrong_shapes_are_refused(engine: _kernels.Engine, call: Call) -> None:
    with pytest.raises(ValueError, match=r"\w+: "):
        call(engine)


def test_the_first_variant_is_what_auto_chooses() -> None:
    assert Kernels(1).variant == Kernels.variants()[0]
    assert Kernels.variants()[-1] == "portable"


@pytest.mark.parametrize("variant", Kernels.variants())
def test_the_variable_forces_a_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_CPU", variant)
    kernels = load_kernels(threads=1)
    assert kernels is not None
    assert kernels.variant == variant


def test_an_unknown_variant_is_an_error_that_lists_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_CPU", "sse9")
    with pytest.raises(ConfigError, match="there is no CPU variant 'sse9'") as caught:
        load_kernels(threads=1)
    assert all(name in caught.value.hint for name in ("PRIMA_CPU", "auto", *Kernels.variants()))
    with pytest.raises(ValueError, match="portable"):
        _kernels.Engine(1, "sse9")


@pytest.mark.parametrize("variant", [name for name in ALL_VARIANTS if name not in Kernels.variants()])
def test_a_variant_that_this_cpu_lacks_is_refused_by_name_with_what_to_do(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIMA_CPU", variant)
    with pytest.raises(ConfigError, match=f"'{variant}' needs instructions that this CPU") as caught:
        load_kernels(threads=1)
    assert "leave PRIMA_CPU unset" in caught.value.hint
    assert variant not in caught.value.hint.split(": ")[1].split(", ")


def test_every_variant_of_the_native_module_is_a_known_name() -> None:
    assert set(Kernels.variants()) <= set(ALL_VARIANTS)


def test_a_variant_that_the_system_does_not_grant_is_refused_with_the_others_to_choose_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(threads: int, variant: str) -> None:
        raise RuntimeError(f"the system does not let this process use CPU variant '{variant}'")

    monkeypatch.setattr(_kernels, "variants", lambda: ["amx", "avx2", "portable"])
    monkeypatch.setattr(_kernels, "Engine", refuse)
    with pytest.raises(ConfigError, match="does not let this process use CPU variant 'amx'") as caught:
        Kernels(1, "amx")
    assert caught.value.hint.endswith("one of: auto, avx2, portable")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_an_engine_needs_a_sane_number_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _kernels.Engine(threads, "auto")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to so much address space")
def test_threads_that_the_system_does_not_start_are_refused() -> None:
    script = (
        "import resource\n"
        "from prima_core.errors import ConfigError\n"
        "from prima_numpy.kernels import Kernels\n"
        "in_use = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 28), -1))  # some stacks more\n"
        "try:\n"
        "    Kernels(1000)\n"
        "except ConfigError as error:\n"
        "    print(error.message, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("threads: the system does not start 1000")
    assert "-t" in done.stdout


def test_threads_default_to_what_this_process_may_use() -> None:
    assert Kernels().threads == default_threads() >= 1
    assert Kernels(3).threads == 3


def test_a_missing_module_is_told_and_gives_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_fault() == ""
    monkeypatch.setitem(sys.modules, "prima_numpy._kernels", None)
    monkeypatch.delattr("prima_numpy._kernels")
    assert "native module" in native_fault()
    assert load_kernels() is None


def test_facts_for_the_doctor_are_there() -> None:
    facts = Kernels(2).describe()
    assert facts["threads"] == "2"
    assert Kernels.variants()[0] in facts["kernels"]
    assert "optimised" in facts["build"]


def test_callers_in_several_threads_get_their_own_results() -> None:
    kernels, weight = Kernels(3), random_weight(GGUFType.Q4_K, 600, 512)
    inputs = [random_rows(1 + i % 3, 512, seed=i) for i in range(40)]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(lambda x: kernels.linear(weight, x), inputs))
    for x, y in zip(inputs, together, strict=True):
        np.testing.assert_array_equal(y, kernels.linear(weight, x))


def test_pools_come_and_go() -> None:
    weight, x = random_weight(GGUFType.Q8_0, 600, 512), random_rows(1, 512)
    expected = Kernels(1).linear(weight, x)
    for threads in range(2, 30):
        np.testing.assert_array_equal(Kernels(threads).linear(weight, x), expected)


def test_reading_covers_every_line() -> None:
    data = np.zeros(3 << 20, np.uint8)
    data[::64] = 1
    assert Kernels(2).read(data) == len(data) // 64


def test_weights_may_be_read_only_views_of_a_map() -> None:
    weight = random_weight(GGUFType.Q8_0, 4, 64)
    assert not weight.data.flags.writeable
    inside = np.frombuffer(b"\0" * 3 + weight.data.tobytes(), np.uint8)[3:]
    x = random_rows(1, 64)
    moved = Weight("w", weight.type, weight.shape, inside)
    np.testing.assert_array_equal(Kernels(1).linear(moved, x), Kernels(1).linear(weight, x))


WORKS_AT_EXIT = """
import threading
from prima_core.model.quant import GGUFType
from prima_numpy.kernels import Kernels
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight
kernels, weight, x = Kernels(3), random_weight(GGUFType.Q4_K, 2048, 2048), random_rows(16, 2048)
has_started = threading.Event()
def work():
    while True:
        kernels.linear(weight, x)
        has_started.set()
threading.Thread(target=work, daemon=True).start()
has_started.wait()
"""


def test_an_interpreter_may_end_while_kernels_are_at_work() -> None:
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", WORKS_AT_EXIT], env=places, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("variant", Kernels.variants())
def test_variants_with_panels_of_bytes_say_how_fast_registers_are(variant: str) -> None:
    assert Kernels(2, variant).multiply(1 << 20) is (variant.startswith("avx"))


def test_a_negative_number_of_products_is_refused(engine: _kernels.Engine) -> None:
    with pytest.raises(ValueError, match="n_products"):
        engine.multiply(-1)
