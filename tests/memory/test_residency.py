from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from prima_core.interfaces import Layers
from prima_core.memory.residency import SMALLEST_BYTES, Holding, Streamed, holding, resized, spread
from prima_core.model.header import TensorInfo
from prima_core.model.quant import GGUFType

MB = 1_000_000
LAYERS_8B = [
    {"q": 9_437_184, "k": 2_359_296, "v": 3_440_640, "o": 9_437_184, "gate": 33_030_144, "up": 33_030_144, "down": down}
    for down in (48_168_960, 33_030_144) * 16
]
"""An 8B in Q4_K_M."""

sizes = st.dictionaries(st.text("abcdefg", min_size=1, max_size=2), st.integers(65_536, 50 * MB), max_size=7)
layers_of_any_sizes = st.lists(sizes, min_size=1, max_size=12)


def total(layers: Sequence[Mapping[str, int]]) -> int:
    return sum(sum(layer.values()) for layer in layers)


def bytes_of(layers: Sequence[Mapping[str, int]], chosen: Sequence[frozenset[str]]) -> list[int]:
    return [sum(layer[name] for name in names) for layer, names in zip(layers, chosen, strict=True)]


def test_of_an_8b_less_than_a_small_tensor_is_streamed_too_much_and_each_layer_streams_about_as_much() -> None:
    for percent in range(1, 100):
        wanted = total(LAYERS_8B) * percent // 100
        chosen = bytes_of(LAYERS_8B, spread(LAYERS_8B, wanted))
        assert 0 <= sum(chosen) - wanted < 9.5 * MB, percent
        shares = [done / total([layer]) for done, layer in zip(chosen, LAYERS_8B, strict=True)]
        assert max(shares) - min(shares) < 0.15, percent


@settings(derandomize=True, deadline=None)
@given(layers_of_any_sizes, st.floats(0, 1))
def test_of_any_layers_the_first_stream_their_share_and_less_than_one_more_tensor(
    layers: list[dict[str, int]], share: float
) -> None:
    wanted = int(total(layers) * share)
    chosen = spread(layers, wanted)
    assert chosen == spread(layers, wanted)
    seen = done = 0
    for layer, n_bytes in zip(layers, bytes_of(layers, chosen), strict=True):
        seen, done = seen + sum(layer.values()), done + n_bytes
        assert wanted * seen <= done * total(layers)
        assert n_bytes == 0 or done - max(layer.values()) < -(-wanted * seen // total(layers))
    assert done >= wanted


@settings(derandomize=True, deadline=None)
@given(layers_of_any_sizes, st.lists(st.floats(0, 1.2), min_size=2, max_size=6), st.integers(0, 5 * MB))
def test_resizing_only_takes_away_or_only_adds(layers: list[dict[str, int]], shares: list[float], table: int) -> None:
    held = Holding(dict(enumerate(layers)), blocks=(MB, MB, MB // 2), block_rows=64, table_bytes=table)
    now = Streamed()
    for wanted in (int(held.streamable_bytes * share) for share in shares):
        then = resized(held, now, wanted)
        assert held.streamed_bytes(then) >= min(wanted, held.streamable_bytes)
        grows = [then.layers[layer] >= now.layers.get(layer, frozenset()) for layer in held.layers]
        shrinks = [then.layers[layer] <= now.layers.get(layer, frozenset()) for layer in held.layers]
        assert all(grows) or all(shrinks)
        now = then


def test_the_table_of_embeddings_is_left_out_first_and_the_output_streamed_last() -> None:
    held = Holding({0: {"a": 10 * MB}, 1: {"b": 10 * MB}}, (MB, MB, MB), 64, "output.weight", table_bytes=5 * MB)
    none, names = frozenset[str](), (frozenset({"a"}), frozenset({"b"}))
    expected = {
        0: Streamed({0: none, 1: none}),
        1: Streamed({0: none, 1: none}, table=True),
        5 * MB: Streamed({0: none, 1: none}, table=True),
        5 * MB + 1: Streamed({0: names[0], 1: none}, table=True),
        25 * MB: Streamed({0: names[0], 1: names[1]}, table=True),
        25 * MB + 1: Streamed({0: names[0], 1: names[1]}, 1, table=True),
        27 * MB + 1: Streamed({0: names[0], 1: names[1]}, 3, table=True),
        99 * MB: Streamed({0: names[0], 1: names[1]}, 3, table=True),
    }
    assert {wanted: resized(held, Streamed(), wanted) for wanted in expected} == expected


# ---------------------------------------------------------------- what a node holds


def tensors(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    infos, offset = {}, 0
    for name, shape in shapes:
        n_bytes = 4
        for n in shape:
            n_bytes *= n
        infos[name] = TensorInfo(name, GGUFType.F32, "F32", shape, offset, n_bytes)
        offset += n_bytes
    return infos


TABLE = tensors(
    ("token_embd.weight", (1000, 128)),
    ("blk.0.attn_norm.weight", (20_000,)),
    ("blk.0.attn_q.weight", (128, 128)),
    ("blk.0.attn_k.weight", (127, 128)),
    ("blk.0.ffn_gate_inp.weight", (128, 128)),
    ("blk.1.attn_q.weight", (256, 128)),
    ("output_norm.weight", (128,)),
    ("output.weight", (1000, 128)),
)
ENDS = ("token_embd.weight", "output_norm.weight", "output.weight")


def test_norms_routers_and_small_tensors_always_stay() -> None:
    held = holding(TABLE, [Layers(1, 2), Layers(0, 1)], ())
    assert list(held.layers.items()) == [(1, {"blk.1.attn_q.weight": 131_072}), (0, {"blk.0.attn_q.weight": 65_536})]
    assert held.fixed_bytes == 80_000 + 127 * 128 * 4 + 65_536
    assert SMALLEST_BYTES == 65_536


def test_layers_of_others_and_ends_of_others_count_for_nothing() -> None:
    held = holding(TABLE, [Layers(1, 2)], ())
    assert (held.total_bytes, held.streamable_bytes) == (131_072, 131_072)


def test_the_output_is_cut_into_blocks_of_64_rows(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("prima_core.memory.residency.BLOCK_BYTES", 200 * 512)
    held = holding(TABLE, [], ENDS)
    assert (held.block_rows, held.output) == (192, "output.weight")
    assert held.blocks == (192 * 512,) * 5 + (40 * 512,)
    assert (held.table_bytes, held.fixed_bytes) == (512_000, 512)


def test_a_tied_table_is_the_output_where_that_is_computed_and_looked_up_elsewhere() -> None:
    assert holding(TABLE, [], ("token_embd.weight", "output_norm.weight")).output == "token_embd.weight"
    assert holding(TABLE, [], ("token_embd.weight", "output_norm.weight")).table_bytes == 0
    assert holding(TABLE, [], ("token_embd.weight",)).output == ""
    assert holding(TABLE, [], ("token_embd.weight",)).table_bytes == 512_000
