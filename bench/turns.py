"""What prefix reuse saves: time to the first token of the second turn of a conversation, with it and without.

    python bench/turns.py [--model FILE] [--prompt 1024] [--gen 32] [--runs 3] [-t 2] [--nodes 1]

The second turn is the first one's prompt, its answer, and 32 tokens more. Every run has a prompt of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from contextlib import closing

from prima_core.commands.generate import Timings, events
from prima_core.commands.setup import serving_head
from prima_core.config import SETTINGS
from prima_core.engine.request import Finished, Piece, Request
from prima_core.node.head import Head
from prima_core.plugins import Registry

N_MORE = 32


def ask(head: Head, prompt: Sequence[int], n: int, reuse: bool) -> tuple[Timings, list[int], int]:
    """How long it took, the answer, and how many tokens of the prompt were there already."""
    timings, answer, n_cached = Timings(len(prompt)), list[int](), 0
    for event in events(head, Request(tuple(prompt), n, ignore_eos=True, reuse_prefix=reuse)):
        if isinstance(event, Piece):
            timings.token()
            answer.append(event.token)
        elif isinstance(event, Finished):
            n_cached = event.n_cached
    return timings, answer, n_cached


def turns(head: Head, run: int, n_prompt: int, n_gen: int) -> tuple[float, float]:
    """Seconds to the second turn's first token without reuse and with it."""
    n_ids = min(256, head.tokenizer.vocab_size)
    prompt = [(7 * index + run) % n_ids for index in range(n_prompt)]
    answer = ask(head, prompt, n_gen, reuse=False)[1]
    second = [*prompt, *answer, *((5 * index + run) % n_ids for index in range(N_MORE))]
    reused, said, n_cached = ask(head, second, 2, reuse=True)
    whole, said_again, _ = ask(head, second, 2, reuse=False)
    assert said == said_again
    print(f"run {run}: {len(second)} tokens, {n_cached} of them there: {whole.ttft_s:.3f} s, {reused.ttft_s:.3f} s")
    return whole.ttft_s, reused.ttft_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    settings = {name: setting.default for name, setting in SETTINGS.items()}
    settings |= {"threads": args.threads, "nodes": args.nodes, "context": args.prompt + args.gen + N_MORE + 2}
    with (
        closing(Registry.load(os.environ)) as registry,
        serving_head(args.model, {**settings, "wire": "f32"}, registry) as head,
    ):
        taken = [turns(head, run, args.prompt, args.gen) for run in range(args.runs + 1)][1:]  # the first warms up
    whole, reused = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"median: {whole:.3f} s without reuse, {reused:.3f} s with it: {whole / reused:.1f} times as fast")


if __name__ == "__main__":
    main()
