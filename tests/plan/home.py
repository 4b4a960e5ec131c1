"""Mismatched machines of a home as a problem, and plans for it."""

from __future__ import annotations

import msgspec

from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem

MB, GB = 10**6, 10**9
MODEL = ModelFacts(
    "eight layers", (200 * MB,) * 8, 100 * MB, 100 * MB, 1000, 4096,
    largest_tensor_bytes=20 * MB, tensor_bytes=((20 * MB,) * 10,) * 8, activation_bytes=16384, input_row_bytes=2000,
)  # fmt: skip
CABLE = LinkFacts(latency_s=0.0003, bytes_s=125e6)
WIFI = LinkFacts(latency_s=0.004, bytes_s=20e6)


def node(
    name: str, memory_mb: int, rate: float, disk_bytes_s: float = 1e9, gpu_mb: int = 0, disk: str = ""
) -> NodeFacts:
    cpu = DeviceFacts("numpy:cpu", memory_mb * MB, decode_bytes_s=rate, prefill_bytes_s=100 * rate)
    gpu = DeviceFacts("torch:cuda:0", gpu_mb * MB, False, decode_bytes_s=200e9, prefill_bytes_s=1e13)
    return NodeFacts(name, memory_mb * MB, (gpu, cpu) if gpu_mb else (cpu,), disk_bytes_s, disk)


DESK, LAPTOP, ATTIC = node("desk", 400, 15e9, gpu_mb=650), node("laptop", 650, 12e9), node("attic", 400, 9e9)
PHONE = node("phone", 450, 2e9)


def home(*nodes: NodeFacts) -> Problem:
    """The desk is the head; the laptop and the phone are on Wi-Fi."""
    on_wifi = [name for name in ("laptop", "phone") if name in {one.name for one in nodes}]
    wifi = [
        msgspec.structs.replace(WIFI, source=source, target=target)
        for name in on_wifi
        for source, target in ((name, ""), ("", name))
    ]
    return Problem(MODEL, nodes, "desk", 1000, (*wifi, CABLE))


def told(plan: Plan, problem: Problem) -> Plan:
    """Completed, with its forecast."""
    made = complete(plan, problem)
    return msgspec.structs.replace(made, forecast=predict(made, problem))


def on_desk(start: int, stop: int, on_gpu: int) -> Visit:
    """The first layers on its GPU."""
    cut = start + on_gpu
    parts = (Split("torch:cuda:0", start, cut), Split("numpy:cpu", cut, stop))
    return Visit("desk", start, stop, tuple(part for part in parts if len(part.layers)))


TWO_VISITS = Plan(
    8, "desk", (on_desk(0, 3, 2), Visit("laptop", 3, 5), on_desk(5, 6, 0), Visit("laptop", 6, 7), Visit("attic", 7, 8))
)
"""The desk streams, behind the others' work."""
