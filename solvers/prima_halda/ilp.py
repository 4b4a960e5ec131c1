"""The solver `halda-ilp`: the integer program of the PRIMA.CPP paper (arXiv 2504.08791), kept to compare with.

In each of k rounds node m computes w layers, n of them on its accelerator. To be least is k times the sum of
a w + b n + xi, where a and b are a layer's times, of its reading too where the node's memory does not hold its layers.
Which nodes these are (the sets) follows from the last solution, until it stays the same. Other than there a layer's
computing is its bytes by the measured rate, not operations by a peak rate; xi is the link. Which operating system a
node has is not known here: one whose accelerator shares its memory is taken for macOS with Metal, all else for Linux.

More than one round never wins: with l = k w all that is left of k are coarser steps, and more links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import msgspec
import numpy as np

from prima_core.errors import ConfigError, PlanError
from prima_core.plan.check import complete
from prima_core.plan.fill import split_streaming
from prima_core.plan.plan import Certificate, Plan, Split, Visit
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional
from prima_halda.cluster import Cluster, Member, Place, unknown_rate

SLOW_DISK_BYTES_S = 0.1e9
"""Who reads more slowly is never to be overloaded."""
_MOST_TURNS = 16
"""The sets can go round and round."""


class Kind(Enum):
    """The sets of the paper: overloaded (macOS with Metal, or Linux), or with all in memory. M1, macOS without Metal,
    cannot be told from Linux here."""

    M2 = "metal"
    M3 = "linux"
    M4 = "fits"


@dataclass(frozen=True, slots=True)
class Device:
    """A node as the program sees it. Times of a layer on the CPU and on the accelerator; `room` and `gpu_room` in
    layers with their KV; `read_s` of a layer; `link_s` of a visit."""

    member: Member
    cpu: Place
    gpu: Place | None
    cpu_s: float
    gpu_s: float
    room: float
    gpu_room: float
    read_s: float
    read_kv_s: float
    link_s: float

    @property
    def is_unified(self) -> bool:
        return self.gpu is not None and self.gpu.shares_host

    def kind(self, n_layers: float, n_gpu: float, forced: bool) -> Kind:
        if forced:
            return Kind.M4
        if self.is_unified:
            return Kind.M2 if n_layers > self.gpu_room else Kind.M4
        return Kind.M3 if n_layers - n_gpu > self.room else Kind.M4


@dataclass(frozen=True, slots=True)
class Answer:
    """`time_s` per token as the program has it, without what is the same for all; layers by device and round."""

    time_s: float
    n_rounds: int
    layers: tuple[int, ...]
    gpu_layers: tuple[int, ...]


def solve(problem: Problem) -> Plan:
    """Where rates are not known, or the program ends without an answer that can be, the plan is that of `even`, and its
    certificate says so. Raises ConfigError without scipy, PlanError when the model does not fit."""
    why = unknown_rate(problem)
    if not why:
        plan = _solved(Cluster.of(problem))
        if plan is not None:
            return plan
        why = "the program has no answer that can be"
    plan = proportional(problem, solver="halda-ilp")
    return msgspec.structs.replace(plan, certificate=Certificate(about=f"as `even`: {why}"))


def _solved(cluster: Cluster) -> Plan | None:
    """Who is left with one layer is dropped, as long as that leaves an answer."""
    devices, plan = devices_of(cluster), None
    while (answer := answered(devices, cluster.n_layers, cluster.problem.rounds)) is not None:
        plan = _possible(cluster, devices, answer) or plan
        useful = [
            device
            for device, n_layers in zip(devices, answer.layers, strict=True)
            if n_layers * answer.n_rounds > 1 or device.member.index == cluster.head
        ]
        if len(useful) == len(devices):
            break
        devices = useful
    return plan


def devices_of(cluster: Cluster) -> list[Device]:
    """The head first, then the others as given; no more than there are layers."""
    members = sorted(cluster.members, key=lambda member: member.index != cluster.head)
    return [_device(cluster, member) for member in members][: cluster.n_layers]


def _device(cluster: Cluster, member: Member) -> Device:
    sharing = [place for place in member.places if place.shares_host]
    cpu = member.streaming or (sharing[-1] if sharing else member.places[0])
    gpu = next((place for place in member.places if place is not cpu), None)
    each = sum(cluster.problem.model.layer_bytes) / cluster.n_layers
    with_kv = each + cluster.kv_bytes
    fixed = cluster.problem.fixed_bytes(member.name)
    host = min(cpu.memory_bytes, member.memory_bytes) if cpu.shares_host else cpu.memory_bytes
    shared = gpu is not None and gpu.shares_host
    links = [hops[member.index] for source, hops in enumerate(cluster.hop_s) if source != member.index]
    rate = member.disk_bytes_s
    return Device(
        member=member,
        cpu=cpu,
        gpu=gpu,
        cpu_s=cpu.ends_s[-1] / cluster.n_layers,
        gpu_s=gpu.ends_s[-1] / cluster.n_layers if gpu is not None else 0.0,
        room=max(0.0, host - fixed) / with_kv,
        gpu_room=max(0.0, gpu.memory_bytes - (fixed if shared else 0)) / with_kv if gpu is not None else 0.0,
        read_s=each / rate if rate else 0.0,
        read_kv_s=with_kv / rate if rate else 0.0,
        link_s=sum(links) / len(links) if links else 0.0,
    )


# ---------------------------------------------------------------- the loop


def answered(devices: Sequence[Device], n_layers: int, rounds: int = 0) -> Answer | None:
    """The published loop: sets from an answer, an answer for the sets, until they stay."""
    forced = {
        number
        for number, device in enumerate(devices)
        if device.member.streaming is None or device.member.disk_bytes_s < SLOW_DISK_BYTES_S
    }
    answer: Answer | None = None
    kinds = _first_kinds(devices, n_layers, forced)
    for _ in range(_MOST_TURNS):
        found = best_answer(devices, kinds, n_layers, rounds)
        if found is None:
            return answer
        answer = found
        if _has_free_gpu(devices, answer):
            overloaded = [number for number, kind in enumerate(kinds) if kind is not Kind.M4 and number not in forced]
            if overloaded:
                forced.add(max(overloaded, key=lambda number: devices[number].read_s))
        again = _kinds(devices, answer, forced)
        if again == kinds:
            break
        kinds = again
    return answer


def best_answer(devices: Sequence[Device], kinds: Sequence[Kind], n_layers: int, rounds: int = 0) -> Answer | None:
    """Of all numbers of rounds that divide the layers, up to half of them."""
    possible = [k for k in range(1, max(1, n_layers // 2) + 1) if n_layers % k == 0]
    asked = [k for k in possible if k == rounds] or possible
    answers = [answer for k in asked if (answer := program(devices, kinds, n_layers, k)) is not None]
    return min(answers, key=lambda answer: (answer.time_s, answer.n_rounds), default=None)


def _first_kinds(devices: Sequence[Device], n_layers: int, forced: set[int]) -> list[Kind]:
    """As if layers were shared out by memory."""
    rooms = [device.room + (0.0 if device.is_unified else device.gpu_room) for device in devices]
    shares = [n_layers * room / (sum(rooms) or 1.0) for room in rooms]
    return [
        device.kind(share, min(share, device.gpu_room), number in forced)
        for number, (device, share) in enumerate(zip(devices, shares, strict=True))
    ]


def _kinds(devices: Sequence[Device], answer: Answer, forced: set[int]) -> list[Kind]:
    k = answer.n_rounds
    return [
        device.kind(k * w, k * n, number in forced)
        for number, (device, w, n) in enumerate(zip(devices, answer.layers, answer.gpu_layers, strict=True))
    ]


def _has_free_gpu(devices: Sequence[Device], answer: Answer) -> bool:
    return any(
        device.gpu is not None and device.gpu_room >= answer.n_rounds * (n + 1)
        for device, n in zip(devices, answer.gpu_layers, strict=True)
    )


# ---------------------------------------------------------------- the program


def program(devices: Sequence[Device], kinds: Sequence[Kind], n_layers: int, k: int) -> Answer | None:
    """The integer program for k rounds, solved by HiGHS; None: it has no answer. Variables: all w, then all n."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ConfigError(
            "the solver halda-ilp needs scipy, which is not installed", hint='pip install "prima-llm[ilp]"'
        ) from error
    per_round, m = n_layers // k, len(devices)
    each = [_times(device, kind) for device, kind in zip(devices, kinds, strict=True)]
    times = np.array([a for a, _ in each] + [b for _, b in each])
    rows, least, most = [np.array([1.0] * m + [0.0] * m)], [float(per_round)], [float(per_round)]
    for number, (device, kind) in enumerate(zip(devices, kinds, strict=True)):
        rows.append(_row(m, number, 0.0 if device.is_unified else -1.0))  # what must be in the host's memory
        room = (device.gpu_room if device.is_unified else device.room) / k
        least.append(room if kind is not Kind.M4 else -np.inf)
        most.append(room if kind is Kind.M4 else np.inf)
        rows.append(_row(m, number, -1.0))  # no more on the accelerator than there are
        least.append(0.0)
        most.append(np.inf)
    on_gpu = [np.floor(device.gpu_room / k) if device.gpu is not None else 0.0 for device in devices]
    found = milp(
        times,
        constraints=LinearConstraint(np.array(rows), np.array(least), np.array(most)),
        integrality=np.ones(2 * m),
        bounds=Bounds(np.array([1.0] * m + [0.0] * m), np.array([float(per_round)] * m + on_gpu)),
    )
    if found.x is None:
        return None
    whole = [round(value) for value in found.x]
    time_s = k * (float(times @ np.array(whole)) + sum(device.link_s for device in devices))
    return Answer(time_s, k, tuple(whole[:m]), tuple(whole[m:]))


