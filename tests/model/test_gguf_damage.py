"""Whatever the bytes are: the file opens, or a ModelError names the field. Nothing else, and no great allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.model import header
from prima_core.model.gguf import GGUFFile, StringArray
from prima_core.model.header import MAX_TEXT_BYTES, parse_header
from tests.model.gguf_builder import (
    ARRAY,
    BOOL,
    FORMATS,
    I32,
    STRING,
    T_F16,
    T_Q4_K,
    U8,
    U32,
    U64,
    Gguf,
    Key,
    Site,
    Tensor,
    build,
    model_keys,
    model_tensors,
    small_model,
    split_model,
    with_tensor,
)

COUNTS = ("tensor_count", "metadata_kv_count")
WILD = (2**64 - 1, 2**63, 2**63 - 1, 2**32, 2**31)


def refusal(data: bytes | bytearray) -> ModelError:
    with pytest.raises(ModelError) as caught:
        parse_header(memoryview(bytes(data)))
    return caught.value


def test_a_file_cut_anywhere_in_its_header_names_the_cut_field() -> None:
    built = small_model()
    for cut in range(4, built.n_header):
        expected = [site.field for site in built.sites if site.offset <= cut][-1:]
        assert refusal(built.data[:cut]).field in (*expected, *COUNTS, "version"), f"cut at {cut}"


def test_a_file_cut_anywhere_in_its_weights_names_a_tensor() -> None:
    built = small_model()
    for cut in range(built.n_header, len(built.data), 97):
        assert refusal(built.data[:cut]).field in {tensor.name for tensor in model_tensors()}
    assert refusal(built.data[:-1]).field == "output_norm.weight"


@pytest.mark.parametrize("wild", WILD)
def test_a_wild_count_length_dimension_or_offset_names_its_field(wild: int) -> None:
    built = small_model()
    sites = [site for site in built.sites if site.form == "Q"]
    assert len(sites) == 70
    for site in sites:
        assert refusal(patched(built, site, wild)).field == site.field


def test_a_count_one_too_high_names_some_field() -> None:
    for site in small_model().sites[1:3]:
        (count,) = struct.unpack_from("<Q", small_model().data, site.offset)
        assert refusal(patched(small_model(), site, count + 1)).field


@pytest.mark.parametrize("wild", [13, 99, 2**32 - 1])
def test_a_metadata_type_that_does_not_exist_names_its_key(wild: int) -> None:
    built = small_model()
    (site, *_) = [site for site in built.sites if site.field == "tokenizer.ggml.tokens" and site.form == "I"]
    assert refusal(patched(built, site, wild)).field == "tokenizer.ggml.tokens"


@pytest.mark.parametrize("n_dims", [0, 5, 2**32 - 1])
def test_an_impossible_number_of_dimensions_names_the_tensor(n_dims: int) -> None:
    built = small_model()
    (site, *_) = [site for site in built.sites if site.field == "token_embd.weight" and site.form == "I"]
    error = refusal(patched(built, site, n_dims))
    assert error.field == "token_embd.weight"
    assert str(n_dims) in error.message


def test_dimensions_whose_product_wraps_around_are_refused() -> None:
    assert refusal(lying_shape(Tensor("t", (2**32, 2**32 + 1)))).field == "t"


def test_a_dimension_of_zero_is_refused() -> None:
    assert "impossible dimensions" in refusal(lying_shape(Tensor("t", (4, 0)))).message


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    error = refusal(lying_shape(Tensor("t", (4, 255), T_Q4_K)))
    assert error.field == "t"
    assert "255" in error.message


@pytest.mark.parametrize("offset", [1, 16, 33, 2**63 + 1])
def test_a_misaligned_tensor_is_refused(offset: int) -> None:
    built = build(tensors=[Tensor("a", (8,)), Tensor("b", (8,))])
    site = [site for site in built.sites if site.field == "b"][-1]
    error = refusal(patched(built, site, offset))
    assert error.field == "b"
    assert "not a multiple of 32" in error.message


@pytest.mark.parametrize("offset", [0, 32])
def test_overlapping_tensors_are_refused(offset: int) -> None:
    error = refusal(build(tensors=[Tensor("a", (16,)), Tensor("b", (16,), offset=offset)]).data)
    assert error.field in ("a", "b")
    assert "overlaps" in error.message


def test_touching_tensors_are_no_overlap() -> None:
    parse_header(memoryview(build(tensors=[Tensor("a", (16,)), Tensor("b", (16,), offset=64)]).data))


def test_an_overlap_is_found_whatever_the_order_of_the_table() -> None:
    tensors = [Tensor("c", (8,), offset=128), Tensor("a", (8,), offset=0), Tensor("b", (24,), T_F16, offset=96)]
    assert refusal(build(tensors=tensors).data).field == "c"


def test_a_key_or_tensor_that_stands_twice_is_refused() -> None:
    key, tensor = Key("k", U8, 1), Tensor("t", (8,))
    assert refusal(build([key, key]).data).field == "k"
    assert refusal(build(tensors=[tensor, Tensor("u", (8,)), tensor]).data).field == "t"


def test_a_nameless_key_or_tensor_is_refused() -> None:
    assert refusal(build([Key("", U64, 1)]).data).field == "metadata key 0"
    assert refusal(build(tensors=[Tensor("", (64,))]).data).field == "name of tensor 0"


@pytest.mark.parametrize("depth", [1, 2, 1000])
def test_nested_arrays_are_refused_at_any_depth(depth: int) -> None:
    built = Gguf(bytearray(build([Key("k", ARRAY, [])], n_keys=1).data[:-12]))
    built.data += struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U8, 0)
    assert refusal(built.data).message == "k: is an array of arrays, which prima does not read"


@pytest.mark.parametrize(("kind", "value", "of"), [(BOOL, 2, 0), (ARRAY, [0, 1, 255], BOOL)])
def test_truth_values_other_than_0_and_1_are_refused(kind: int, value: object, of: int) -> None:
    assert refusal(build([Key("flag", kind, value, of)]).data).field == "flag"


@pytest.mark.parametrize("key", [b"\xff\xfe", b"\xed\xa0\x80"])
def test_a_key_that_is_no_utf8_is_refused(key: bytes) -> None:
    built = build([Key("xx" if len(key) == 2 else "xxx", U8, 1)])
    error = refusal(built.data.replace(b"x" * len(key), key))
    assert error.field == "metadata key 0"
    assert "UTF-8" in error.message


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    error = refusal(build([Key("\x1b[31mred", BOOL, 7)]).data)
    assert "\x1b" not in str(error)
    assert "red" in error.field


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, 1 << 22, 2**32 - 1])
def test_a_senseless_alignment_is_refused(alignment: int) -> None:
    assert refusal(build([Key("general.alignment", U32, alignment)]).data).field == "general.alignment"


@pytest.mark.parametrize(("kind", "value"), [(STRING, "32"), (BOOL, 1), (ARRAY, [32]), (I32, -32)])
def test_an_alignment_of_another_type_is_refused(kind: int, value: object) -> None:
    assert refusal(build([Key("general.alignment", kind, value, of=U32)]).data).field == "general.alignment"


def test_a_text_longer_than_any_template_is_not_read() -> None:
    data = build([Key("k", STRING, b"x" * (MAX_TEXT_BYTES + 1))]).data
    tracemalloc.start()
    try:
        view = memoryview(data)
        with pytest.raises(ModelError, match="at most"):
            parse_header(view)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("bound", "limit", "field"),
    [
        ("MAX_KEYS", 3, "metadata_kv_count"),
        ("MAX_TENSORS", 3, "tensor_count"),
        ("MAX_STRINGS", 7, "tokenizer.ggml.tokens"),
        ("MAX_KEY_BYTES", 4, "metadata key 0"),
        ("MAX_NAME_BYTES", 4, "name of tensor 0"),
        ("MAX_HEADER_BYTES", 1000, "blk.0.attn_v.weight"),
    ],
)
def test_a_header_beyond_every_real_one_is_refused_at_the_bound(
    monkeypatch: pytest.MonkeyPatch, bound: str, limit: int, field: str
) -> None:
    parse_header(memoryview(small_model().data))
    monkeypatch.setattr(header, bound, limit)
    assert refusal(small_model().data).field == field


def patched(built: Gguf, site: Site, value: int) -> bytes:
    data = bytearray(built.data)
    struct.pack_into("<" + site.form, data, site.offset, value)
    return bytes(data)


def lying_shape(tensor: Tensor) -> bytes:
    """A file whose only tensor says it has that shape, with 4 kB behind it."""
    honest = build(tensors=[Tensor(tensor.name, tuple(1 for _ in tensor.shape), tensor.type)])
    dims = [site for site in honest.sites if site.field == tensor.name and site.form == "Q"][:-1]
    for site, dim in zip(dims, reversed(tensor.shape), strict=True):
        struct.pack_into("<Q", honest.data, site.offset, dim)
    return bytes(honest.data) + bytes(4096)


# ---------------------------------------------------------------- seeded mutations


def use(path: Path) -> None:
    """What a node does with a file before it computes."""
    with GGUFFile.open(path) as file:
        for value in file.metadata.values():
            if isinstance(value, StringArray):
                list(value)
    with open_model(path) as model:
        store = model.store()
        for weights in (store.shared(), *(store.acquire(layer) for layer in range(model.spec.n_layers))):
            for weight in weights.values():
                weight.data.sum()


def mutated(built: Gguf, random: random.Random) -> bytes:
    """One to three damages, mostly to the header."""
    data = bytearray(built.data)
    for _ in range(random.choice((1, 1, 2, 3))):
        _MUTATIONS[random.randrange(len(_MUTATIONS))](data, built, random)
    return bytes(data)


def _place(data: bytearray, built: Gguf, random: random.Random) -> int:
    return random.randrange(max(1, min(len(data), built.n_header) if random.random() < 0.9 else len(data)))


def _flip_bit(data: bytearray, built: Gguf, random: random.Random) -> None:
    if data:
        data[_place(data, built, random)] ^= 1 << random.randrange(8)


def _truncate(data: bytearray, built: Gguf, random: random.Random) -> None:
    del data[_place(data, built, random) :]


def _delete(data: bytearray, built: Gguf, random: random.Random) -> None:
    begin = _place(data, built, random)
    del data[begin : begin + random.randrange(1, 64)]


def _splice(data: bytearray, built: Gguf, random: random.Random) -> None:
    begin, end = _place(data, built, random), _place(data, built, random)
    piece = data[begin : begin + random.randrange(1, 200)]
    data[end : end + random.choice((0, len(piece)))] = piece


def _wild_number(data: bytearray, built: Gguf, random: random.Random) -> None:
    site = random.choice(built.sites)
    size = struct.calcsize("<" + site.form)
    if site.offset + size <= len(data):
        bits = random.choice((*WILD, 0, 1, 2, 3, random.getrandbits(64), random.getrandbits(16)))
        data[site.offset : site.offset + size] = bits.to_bytes(8, "little")[:size]


def _garble(data: bytearray, built: Gguf, random: random.Random) -> None:
    begin = _place(data, built, random)
    garbage = random.randbytes(random.randrange(1, 16))
    data[begin : begin + len(garbage)] = garbage


_MUTATIONS = (_flip_bit, _flip_bit, _wild_number, _wild_number, _truncate, _delete, _splice, _garble)
BASES = {
    "llama": small_model("llama"),
    "version 2": small_model("llama", version=2),
    "qwen2": small_model("qwen2"),
    "vocabulary": build(model_keys()),
    "every kind": build(
        [Key(f"k{kind}", kind, 1) for kind in FORMATS] + [Key(f"a{kind}", ARRAY, [1, 0], of=kind) for kind in FORMATS],
        with_tensor(model_tensors(), Tensor("d", (1, 2, 3, 4))),
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_a_thousand_mutations_end_in_a_model_or_a_named_error(base: str, tmp_path: Path) -> None:
    built, path, outcomes, worst = BASES[base], tmp_path / "m.gguf", Counter[str](), 0
    tracemalloc.start()
    try:
        for seed in range(1000):
            path.write_bytes(mutated(built, random.Random(seed)))
            tracemalloc.reset_peak()
            outcome = _outcome(path)
            assert outcome, f"seed {seed}: an error that names nothing"
            outcomes[outcome] += 1
            worst = max(worst, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert worst < 100_000_000
    assert len(outcomes) > 15, outcomes  # the damages do reach many different checks
    if base in ("llama", "qwen2", "version 2"):
        assert outcomes["opened"] > 50


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_mutations_of_a_part_end_in_a_model_or_a_named_error(damaged: int, version: int, tmp_path: Path) -> None:
    built, outcomes = split_model(3, "qwen2", version), Counter[str]()
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for path, part in zip(paths, built, strict=True):
        path.write_bytes(part.data)
    for seed in range(200):
        paths[damaged].write_bytes(mutated(built[damaged], random.Random(seed)))
        outcome = _outcome(paths[seed % 3])
        assert outcome, f"seed {seed}: an error that names nothing"
        outcomes[outcome] += 1
    assert {"opened", "split.no"} <= outcomes.keys()
    assert len(outcomes) > 10, outcomes


def _outcome(path: Path) -> str:
    try:
        use(path)
    except ModelError as error:
        str(error).encode()  # it can be printed
        return error.field
    return "opened"
