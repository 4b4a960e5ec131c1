"""From the nodes that are there to the plan that they follow. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prima_core.engine.scheduler import Room
from prima_core.errors import PlanError
from prima_core.interfaces import KvType
from prima_core.model.quant import kv_row_bytes
from prima_core.model.weights import Model, input_bytes, layer_bytes, output_bytes
from prima_core.node.driver import Member
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan
from prima_core.plan.problem import ModelFacts, NodeFacts, Problem

MAX_SEQUENCES = 64
DEFAULT_CONTEXT = 8192


def model_facts(
    model: Model, context: int | None, kv_type: KvType | None = None, plan: Plan | None = None
) -> ModelFacts:
    """The sizes of a model that planning needs, for the context and the KV type that are served.

    What the user did not ask for is as `plan` says. Raises ModelError where heads do not fit the KV type.
    """
    spec = model.spec
    kept = kv_type or (KvType.F16 if plan is None else plan.kv_type)
    again = input_bytes(model.file) if spec.tied_output else 0  # a tied output part adds only the norm
    return ModelFacts(
        name=spec.name,
        layer_bytes=tuple(layer_bytes(model.file, layer) for layer in range(spec.n_layers)),
        input_bytes=input_bytes(model.file),
        output_bytes=output_bytes(model.file) - again,
        kv_bytes_per_token_layer=2 * spec.n_kv_heads * kv_row_bytes(kept, spec.head_dim),
        context_length=min(_asked_context(context, plan), spec.context_length),
        kv_type=kept,
    )


def _asked_context(asked: int | None, plan: Plan | None) -> int:
    if plan is None:
        return asked or DEFAULT_CONTEXT
    context = asked or plan.context or DEFAULT_CONTEXT
    return min(context, plan.kv_tokens) if plan.kv_tokens else context  # no sequence can be longer than all the room


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
