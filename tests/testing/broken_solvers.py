"""Solvers that each do one thing wrong, at the top of a module so that another process can ask them too."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import cast

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import Problem
from prima_even.solver import solve as even


def _changed(plan: Plan, *visits: Visit) -> Plan:
    return msgspec.structs.replace(plan, visits=visits)


def gap(problem: Problem) -> Plan:
    plan = even(problem)
    return _changed(plan, *plan.visits[1:]) if len(plan.visits) > 1 else plan


def overlap(problem: Problem) -> Plan:
    plan = even(problem)
    return _changed(plan, *plan.visits, plan.visits[-1])


def unknown_device(problem: Problem) -> Plan:
    plan = even(problem)
    [*others, last] = plan.visits
    split = tuple(msgspec.structs.replace(part, device="sun") for part in last.split)
    return _changed(plan, *others, msgspec.structs.replace(last, split=split))


def over_memory(problem: Problem) -> Plan:
    """All on the head."""
    n_layers = problem.model.n_layers
    return Plan(n_layers, problem.head, (Visit(problem.head, 0, n_layers),))


def streams_always(problem: Problem) -> Plan:
    """Also where it is not wanted."""
    plan = complete(even(problem), problem)
    needs = (
        msgspec.structs.replace(need, streamed_bytes=need.weight_bytes // 2, buffer_bytes=1 << 40)
        for need in plan.residency
    )
    return msgspec.structs.replace(plan, residency=tuple(needs))


def small_buffers(problem: Problem) -> Plan:
    plan = complete(even(problem), problem)
    needs = (msgspec.structs.replace(need, buffer_bytes=1) if need.buffer_bytes else need for need in plan.residency)
    return msgspec.structs.replace(plan, residency=tuple(needs))


def one_device(problem: Problem) -> Plan:
    """Counts the memory of all devices of a node, and then uses its first."""
    plan = even(problem)
    return _changed(plan, *(msgspec.structs.replace(visit, split=()) for visit in plan.visits))


def dice(problem: Problem) -> Plan:
    n_layers, names = problem.model.n_layers, [node.name for node in problem.nodes]
    even(problem)
    return Plan(n_layers, problem.head, (Visit(random.choice(names), 0, n_layers),), in_flight=random.randint(1, 9))


def mutates(problem: Problem) -> Plan:
    plan = even(problem)
    problem.model.layer_types.clear()
    return plan


def foreign_exception(problem: Problem) -> Plan:
    if len(problem.nodes) > 3:
        raise ZeroDivisionError("no such share")
    return even(problem)


def no_plan_at_all(problem: Problem) -> Plan:
    return cast("Plan", {"visits": []})


def hash_order(problem: Problem) -> Plan:
    """As `even`, and says so by the first of a set of strings: another one in another process."""
    plan = even(problem)
    return msgspec.structs.replace(plan, solver=min({f"even {n}" for n in range(64)}, key=hash))


def asks_the_network(problem: Problem) -> Plan:
    with socket.socket() as link:
        link.setblocking(False)
    return even(problem)


def writes_files(problem: Problem) -> Plan:
    Path(os.devnull).write_text("a log")
    return even(problem)


def odd_types(problem: Problem) -> Plan:
    plan = even(problem)
    return _changed(plan, *(msgspec.structs.replace(visit, start=float(visit.start)) for visit in plan.visits))


def gives_up(problem: Problem) -> Plan:
    raise PlanError("too hard")


def weak(problem: Problem) -> Plan:
    """Right, but it wants room to spare."""
    room = sum(node.room_bytes for node in problem.nodes) - problem.fixed_bytes(problem.head)
    return even(problem) if room > 1.2 * problem.layers_bytes(0, problem.model.n_layers) else gives_up(problem)


def many_rounds(problem: Problem) -> Plan:
    """Right, but slow: it pays for more links than it needs."""
    return even(msgspec.structs.replace(problem, rounds=8))
