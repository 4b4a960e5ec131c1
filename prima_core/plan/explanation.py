"""What `explain.py` found out about a plan. Pure data with a JSON round trip."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from prima_core.interfaces import Goal

Seconds = Annotated[float, Meta(ge=0)]
Change = Literal["memory", "cable", "disk", "without"]


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that computes nothing. `time_s`: the least that was found with at least one layer on it; None: no such
    plan was found, or none was looked for. `why`: in words; "": not known."""

    node: str
    time_s: Seconds | None = None
    why: str = ""


class WhatIf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`time_s`: what would be foretold if something were otherwise; None: there would be no plan. `is_estimate`: no
    plan was made for it: `time_s` is what the present one would take (None: it cannot be), and it may be less.

    "memory": `node` may use 1 GB more of its host's; "cable": its slow links are of 1 Gbit/s and 0.3 ms; "disk": its
    disk, and so that of all who share it, is twice as fast; "without": it is not there.
    """

    change: Change
    node: str
    time_s: Seconds | None
    is_estimate: bool = False


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All times are of what is to be least for `goal`, as `predict.goal_s`; `time_s`: that of the plan (None: it could
    not be foretold). `what_ifs`: empty where they were not asked for. `n_untried`: changes that promised less, and were
    not worked out. `guesses`: rates that were not known and what they were taken to be, in words."""

    goal: Goal = Goal.LATENCY
    time_s: Seconds | None = None
    left_out: tuple[LeftOut, ...] = ()
    what_ifs: tuple[WhatIf, ...] = ()
    n_untried: Annotated[int, Meta(ge=0)] = 0
    guesses: tuple[str, ...] = ()
