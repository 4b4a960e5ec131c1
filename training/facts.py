"""Questions and answers about prima: `facts.toml` in many sentence forms."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from training.phrases import Table, expand

# How a name is asked to be explained, a thing to be told, an action to be shown; how often each kind is drawn.
FRAMES: Mapping[str, Sequence[str]] = {
    "term": (
        "what{ is| are|'s} @", "what does @ mean", "what is {meant by|the meaning of} @", "define @",
        "explain @{| to me| briefly| in simple words| simply| in short| in a sentence|, please}", "@",
        "{can|could|would|will} you {please |}{explain|define|describe} @{| to me}", "what {exactly |}is @{| exactly| about| for| in short| in prima| here}",
        "tell me what @ {is|means|does}", "i do not {understand|know|get} @", "what do you mean {by|with} @",
        "{i keep reading|i read|i hear|you said|the docs mention|everybody talks about} @{,|.} what {is that|does that mean|is it|is this}",
        "@{,|:| -|?} what is {that|it|this}{| for| about| in prima| here}", "{give|i need|can you give} {me |}{a|the|a short} {definition|explanation} of @",
        "{do you know|can you tell me|i wonder|i want to know|i would like to know|please say|i am curious} what @ {is|means}",
        "in {prima|this project|your words|short|simple words|plain words}, what is @", "what {is there to know|should i know|can you tell me|can you say} about @",
        "how would you {define|explain|describe} @", "what{ is|'s} the {word|term|name|thing called} @", "what's {this|that} @{| thing| you talk about| people talk about}",
        "{tell me|say} {something |more |}about @", "the {word|term} @{,|:} what {does it mean|is it|stands behind it}", "who or what is @",
        "what should i {imagine|understand} under @", "describe @", "what is the {idea|point|purpose} of @", "meaning of @",
    ),
    "about": (
        "what{ is| are|'s} @", "tell me @", "tell me about @", "@", "{please |}give me @", "what about @", "and @", "what is @ {now|again|here|please}",
        "{do you know|can you tell me|could you tell me|can you say|i need|i want|i would like|i am looking for|i forgot|remind me of|let me know} @",
        "{question about|i have a question about|information on|info about|something about|quick question on} @", "i need to know @", "i would like to know @",
        "what would be @", "and what is @", "say something about @", "what can you {say|tell me} about @", "where do i find @", "how about @",
        "{can i ask|may i ask|let me ask} about @", "what was @{| again}", "i want to know {@|about @|more about @}",
    ),
    "do": (
        "how {do|can|could|would|should|must|may} i @", "how to @", "how {do|can|does|would} {you|one|we|somebody|people} @",
        "i {want|would like|need|wish|plan|am trying|have|love} to @", "i want to @{,|.} {how|what do i do|what do i type|how does that work|what command|can you help}",
        "{what|which} command {do i need|is there|should i use|do i use|will|would|lets me|can i use|helps me|do i run|do i type} to @", "what {do|must|should|shall|would} i {type|run|do|enter|use|write} to @",
        "is there {a|any} {way|command|option|possibility} to @", "{show|tell|teach} me how to @", "{help|assist} me to @", "{can|could|may} i @",
        "is it possible to @", "{what is|what's} the {way|command|best way|easiest way|right command|usual way} to @",
        "i'd like to @", "i do not know how to @", "please {help me|tell me how to|explain how to} @", "what if i want to @",
        "@", "@{,|:| -|?} how{| does that work| is that done| do i do that| to do that}", "how might {i|we} @", "what is needed to @", "does prima let me @",
        "{my plan is|i am about|the idea is|all i want is|next i want|now i want} to @", "steps to @", "{which|what} {steps|commands} are needed to @",
        "can prima @", "in order to @{,|} what do i {do|run|type}", "what does it take to @", "how is it possible to @", "could you tell me how {to|i can|one can} @",
    ),
    "say": ("@",),
    "ask": (
        "@", "@", "@", "@", "{can|could} you tell me{:|,|} @", "{do you know|tell me|i wonder|please tell me|say|i want to know|i would like to know}{,|:|} @",
        "my question {is|is this|}{:|,} @", "{a|one|another|quick} question{:|,} @", "i ask myself{:|,|} @",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and the pattern lists that lead to it, keyed by kind of frame."""

    answer: str
    patterns: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts with the phrases that their patterns may name."""

    facts: Sequence[Fact]
    phrases: Table

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question in plain lower case without its end mark, and its answer."""
        fact = rng.choice(self.facts)
        kinds = list(fact.patterns)
        weights = [len(fact.patterns[kind]) ** 0.5 for kind in kinds]
        kind = rng.choices(kinds, weights)[0]
        inside = expand(rng.choice(fact.patterns[kind]), rng, self.phrases)
        return expand(rng.choice(FRAMES[kind]), rng).replace("@", inside), fact.answer


def load_facts(path: Path, extra_phrases: Table | None = None) -> Facts:
    """Read a file in the form of `facts.toml`. Raises ValueError when a fact has no answer, no pattern or an unknown key."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return Facts([_fact(entry) for entry in table["fact"]], {**table["phrases"], **(extra_phrases or {})})


def _fact(entry: Mapping[str, str | list[str]]) -> Fact:
    patterns = {key: value for key, value in entry.items() if isinstance(value, list)}
    answer = entry.get("answer")
    if not isinstance(answer, str) or not patterns or set(patterns) - set(FRAMES):
        raise ValueError(f"a fact needs an answer and patterns of {sorted(FRAMES)}: {dict(entry)!r}")
    return Fact(answer, patterns)
