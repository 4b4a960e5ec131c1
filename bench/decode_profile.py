"""Where the time of a decoded token goes on a CPU: native operation by operation, and what Python takes of it.

    python bench/decode_profile.py [MODEL] [--threads 2] [--prompt 16] [--gen 64]

One node computes in this process, in the ring that `prima serve` has. Python's share is what is left of the time from
token to token: the interpreter in the backend, engine, sampler and driver, and the hops between their threads.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from prima_core.commands.generate import events
from prima_core.commands.setup import serving_head
from prima_core.config import SETTINGS
from prima_core.engine.request import GREEDY, Piece, Request
from prima_core.errors import PrimaError
from prima_core.node.head import Head
from prima_core.plugins import Registry
from prima_numpy import _kernels


@dataclass(slots=True)
class Spent:
    """Seconds in native calls, and their number, by operation."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def watch(self, owner: type, name: str) -> None:
        native = getattr(owner, name)

        def timed(*arguments: object) -> object:
            start = time.perf_counter()
            try:
                return native(*arguments)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                self.calls[name] = self.calls.get(name, 0) + 1

        setattr(owner, name, timed)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the built-in one")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--gen", type=int, default=64)
    options = parser.parse_args()
    if options.threads < 0 or options.prompt < 1 or options.gen < 2:
        parser.error("--threads is from 0 on, --prompt from 1, --gen from 2")
    settings = {name: setting.default for name, setting in SETTINGS.items()} | {
        "threads": options.threads, "backend": "numpy", "context": options.prompt + options.gen,
    }  # fmt: skip
    spent = Spent()
    for name in operations():
        spent.watch(_kernels.Engine, name)
    try:
        with closing(Registry.load(os.environ)) as registry, serving_head(options.model, settings, registry) as head:
            times = [decode(head, options.prompt, options.gen, spent.clear) for _ in range(2)]  # the first warms up
    except PrimaError as error:
        sys.exit(f"{error.message}\n  hint: {error.hint}" if error.hint else error.message)
    show(spent, times[-1], options.gen - 1)


def operations() -> list[str]:
    return [name for name, value in vars(_kernels.Engine).items() if callable(value) and not name.startswith("_")]


def decode(head: Head, n_prompt: int, n_gen: int, on_first: Callable[[], None]) -> float:
    """Seconds from the first token to the last; `on_first` is called at the first."""
    prompt = tuple(index % min(256, head.tokenizer.vocab_size) for index in range(n_prompt))
    start = 0.0
    for event in events(head, Request(prompt, n_gen, GREEDY, ignore_eos=True, reuse_prefix=False)):
        if isinstance(event, Piece) and not start:
            on_first()
            start = time.perf_counter()
        elif isinstance(event, Piece):
            stop = time.perf_counter()
    return stop - start


def show(spent: Spent, total: float, n_tokens: int) -> None:
    print(f"{'':20}{'ms a token':>12}{'share':>8}{'calls':>8}{'us a call':>12}")
    for name, seconds in sorted(spent.seconds.items(), key=lambda item: -item[1]):
        calls = spent.calls[name]
        print(
            f"{name:20}{seconds / n_tokens * 1e3:12.3f}{seconds / total:8.1%}{calls / n_tokens:8.1f}"
            f"{seconds / calls * 1e6:12.1f}"
        )
    rest = total - sum(spent.seconds.values())
    print(f"{'Python':20}{rest / n_tokens * 1e3:12.3f}{rest / total:8.1%}")
    print(f"{'token':20}{total / n_tokens * 1e3:12.3f}")


if __name__ == "__main__":
    main()
