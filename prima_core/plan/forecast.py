"""What `predict.py` says of a plan. Pure data with a JSON round trip."""

from __future__ import annotations

import msgspec


class NodeForecast(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a node, until each sequence has one more token: seconds of computing, of waiting for its disk, and of the
    links to it; bytes from disk. And what it holds."""

    node: str
    compute_s: float
    stall_s: float
    link_s: float
    read_bytes: int
    pinned_bytes: int
    buffer_bytes: int
    kv_bytes: int


class Forecast(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`token_s`: time per token of each of `width` sequences, as the visits were simulated; `bound_s`: the same by
    formulas for perfectly even visits and reading; `tokens_s`: tokens in a second, of all sequences. `prompt_s`: until
    the first token of a prompt of `n_prompt` tokens; None: rates of prefill are not known. `limit`: what most of the
    time goes to.
    """

    token_s: float
    bound_s: float
    prompt_s: float | None
    n_prompt: int
    width: int
    limit: str
    nodes: tuple[NodeForecast, ...]
    tokens_s: float = 0.0

    @property
    def shares_s(self) -> dict[str, float]:
        """What the time goes to, in words: together `token_s`, but where several steps are on their way at once."""
        return {
            "computing": sum(node.compute_s for node in self.nodes),
            "waiting for disks": sum(node.stall_s for node in self.nodes),
            "links": sum(node.link_s for node in self.nodes),
        }
