"""Small GGUF files byte by byte, valid or not, with a map of where each number stands: for tests of damaged files."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
T_F32, T_F16, T_TQ1_0, T_Q8_0, T_Q4_K = 0, 1, 34, 8, 12
BLOCKS = {T_F32: (1, 4), T_F16: (1, 2), T_Q8_0: (32, 34), T_Q4_K: (256, 144), T_TQ1_0: (256, 54)}


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata entry: `value` is a number, a text or its bytes, or a list of those, whose kind is `of`."""

    name: str
    kind: int
    value: object
    of: int = STRING


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape` in numpy order. `offset` None: behind the tensor before."""

    name: str
    shape: tuple[int, ...]
    type: int = T_F32
    offset: int | None = None

    @property
    def n_bytes(self) -> int:
        n_weights, n_bytes = BLOCKS.get(self.type, (1, 4))
        total = 1
        for dim in self.shape:
            total *= dim
        return total // n_weights * n_bytes


@dataclass(frozen=True, slots=True)
class Site:
    """A number in the header: where, how wide, and the field that an error about it should name."""

    offset: int
    form: str
    field: str


@dataclass(slots=True)
class Gguf:
    """Bytes under construction. `sites` are the numbers of the header, in order; `n_header` is the header's length."""

    data: bytearray = field(default_factory=bytearray)
    sites: list[Site] = field(default_factory=list)
    n_header: int = 0

    def number(self, form: str, value: float, field: str) -> None:
        self.sites.append(Site(len(self.data), form, field))
        self.data += struct.pack("<" + form, value)

    def text(self, value: str | bytes, field: str) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.number("Q", len(raw), field)
        self.data += raw

    def value(self, kind: int, value: object, field: str, of: int = STRING) -> None:
        if kind == STRING:
            assert isinstance(value, str | bytes)
            self.text(value, field)
        elif kind == ARRAY:
            assert isinstance(value, Sequence)
            self.number("I", of, field)
            self.number("Q", len(value), field)
            for item in value:
                self.value(of, item, field)
        else:
            assert isinstance(value, int | float)
            self.number(FORMATS[kind], value, field)


def build(
    keys: Iterable[Key] = (),
    tensors: Iterable[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> Gguf:
    """A file of these parts; `n_keys` and `n_tensors` make it lie about them. Weights are bytes 0, 1, 2, ..."""
    keys, tensors = list(keys), list(tensors)
    out = Gguf(bytearray(b"GGUF"))
    out.number("I", version, "version")
    out.number("Q", len(tensors) if n_tensors is None else n_tensors, "tensor_count")
    out.number("Q", len(keys) if n_keys is None else n_keys, "metadata_kv_count")
    for index, key in enumerate(keys):
        out.text(key.name, f"metadata key {index}")
        out.number("I", key.kind, key.name)
        out.value(key.kind, key.value, key.name, key.of)
    end = 0
    for index, tensor in enumerate(tensors):
        offset = -(-end // alignment) * alignment if tensor.offset is None else tensor.offset
        _entry(out, index, tensor, offset)
        end = max(end, offset + tensor.n_bytes)
    out.n_header = len(out.data)
    if tensors:
        out.data += bytes(-len(out.data) % alignment)
        out.data += bytes(i % 251 for i in range(end))
    return out


def _entry(out: Gguf, index: int, tensor: Tensor, offset: int) -> None:
    out.text(tensor.name, f"name of tensor {index}")
    out.number("I", len(tensor.shape), tensor.name)
    for dim in reversed(tensor.shape):
        out.number("Q", dim, tensor.name)
    out.number("I", tensor.type, tensor.name)
    out.number("Q", offset, tensor.name)


# ---------------------------------------------------------------- a model

D, D_FF, N_VOCAB, N_HEADS, N_KV_HEADS = 32, 256, 8, 4, 2


def model_keys(arch: str = "llama") -> list[Key]:
    """Metadata of a one-layer model with a vocabulary of eight."""
    return [
        Key("general.architecture", STRING, arch),
        Key("general.name", STRING, "small"),
        Key(f"{arch}.block_count", U32, 1),
        Key(f"{arch}.context_length", U32, 64),
        Key(f"{arch}.embedding_length", U32, D),
        Key(f"{arch}.feed_forward_length", U32, D_FF),
        Key(f"{arch}.attention.head_count", U32, N_HEADS),
        Key(f"{arch}.attention.head_count_kv", U32, N_KV_HEADS),
        Key(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        Key(f"{arch}.rope.freq_base", F32, 10000.0),
        Key("tokenizer.ggml.model", STRING, "gpt2"),
        Key("tokenizer.ggml.tokens", ARRAY, ["a", "b", "c", "ab", "", b"\xc3", "\u00e9", "<s>"]),
        Key("tokenizer.ggml.token_type", ARRAY, [1] * N_VOCAB, of=I32),
        Key("tokenizer.ggml.add_bos_token", BOOL, 1),
    ]


def model_tensors(arch: str = "llama") -> list[Tensor]:
    """The tensors of that model, of several types."""
    d_kv = D // N_HEADS * N_KV_HEADS
    biases = [("attn_q.bias", D), ("attn_k.bias", d_kv), ("attn_v.bias", d_kv)] if arch == "qwen2" else []
    return [
        Tensor("token_embd.weight", (N_VOCAB, D), T_Q8_0),
        Tensor("blk.0.attn_norm.weight", (D,)),
        Tensor("blk.0.attn_q.weight", (D, D), T_Q8_0),
        Tensor("blk.0.attn_k.weight", (d_kv, D), T_F16),
        Tensor("blk.0.attn_v.weight", (d_kv, D), T_F32),
        *(Tensor(f"blk.0.{name}", (size,)) for name, size in biases),
        Tensor("blk.0.attn_output.weight", (D, D), T_Q8_0),
        Tensor("blk.0.ffn_norm.weight", (D,)),
        Tensor("blk.0.ffn_gate.weight", (D_FF, D), T_Q8_0),
        Tensor("blk.0.ffn_up.weight", (D_FF, D), T_Q8_0),
        Tensor("blk.0.ffn_down.weight", (D, D_FF), T_Q4_K),
        Tensor("output_norm.weight", (D,)),
    ]


def small_model(arch: str = "llama", version: int = 3) -> Gguf:
    """A whole valid file of about 30 kB."""
    return build(model_keys(arch), model_tensors(arch), version=version)


def split_keys(index: int, n_parts: int, n_tensors: int) -> list[Key]:
    """What every part of a split model says of itself; `n_tensors` of all parts."""
    return [
        Key("split.no", U16, index),
        Key("split.count", U16, n_parts),
        Key("split.tensors.count", I32, n_tensors),
    ]


def split_model(n_parts: int, arch: str = "llama", version: int = 3) -> list[Gguf]:
    """That model in parts of as many tensors each."""
    tensors = model_tensors(arch)
    size = -(-len(tensors) // n_parts)
    return [
        build(
            [*(model_keys(arch) if index == 0 else []), *split_keys(index, n_parts, len(tensors))],
            tensors[index * size : (index + 1) * size],
            version=version,
        )
        for index in range(n_parts)
    ]


def with_key(keys: Sequence[Key], new: Key) -> list[Key]:
    """`keys` with one of them replaced, or with a further one."""
    return [*(key for key in keys if key.name != new.name), new]


def with_tensor(tensors: Sequence[Tensor], new: Tensor) -> list[Tensor]:
    """`tensors` with one of them replaced, or with a further one."""
    return [*(tensor for tensor in tensors if tensor.name != new.name), new]
