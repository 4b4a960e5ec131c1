"""Plans whose nodes stream weights that would well fit: so rings of tiny models do what large ones must."""

from __future__ import annotations

from collections.abc import Mapping

from prima_core.model.weights import Model
from prima_core.node.coordinate import model_facts
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.ring.gather import row_bytes

DEVICE = "numpy:cpu"
SLACK_BYTES = 16 * 4096  # of a layer's tensors: each is read from and to a page's border


def streaming_plan(
    model: Model, visits: list[tuple[str, int, int]], shares: Mapping[str, float], buffer: float = 1, rows: int = 0
) -> Plan:
    """Of each node in `shares` that part of its weights is streamed, through `buffer` times what its layers need; and
    `rows` of a prompt go together."""
    facts = model_facts(model, None)
    residency = []
    for name, share in shares.items():
        sizes = [
            facts.layer_bytes[layer] for node, start, stop in visits if node == name for layer in range(start, stop)
        ]
        ends = facts.input_bytes + facts.output_bytes if name == "head" else 0
        streamed = int(share * (sum(sizes) + ends))
        in_layer = -(-streamed // len(sizes)) + facts.largest_tensor_bytes if sizes else 0
        least = max(min(max(sizes, default=0), in_layer) + facts.largest_tensor_bytes, facts.output_bytes)
        residency.append(Residency(name, DEVICE, sum(sizes) + ends, 0, streamed, int(buffer * (least + SLACK_BYTES))))
    return Plan(
        len(facts.layer_bytes),
        "head",
        tuple(Visit(*visit) for visit in visits),
        tuple(residency),
        gather_bytes=rows * row_bytes(model.spec),
    )
