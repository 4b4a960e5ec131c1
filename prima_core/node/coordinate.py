"""From the nodes that are there to the plan that they follow. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prima_core.engine.scheduler import Room
from prima_core.errors import PlanError
from prima_core.model.weights import Model, input_bytes, layer_bytes, output_bytes
from prima_core.node.driver import Member
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan
from prima_core.plan.problem import ModelFacts, NodeFacts, Problem

MAX_SEQUENCES = 64
KV_VALUE_BYTES = 2  # every backend keeps K and V in f16


def model_facts(model: Model, context_length: int) -> ModelFacts:
    """The sizes of a model that planning needs."""
    spec = model.spec
    again = input_bytes(model.file) if spec.tied_output else 0  # a tied output part adds only the norm
    return ModelFacts(
        name=spec.name,
        layer_bytes=tuple(layer_bytes(model.file, layer) for layer in range(spec.n_layers)),
        input_bytes=input_bytes(model.file),
        output_bytes=output_bytes(model.file) - again,
        kv_bytes_per_token_layer=2 * spec.n_kv_heads * spec.head_dim * KV_VALUE_BYTES,
        context_length=context_length,
    )


@dataclass(frozen=True, slots=True)
class Planning:
    """How plans are made: by `solve`, or `fixed` from a file. `parallel`: full contexts that KV should hold."""

    model: ModelFacts
    head: str
    parallel: int
    solve: Callable[[Problem], Plan]
    fixed: Plan | None = None

    def __call__(self, members: tuple[Member, ...]) -> Plan:
        """The checked plan for these nodes, the head first. Raises PlanError when none fits.

        Where memory does not suffice for `parallel` contexts, fewer are tried, down to one.
        """
        contexts = self.parallel
        while True:
            try:
                return self._plan(self.problem(members, contexts))
            except PlanError:
                if contexts == 1:
                    raise
                contexts //= 2

    def problem(self, members: tuple[Member, ...], contexts: int) -> Problem:
        ordered = sorted(members, key=lambda member: member.name != self.head)
        nodes = tuple(NodeFacts(member.name, member.memory_bytes, member.devices) for member in ordered)
        return Problem(self.model, nodes, self.head, kv_tokens=self.model.context_length * contexts)

    def _plan(self, problem: Problem) -> Plan:
        plan = self.fixed if self.fixed is not None else self.solve(problem)
        return complete(plan, problem)


def room_of(plan: Plan, chunk_tokens: int) -> Room:
    return Room(plan.kv_tokens, chunk_tokens, MAX_SEQUENCES)
