"""From the nodes that are there to the plan that they follow. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypedDict

from msgspec.structs import replace

from prima_core.engine.scheduler import Room
from prima_core.errors import PlanError
from prima_core.interfaces import Goal, KvType, Layers, Slice
from prima_core.memory.residency import holding
from prima_core.model.header import TensorInfo
from prima_core.model.quant import kv_row_bytes
from prima_core.model.weights import Model, bytes_by_type, end_tensors, layer_names
from prima_core.node.member import Member
from prima_core.plan.check import complete
from prima_core.plan.cures import with_cures
from prima_core.plan.explain import Solve, explain
from prima_core.plan.guess import vouched, with_guesses
from prima_core.plan.pipeline import chunk_tokens
from prima_core.plan.plan import Plan
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import (
    MAX_KINDS,
    MAX_TENSORS,
    PROMPT_TOKENS,
    LinkFacts,
    ModelFacts,
    Problem,
    TensorKind,
)
from prima_core.ring.gather import row_bytes

MAX_SEQUENCES = 64
DEFAULT_CONTEXT = 8192
UNKNOWN_LINK = LinkFacts(latency_s=0.003, bytes_s=4e7)
"""Wi-Fi at home, where no link could be measured: arXiv 2504.08791 states 3 to 7 ms and 320 to 610 Mbit/s."""
_MUCH = 0.9
_WORTH_LOADING = 0.9
"""What is foretold of a new plan, of what is foretold now of the one that is followed: for less nobody loads weights
anew, and loses what is kept of conversations."""


def model_facts(
    model: Model, context: int | None, kv_type: KvType | None = None, plan: Plan | None = None
) -> ModelFacts:
    """The sizes of a model that planning needs, for the context and the KV type that are served.

    What the user did not ask for is as `plan` says. Raises ModelError where heads do not fit the KV type.
    """
    spec = model.spec
    kept = kv_type or (KvType.F16 if plan is None else plan.kv_type)
    names = [layer_names(model.file, layer) for layer in range(spec.n_layers)]
    layers = [bytes_by_type(model.file, of_layer) for of_layer in names]
    ends = end_tensors(spec, Slice((), has_input=True, has_output=True))  # a tied output part adds only the norm
    input_types, output_types = bytes_by_type(model.file, ends[:1]), bytes_by_type(model.file, ends[1:])
    return ModelFacts(
        name=spec.name,
        layer_bytes=tuple(sum(types.values()) for types in layers),
        input_bytes=sum(input_types.values()),
        output_bytes=sum(output_types.values()),
        kv_bytes_per_token_layer=2 * spec.n_kv_heads * kv_row_bytes(kept, spec.head_dim),
        context_length=min(_asked_context(context, plan), spec.context_length),
        kv_type=kept,
        layer_types={name: tuple(types.get(name, 0) for types in layers) for name in sorted(set().union(*layers))},
        input_types=input_types,
        output_types=output_types,
        largest_tensor_bytes=max(_unit_bytes(model.file.tensors[name]) for of_layer in names for name in of_layer),
        **_tensors(model),
        input_row_bytes=0 if spec.tied_output else sum(input_types.values()) // spec.vocab_size,
        activation_bytes=4 * spec.d_model,
        row_bytes=row_bytes(spec),
        logits_bytes=4 * spec.vocab_size,
        expert_bytes=() if spec.experts is None else tuple(_expert_bytes(model, of_layer) for of_layer in names),
        n_experts=0 if spec.experts is None else spec.experts.count,
        n_experts_used=0 if spec.experts is None else spec.experts.n_used,
    )


class _Tensors(TypedDict, total=False):
    tensor_bytes: tuple[tuple[int, ...], ...]
    kinds: tuple[TensorKind, ...]
    layer_kinds: tuple[tuple[int, ...], ...]


def _tensors(model: Model) -> _Tensors:
    """What a store may stream of each layer as whole tensors, by name, and stacks; not known where these are unusually
    many."""
    infos, held = model.file.tensors, holding(model.file.tensors, (Layers(0, model.spec.n_layers),), ())
    dense = [sorted(names) for names in held.layers.values()]
    stacks = [sorted(held.experts.get(layer, ())) for layer in held.layers]
    if any(max(len(one), len(other)) > MAX_TENSORS for one, other in zip(dense, stacks, strict=True)):
        return {}
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    layers = tuple(
        tuple(kinds.setdefault((infos[name].type_name, infos[name].shape), len(kinds)) for name in (*one, *other))
        for one, other in zip(dense, stacks, strict=True)
    )
    found: _Tensors = {"tensor_bytes": tuple(tuple(infos[name].n_bytes for name in names) for names in dense)}
    if len(kinds) <= MAX_KINDS:
        sizes = {(info.type_name, info.shape): info.n_bytes for info in infos.values()}
        found["kinds"] = tuple(TensorKind(kind[0], sizes[kind]) for kind in kinds)
        found["layer_kinds"] = layers
    return found


def _unit_bytes(tensor: TensorInfo) -> int:
    """What of a tensor is read at once: of a stack of experts one expert's."""
    return tensor.n_bytes // tensor.shape[0] if _is_stack(tensor) else tensor.n_bytes


