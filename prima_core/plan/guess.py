"""Rates that are not known, where others are: so that one measurement that failed does not cost a cluster its plan."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from prima_core.plan.plan import Plan
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem


def with_guesses(problem: Problem) -> tuple[Problem, tuple[str, ...]]:
    """The problem with a guess for each rate of computing that is not known, and the guesses in words: a device is
    taken to be as the slowest that is known of its kind, else as the slowest of all. Where none is known nothing is
    guessed. Disks are left alone: a node whose disk is not known keeps what fits."""
    decode = _known(problem, "decode_bytes_s")
    if not decode:
        return problem, ()
    said: list[str] = []
    nodes = tuple(_guessed(node, decode, said) for node in problem.nodes)
    guessed = msgspec.structs.replace(problem, nodes=nodes)
    prefill = _known(guessed, "prefill_bytes_s")
    if prefill:
        nodes = tuple(_guessed_prefill(node, prefill, said) for node in guessed.nodes)
        guessed = msgspec.structs.replace(guessed, nodes=nodes)
    return (guessed, tuple(said)) if said else (problem, ())


def vouched(plan: Plan, guesses: Sequence[str]) -> Plan:
    """With the guesses in the certificate of who solved for them."""
    if plan.certificate is None or not guesses:
        return plan
    about = "; ".join(filter(None, (plan.certificate.about, *guesses)))
    return msgspec.structs.replace(plan, certificate=msgspec.structs.replace(plan.certificate, about=about))


Known = list[tuple[str, DeviceFacts]]
"""Devices with the names of their nodes."""


def _known(problem: Problem, rate: str) -> Known:
    return [(node.name, place) for node in problem.nodes for place in node.places if getattr(place, rate)]


def _guessed(node: NodeFacts, known: Known, said: list[str]) -> NodeFacts:
    """All that is not known of a device is the other's, so that its rates go together."""

    def guess(place: DeviceFacts) -> DeviceFacts:
        if place.decode_bytes_s:
            return place
        like, other, which = _slowest(place, known)
        said.append(f"{_unmeasured(place, node, 'computes')} to be as {like}, {which}")
        rates = {name: getattr(other, name) for name in ("decode_bytes_s", "prefill_bytes_s", "rates")}
        return msgspec.structs.replace(place, **rates)

    return _with_places(node, tuple(map(guess, node.places)))


def _guessed_prefill(node: NodeFacts, known: Known, said: list[str]) -> NodeFacts:
    """As many times as fast with many tokens as the other."""

    def guess(place: DeviceFacts) -> DeviceFacts:
        if place.prefill_bytes_s:
            return place
        like, other, which = _slowest(place, known)
        said.append(f"{_unmeasured(place, node, 'is with many tokens')} to gain as {like}, {which}")
        times = other.prefill_bytes_s / other.decode_bytes_s
        return msgspec.structs.replace(place, prefill_bytes_s=times * place.decode_bytes_s)

    return _with_places(node, tuple(map(guess, node.places)))


def _with_places(node: NodeFacts, places: tuple[DeviceFacts, ...]) -> NodeFacts:
    return node if places == node.places else msgspec.structs.replace(node, devices=places)


def _slowest(place: DeviceFacts, known: Known) -> tuple[str, DeviceFacts, str]:
    """Which it is, and what it is chosen for, in words."""
    alike = [(name, other) for name, other in known if _kind(other) == _kind(place)]
    name, other = min(alike or known, key=lambda one: (one[1].decode_bytes_s, one[0]))
    return _what(other, name), other, "the slowest of its kind" if alike else "the slowest of all"


def _kind(place: DeviceFacts) -> str:
    """Without its number: all `torch:cuda`."""
    kind, _, number = place.id.rpartition(":")
    return kind if number.isdigit() else place.id


def _what(place: DeviceFacts, name: str) -> str:
    return f"{place.id or 'the memory'} on {name}"


def _unmeasured(place: DeviceFacts, node: NodeFacts, does: str) -> str:
    return f"how fast {_what(place, node.name)} {does} was not measured: it is taken"
