"""bench/paper.py: the paper's homes and models as problems."""

from __future__ import annotations

from collections.abc import Sequence

from bench.paper_facts import SHAPES, Shape, integer, value
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem

_BITS = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
HOME = ("D1", "D2", "D3", "D4")
EVERYONE = (*HOME, "D5", "D6")
_HEADS = ("D3", "D2", "D1", "D5", "D6", "D4")
"""Where `prima serve` would be started, the best first: the paper's small models take llama.cpp's time on D3."""


_DECODE_SHARES = {
    **dict.fromkeys(("D1", "D2", "D3"), "decode share"),
    **dict.fromkeys(("D4", "D5"), "decode share of ARM"),
    "D6": "decode share of D6",
}


def paper_problem(model: str, names: Sequence[str] = HOME, *, rounds: int = 0, streaming: bool = True) -> Problem:
    head = next(name for name in _HEADS if name in names)
    wifi = LinkFacts(latency_s=value("link latency"), bytes_s=value("link rate"))
    nodes = tuple(_node(name) for name in names)
    return Problem(
        model_facts(SHAPES[model]), nodes, head, integer("context"), (wifi,), rounds=rounds, streaming=streaming
    )


# ---------------------------------------------------------------- devices


def _node(name: str) -> NodeFacts:
    ram = integer(f"{name} RAM")
    rate = value(f"{name} memory bandwidth") * value(_DECODE_SHARES[name])
    prefill = value(f"{name} CPU prefill") if name in ("D2", "D3") else value("prefill without a fan")
    cpu = DeviceFacts("cpu", ram, decode_bytes_s=rate, prefill_bytes_s=prefill)
    return NodeFacts(name, ram, (*_accelerators(name, ram, rate), cpu), value(f"{name} disk"))


def _accelerators(name: str, ram: int, cpu_rate: float) -> tuple[DeviceFacts, ...]:
    if name == "D1":  # of the same memory, and as fast where one token is computed
        prefill = value("D1 Metal prefill")
        return (DeviceFacts("metal", ram, decode_bytes_s=cpu_rate, prefill_bytes_s=prefill),)
    if name not in ("D2", "D3"):
        return ()
    return (
        DeviceFacts(
            "cuda",
            integer(f"{name} VRAM"),
            shares_host=False,
            decode_bytes_s=value(f"{name} GPU bandwidth") * value("decode share"),
            prefill_bytes_s=value(f"{name} GPU prefill"),
            copies=True,
        ),
    )


# ---------------------------------------------------------------- models


def model_facts(shape: Shape) -> ModelFacts:
    tensors = tuple(_matrices(shape, layer) for layer in range(shape.n_layers))
    norms = 2 * shape.d_model * 4
    ends = shape.d_model * shape.n_vocab
    return ModelFacts(
        name=shape.name,
        layer_bytes=tuple(sum(sizes) + norms for sizes in tensors),
        input_bytes=_bytes("Q4_K", ends),
        output_bytes=_bytes("Q6_K", ends) + shape.d_model * 4,
        kv_bytes_per_token_layer=2 * 2 * shape.d_kv,
        context_length=integer("context"),
        largest_tensor_bytes=max(max(sizes) for sizes in tensors),
        input_row_bytes=_bytes("Q4_K", shape.d_model),
        activation_bytes=4 * shape.d_model,
        logits_bytes=4 * shape.n_vocab,
        tensor_bytes=tensors,
    )


def _matrices(shape: Shape, layer: int) -> tuple[int, ...]:
    """Q, K, V, output, gate, up and down; with the types of llama.cpp's mixes."""
    attention, narrow, wide = shape.d_model**2, shape.d_model * shape.d_kv, shape.d_model * shape.d_ff
    value_type, down_type = _types_of(shape, layer)
    q4 = (attention, narrow, attention, wide, wide)
    return (*(_bytes("Q4_K", n) for n in q4), _bytes(value_type, narrow), _bytes(down_type, wide))


def _types_of(shape: Shape, layer: int) -> tuple[str, str]:
    """Of V and down, which are finer in some layers (`llama_tensor_get_type` of llama.cpp)."""
    eighth = shape.n_layers // 8
    if shape.mix == "Q4_K_M":
        often = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        return ("Q6_K", "Q6_K") if often else ("Q4_K", "Q4_K")
    is_70b = shape.n_layers == 80 and shape.d_kv < shape.d_model
    return "Q5_K" if layer < 4 or is_70b else "Q4_K", "Q5_K" if layer < eighth else "Q4_K"


def _bytes(type_name: str, n_weights: int) -> int:
    return int(n_weights * _BITS[type_name] / 8)
