"""The tables of the PRIMA.CPP paper (arXiv 2504.08791) beside what is foretold of its homes. Nothing is measured here.

    python -m bench.paper [--json] [--quick]
    python -m bench.paper --sources

Homes and models are made of published figures; --sources prints each with where it is from, or that it is assumed.
--quick leaves out what takes longer: all sets of the six nodes, and the random clusters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from bench.paper_facts import (
    BEST_SUBSET,
    COMPUTE_PROPORTIONAL,
    FACTS,
    MEMORY_PROPORTIONAL,
    SHAPES,
    SYSTEMS,
    TPOT_MS,
    TTFT_MS,
    Published,
)
from bench.paper_problems import EVERYONE, HOME, paper_problem
from bench.paper_results import (
    LARGE,
    SOLVERS,
    Foretold,
    Rounds,
    Subset,
    against_published,
    baselines,
    by_solver,
    by_streaming,
    dllama_s,
    llama_cpp_s,
    no_halda_s,
    published_rounds,
    subsets,
    worth_from,
)
from bench.solvers import large_problem, small_problem

FAR = 1.25
"""Where more lies between what is foretold and what was measured, docs/halda.md says why."""
_STEPS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_BEST = 5

Results = dict[str, Any]
"""By section and model; what `--json` prints."""


def results(quick: bool) -> Results:
    few: list[tuple[str, ...]] = [BEST_SUBSET, *((*BEST_SUBSET, name) for name in ("D1", "D4", "D6")), HOME, EVERYONE]
    random = (
        () if quick else (*(small_problem(seed) for seed in range(60)), *(large_problem(n, 80, 0.8) for n in (4, 8)))
    )
    return {
        "solvers": {model: by_solver(model) for model in SHAPES},
        "other systems": {
            model: {"llama.cpp": llama_cpp_s(model), "dllama": dllama_s(model), "no Halda": no_halda_s(model)}
            for model in SHAPES
        },
        "published rounds": {model: published_rounds(paper_problem(model)) for model in SHAPES},
        "random": against_published(random),
        "streaming": {model: by_streaming(model) for model in LARGE},
        "baselines": baselines(),
        "subsets": subsets("70B", few if quick else ()),
        "worth from": {name: worth_from("70B", BEST_SUBSET, name, _STEPS) for name in ("D1", "D4", "D6")},
    }


# ---------------------------------------------------------------- printed


def lines(found: Results) -> Iterator[str]:
    yield from _solver_lines(found["solvers"])
    yield from _other_lines(found["other systems"])
    yield from _round_lines(found["published rounds"])
    yield from _never_slower_lines(found["solvers"], found["random"])
    yield from _streaming_lines(found["streaming"])
    yield from _baseline_lines(found["baselines"])
    yield from _subset_lines(found["subsets"], found["worth from"])


def _solver_lines(plans: dict[str, dict[str, Foretold | None]]) -> Iterator[str]:
    yield f"ms per token (to the first one) on D1 to D4, foretold; published: prima.cpp; * over {FAR - 1:.0%} apart"
    yield _row("model", (*SOLVERS, "published"), 16)
    for model, by_name in plans.items():
        published = f"{TPOT_MS[model][-1]} ({TTFT_MS[model]})"
        yield _row(model, [*(_times(plan, model) for plan in by_name.values()), published], 16)
    yield ""
    yield "halda's plans: visits, layers by node, GB read for each token"
    for model, by_name in plans.items():
        yield f"{model:6}{_told(by_name['halda'])}"
    yield ""


def _times(plan: Foretold | None, model: str) -> str:
    if plan is None:
        return "no plan"
    return f"{_ms(plan.token_s)}{_mark(plan.token_s, TPOT_MS[model][-1])} ({_ms(plan.prompt_s)})"


def _told(plan: Foretold | None) -> str:
    if plan is None:
        return "no plan"
    layers = ", ".join(f"{name} {n}" for name, n in plan.used.items())
    read = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in plan.read.items())
    return f"{plan.n_visits} visits: {layers}; reads {read or 'nothing'}"


def _other_lines(others: dict[str, dict[str, float | None]]) -> Iterator[str]:
    yield "ms per token of others: published / foretold by a simple model of what they do, where there is one"
    yield _row("model", SYSTEMS[:5], 22)
    for model, modelled in others.items():
        own = (modelled["llama.cpp"], "", modelled["dllama"], modelled["no Halda"], "")
        cells = [_beside(published, time_s) for published, time_s in zip(TPOT_MS[model][:5], own, strict=True)]
        yield _row(model, cells, 22)
    yield ""


def _beside(published: Published, time_s: float | str | None) -> str:
    if time_s == "":
        return f"{published or '-'}"
    own = "OOM" if not isinstance(time_s, float) else f"{_ms(time_s)}{_mark(time_s, published)}"
    return f"{published or '-'} / {own}"


def _round_lines(rounds: dict[str, Rounds]) -> Iterator[str]:
    yield "the published program: the rounds k it chooses, ms per token as it reckons, and its best for k above 1"
    for model, one in rounds.items():
        chosen = f"k = {one.chosen}: {_ms(one.time_s)}" if one.chosen else "no answer"
        yield f"{model:6}{chosen}; more rounds: {_ms(one.more_rounds_s) if one.more_rounds_s else 'no answer'}"
    yield ""


def _never_slower_lines(plans: dict[str, dict[str, Foretold | None]], random: Sequence[float]) -> Iterator[str]:
    pairs = [(own, by_name["halda-ilp"]) for by_name in plans.values() if (own := by_name["halda"])]
    worst = max(own.token_s / published.token_s for own, published in pairs if published)
    yield f"halda's time in times of the published plan's: at most {worst:.3f} on these models"
    if random:
        yield f"and {max(random):.3f} for {len(random)} random clusters (mean {sum(random) / len(random):.3f})"
    yield ""


def _streaming_lines(plans: dict[str, dict[str, Foretold | None]]) -> Iterator[str]:
    yield "what streaming and rounds give on D1 to D4, ms per token"
    yield _row("model", list(next(iter(plans.values()))), 24)
    for model, by_name in plans.items():
        yield _row(model, [_ms(plan.token_s) if plan else "does not fit" for plan in by_name.values()], 24)
    yield ""


def _baseline_lines(ratios: dict[str, dict[str, float]]) -> Iterator[str]:
    yield "70B, splits in proportion to memory (even) and to computing (compute), in times of halda"
    yield f"  published, in times of Halda: {MEMORY_PROPORTIONAL} and {COMPUTE_PROPORTIONAL}"
    for way, by_name in ratios.items():
        yield f"  {way}: {by_name['even']:.2f} and {by_name['compute']:.2f}"
    yield ""


def _subset_lines(found: Sequence[Subset], worth: dict[str, float | None]) -> Iterator[str]:
    published = "+".join(BEST_SUBSET)
    yield f"70B on {len(found)} sets of nodes: the best {_BEST} plans, then {published}, published as fastest, and more"
    best = {"+".join(one.plan.used): one for one in found[::-1]}  # of those with the same plan the smallest set
    shown = sorted(best.values(), key=lambda one: one.plan.token_s)[:_BEST]
    yield from (_subset_line(one) for one in shown)
    yield "  ..."
    yield from (_subset_line(one) for one in found if set(BEST_SUBSET) <= set(one.names))
    for name, times in worth.items():
        said = f"{times:g} times the speed assumed" if times else "no speed that was tried"
        yield f"  {name} is given layers beside {published} from {said} on"


def _subset_line(one: Subset) -> str:
    idle = f"; left out: {', '.join(one.idle)}" if one.idle else ""
    return f"  {'+'.join(one.names):20} {_ms(one.plan.token_s):>6} ms{idle}"


def _row(first: str, cells: Sequence[object], width: int) -> str:
    return f"{first:6}" + "".join(f"{cell!s:>{width}}" for cell in cells)


def _ms(time_s: float) -> str:
    return f"{1e3 * time_s:.0f}"


def _mark(time_s: float, published: Published) -> str:
    if not isinstance(published, int | float):
        return ""
    return "*" if not 1 / FAR <= 1e3 * time_s / published <= FAR else ""


def source_lines() -> Iterator[str]:
    for name, fact in FACTS.items():
        yield f"{name:28} {fact.value:<14.6g} {fact.unit:18} {fact.source}"
    for key, shape in SHAPES.items():
        of_kv = f"{shape.n_layers} layers of {shape.d_model}, {shape.d_ff}, {shape.d_kv} for K and V"
        yield f"{key:28} {shape.name}: {of_kv}, {shape.n_vocab} tokens, {shape.mix}; {shape.source}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", action="store_true", help="print the figures that all starts from, and no more")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.sources:
        print("\n".join(source_lines()))
        return
    found = results(asked.quick)
    print(json.dumps(found, default=_plain) if asked.json else "\n".join(lines(found)))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is no figure")


if __name__ == "__main__":
    main()