def _times(device: Device, kind: Kind) -> tuple[float, float]:
    """Of a layer, and what it takes longer (or less) on the accelerator."""
    gain_s = device.gpu_s - device.cpu_s if device.gpu is not None else 0.0
    if kind is Kind.M2:
        return device.cpu_s + device.read_s, gain_s
    if kind is Kind.M3:
        return device.cpu_s + device.read_kv_s, gain_s - (device.read_kv_s if device.gpu is not None else 0.0)
    return device.cpu_s, gain_s


def _row(m: int, number: int, of_gpu: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    row = np.zeros(2 * m)
    row[number], row[m + number] = 1.0, of_gpu
    return row


# ---------------------------------------------------------------- the plan


def _possible(cluster: Cluster, devices: Sequence[Device], answer: Answer) -> Plan | None:
    """The answer as a plan, or with the devices filled otherwise, as layers are not quite alike; None: it cannot be."""
    plan = _plan(cluster, devices, answer)
    bare = [_whole(visit) for visit in plan.visits]
    for is_refilled in (False, True):
        try:
            visits = split_streaming(cluster.problem, bare) if is_refilled else plan.visits
            made = msgspec.structs.replace(plan, visits=visits)
            complete(made, cluster.problem)
        except PlanError:
            continue
        return made
    return None


def _whole(visit: Visit) -> Visit:
    return msgspec.structs.replace(visit, split=())


def _plan(cluster: Cluster, devices: Sequence[Device], answer: Answer) -> Plan:
    parts: list[tuple[str, str]] = []
    for device, w, n in list(zip(devices, answer.layers, answer.gpu_layers, strict=True)) * answer.n_rounds:
        on_gpu = [(device.member.name, device.gpu.id)] * n if device.gpu is not None else []
        parts += on_gpu + [(device.member.name, device.cpu.id)] * (w - n)
    visits: list[Visit] = []
    start = 0
    for name, run in groupby(parts, key=lambda part: part[0]):
        splits: list[Split] = []
        for device_id, layers in groupby(part for _, part in run):
            stop = start + sum(1 for _ in layers)
            splits.append(Split(device_id, start, stop))
            start = stop
        is_single = len(cluster.problem.node(name).places) == 1
        visits.append(Visit(name, splits[0].start, start, () if is_single else tuple(splits)))
    about = f"the program's own time is {1e3 * answer.time_s:.1f} ms in {answer.n_rounds} rounds, without the output"
    certificate = Certificate(about=about)
    return Plan(cluster.n_layers, cluster.problem.head, tuple(visits), solver="halda-ilp", certificate=certificate)