def _expert_bytes(model: Model, names: Iterable[str]) -> int:
    tensors = (model.file.tensors[name] for name in names)
    return sum(tensor.n_bytes for tensor in tensors if _is_stack(tensor))


def _is_stack(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 3


def _asked_context(asked: int | None, plan: Plan | None) -> int:
    if plan is None:
        return asked or DEFAULT_CONTEXT
    context = asked or plan.context or DEFAULT_CONTEXT
    return min(context, plan.kv_tokens) if plan.kv_tokens else context  # no sequence can be longer than all the room


@dataclass(frozen=True, slots=True)
class Planning:
    """How plans are made: by `solve`, or `fixed` from a file. `parallel`: full contexts that KV should hold.

    `rounds`, `goal`, `n_prompt` and `chunk`: as in a problem; a token looks back on a prompt of so many.
    """

    model: ModelFacts
    head: str
    parallel: int
    solve: Solve
    fixed: Plan | None = None
    rounds: int = 0
    goal: Goal = Goal.LATENCY
    n_prompt: int = PROMPT_TOKENS
    chunk: int = 0

    def __call__(self, members: tuple[Member, ...]) -> Plan:
        """The checked plan for these nodes, the head first, with its forecast where it has one. Raises PlanError, with
        what would help, when none fits.

        Where memory does not suffice for `parallel` contexts, fewer are tried, down to one. Only then weights are
        streamed, as every byte that K and V take from them is read for every token; or where that is foretold to be
        much better than what keeps all of them, on a slow node or behind a slow link.
        """
        contexts = self.parallel
        while contexts:
            with suppress(PlanError):
                kept = self._plan(members, contexts, streaming=False)
                return self._much_better(members, contexts, kept)
            contexts //= 2
        try:
            return self._plan(members, 1, streaming=True)
        except PlanError as error:
            if self.fixed is not None:
                raise
            raise with_cures(self.problem(members, 1, streaming=True), error) from error

    def problem(self, members: tuple[Member, ...], contexts: int, streaming: bool) -> Problem:
        """With guesses for rates that are not known."""
        return with_guesses(self._stated(members, contexts, streaming))[0]

    def _stated(self, members: tuple[Member, ...], contexts: int, streaming: bool) -> Problem:
        ordered = sorted(members, key=lambda member: member.name != self.head)
        nodes = tuple(member.facts for member in ordered)
        kv_tokens = self.model.context_length * contexts
        n_prompt = max(1, min(self.n_prompt, self.model.context_length))
        return Problem(
            self.model,
            nodes,
            self.head,
            kv_tokens,
            links_of(members),
            rounds=self.rounds,
            streaming=streaming,
            goal=self.goal,
            width=self.parallel if self.goal is Goal.THROUGHPUT else 1,
            n_past=n_prompt,
            n_prompt=n_prompt,
            chunk=self.chunk,
        )

    def solved(self, plan: Plan, members: tuple[Member, ...]) -> Problem:
        """What `plan` was made for."""
        streams = any(need.streamed_bytes for need in plan.residency)
        problem = self.problem(members, 1, streaming=streams)
        return replace(problem, kv_tokens=plan.kv_tokens)

    def guesses(self, members: tuple[Member, ...]) -> tuple[str, ...]:
        """Of rates that are not known, in words."""
        return with_guesses(self._stated(members, 1, streaming=True))[1]

    def explained(self, plan: Plan, members: tuple[Member, ...]) -> Plan:
        """With who was left out, and what was guessed."""
        known = explain(plan, self.solved(plan, members))
        return replace(plan, explanation=replace(known, guesses=self.guesses(members)))

    def better(self, plan: Plan, members: tuple[Member, ...]) -> Plan | None:
        """A plan that is foretold to be enough better than `plan`, which these nodes follow, by what is known of them
        now; None: there is none that is worth loading weights anew."""
        if self.fixed is not None or plan.forecast is None:
            return None
        with suppress(PlanError):
            now = foretold(plan, self.solved(plan, members)).forecast
            other = self(members)
            if now is not None and other.forecast is not None:
                is_better = goal_s(other.forecast, self.goal) < _WORTH_LOADING * goal_s(now, self.goal)
                return other if is_better and other.kv_tokens >= plan.kv_tokens else None
        return None

    def _much_better(self, members: tuple[Member, ...], contexts: int, kept: Plan) -> Plan:
        """The plan that streams, or the one at hand, which is for no other problem."""
        if kept.forecast is None or len(members) == 1 or self.fixed is not None:
            return kept
        with suppress(PlanError):
            other = self._plan(members, contexts, streaming=True)
            if other.forecast is not None:
                limit_s = _MUCH * goal_s(kept.forecast, self.goal)
                return other if goal_s(other.forecast, self.goal) < limit_s else kept
        return kept

    def _plan(self, members: tuple[Member, ...], contexts: int, streaming: bool) -> Plan:
        problem, guesses = with_guesses(self._stated(members, contexts, streaming))
        plan = self.fixed if self.fixed is not None else vouched(self.solve(problem), guesses)
        return foretold(complete(plan, problem), problem)


def links_of(members: Sequence[Member]) -> tuple[LinkFacts, ...]:
    """What is known of the ways between these nodes; of the others it is assumed that they are like the slowest."""
    names = [member.name for member in members]
    links = {  # of nodes that joined again the newest counts
        (link.source, link.target): link
        for link in (link for member in members for link in member.links)
        if link.source in names and link.target in names
    }
    if len(links) >= len(names) * (len(names) - 1):
        return tuple(links.values())
    worst_s = max((link.latency_s for link in links.values()), default=UNKNOWN_LINK.latency_s)
    worst_bytes_s = min((link.bytes_s for link in links.values()), default=UNKNOWN_LINK.bytes_s)
    return (*links.values(), LinkFacts(latency_s=worst_s, bytes_s=worst_bytes_s))


def foretold(plan: Plan, problem: Problem) -> Plan:
    """With its forecast, but where a rate is not known."""
    forecast = None
    with suppress(PlanError):
        forecast = predict(plan, problem)
    return replace(plan, forecast=forecast)


def room_of(
    plan: Plan, asked_chunk: int | None, longest_chunk: int, row_bytes: int, most_logits: int = MAX_SEQUENCES
) -> Room:
    """The engine's room, with chunks as asked for, else as `chunk_tokens` has them. `most_logits`: rows that a message
    can hold."""
    chunk = asked_chunk or chunk_tokens(plan, row_bytes)
    most = min(MAX_SEQUENCES, most_logits) if plan.output else MAX_SEQUENCES
    return Room(plan.kv_tokens, min(chunk, longest_chunk), max(1, most))
