"""`prima plan --problem` with other options: what they change of the problem in the file, or why they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from click.core import ParameterSource

from prima_core.commands.setup import Settings
from prima_core.errors import ConfigError
from prima_core.interfaces import Goal, KvType
from prima_core.plan.check import MAX_KV_TOKENS
from prima_core.plan.problem import MAX_WIDTH, ModelFacts, Problem

_STATED = {
    "memory": "`memory_bytes` of its nodes",
    "nodes": "`nodes`",
    "backend": "`devices` of its nodes",
    "kernels": "`rates` of its nodes' devices",
}
"""What the file says, and no option."""
_VALUE_BYTES = {KvType.F32: 4.0, KvType.F16: 2.0, KvType.Q8_0: 34 / 32}


@dataclass(frozen=True, slots=True)
class Given:
    """Where the values of settings come from."""

    sources: Mapping[str, ParameterSource | None]

    def __contains__(self, name: str) -> bool:
        """Whether the user has said it, also in the environment."""
        return self.sources.get(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)

    def now(self, name: str) -> bool:
        """Whether the user has said it in this command."""
        return self.sources.get(name) is ParameterSource.COMMANDLINE


def check_asked(model: str | None, given: Given, path: str) -> None:
    """Raises ConfigError for what a problem file leaves no choice of."""
    if model is not None:
        raise ConfigError(f"the problem {path} is about a model of its own, not about {model}", hint="leave one out")
    for name, said in _STATED.items():
        if given.now(name):
            raise ConfigError(
                f"--{name} is not for a problem file: {said} in {path} say it", hint="change it there, or leave it out"
            )


def asked(problem: Problem, settings: Settings, given: Given) -> Problem:
    """The problem with the goal, the context, the KV type, the KV room and the rounds that the user asks for. Raises
    ConfigError for more than there can be."""
    model, goal = _model(problem.model, settings, given), problem.goal
    n_contexts = max(1, problem.kv_tokens // max(1, problem.model.context_length))
    if "parallel" in given:
        n_contexts = settings["parallel"]
    if "goal" in given:
        goal = Goal(settings["goal"])
    has_room = "context" not in given and "parallel" not in given
    kv_tokens = problem.kv_tokens if has_room else n_contexts * model.context_length
    width = _width(problem, goal, settings, given)
    if not has_room and kv_tokens > MAX_KV_TOKENS:
        said = f"{n_contexts} contexts of {model.context_length} tokens are asked for"
        raise ConfigError(said, hint=f"-c times --parallel is at most {MAX_KV_TOKENS}")
    if width > MAX_WIDTH:
        raise ConfigError(f"{width} sequences are asked for", hint=f"--parallel is at most {MAX_WIDTH} for throughput")
    return msgspec.structs.replace(
        problem,
        model=model,
        kv_tokens=kv_tokens,
        rounds=settings["rounds"] or problem.rounds,
        goal=goal,
        width=width,
        n_past=min(problem.n_past, model.context_length) if "context" in given else problem.n_past,
        n_prompt=min(problem.n_prompt, model.context_length) if "context" in given else problem.n_prompt,
    )


def _width(problem: Problem, goal: Goal, settings: Settings, given: Given) -> int:
    """Sequences for throughput; for another goal than the file's a token at a time."""
    if goal is Goal.THROUGHPUT and (goal is not problem.goal or "parallel" in given):
        return int(settings["parallel"])
    return problem.width if goal is problem.goal else 1


def _model(model: ModelFacts, settings: Settings, given: Given) -> ModelFacts:
    if "context" in given:
        model = msgspec.structs.replace(model, context_length=settings["context"])
    if "kv_type" not in given:
        return model
    kv_type = KvType(settings["kv_type"])
    n_bytes = round(model.kv_bytes_per_token_layer * _VALUE_BYTES[kv_type] / _VALUE_BYTES[model.kv_type])
    return msgspec.structs.replace(model, kv_type=kv_type, kv_bytes_per_token_layer=n_bytes)
