"""How a model marks what it thinks before it answers: the tags that it was trained on, found in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What stands before and after the reasoning. `ids`: the tags' own tokens, where the vocabulary has any."""

    opens: str
    closes: str
    ids: frozenset[int] = frozenset()

    def are_open_after(self, prompt: str) -> bool:
        """Whether a prompt ends inside of a reasoning part, because its template wrote the opening tag itself."""
        return prompt.rstrip().endswith(self.opens)


# DeepSeek-R1, Qwen3, QwQ, GLM, SmolLM3 and most others; Magistral; Seed-OSS; Command A and R7B.
_KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


def find_reasoning_tags(added: Mapping[str, int], templates: Iterable[str]) -> ReasoningTags | None:
    """The tags of a reasoning model; None for any other, whose texts may then spell tags as they like.

    A model reasons if both tags are among the tokens that were `added` to its vocabulary, or if one of its chat
    templates names the closing one (to cut old reasoning out of a conversation) or the opening one (to begin with it).
    """
    sources = list(templates)
    for opens, closes in _KNOWN:
        if opens in added and closes in added:
            return ReasoningTags(opens, closes, frozenset({added[opens], added[closes]}))
    for opens, closes in _KNOWN:
        if any(closes in source or opens in source for source in sources):
            return ReasoningTags(opens, closes, frozenset(added[tag] for tag in (opens, closes) if tag in added))
    return None
