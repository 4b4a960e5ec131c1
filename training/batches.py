"""Which chats make up which batch: a function of the step alone, so that a run can stop, go on and be looked into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random

from training.corpus import SHARES, Chat, Corpus
from training.vocabulary import ChatEncoder

SEED = 20250804
VOCABULARY_SEED = SEED + 1
VOCABULARY_CHATS = 8000
N_STEPS = 4400
BATCH_TOKENS = 2048
TOKENS_PER_TURN = 40  # a little below the mean of 42, so that most chats fill their row


@dataclass(frozen=True, slots=True)
class Phase:
    """From which step on, how long the rows are (tokens: share of the batches), how often each kind is asked."""

    first_step: int
    rows: Mapping[int, float]
    kinds: Mapping[str, float]


# Every row is one chat from its beginning. Short rows train first questions, long ones the whole context.
# Facts are known after about a thousand steps; sums and spelling take longer, so the second phase asks more of them.
PHASES = (
    Phase(0, {128: 0.50, 256: 0.34, 512: 0.08, 1024: 0.05, 2048: 0.03}, SHARES),
    Phase(
        1100,
        {64: 0.30, 128: 0.36, 256: 0.20, 512: 0.07, 1024: 0.04, 2048: 0.03},
        {"facts": 0.30, "outside": 0.08, "sums": 0.28, "spelling": 0.28, "smalltalk": 0.05, "stories": 0.01},
    ),
)

Row = tuple[list[int], list[bool]]


def vocabulary_chats(corpus: Corpus) -> Iterator[Chat]:
    """The chats that the vocabulary is learned from."""
    return islice(corpus.chats(VOCABULARY_SEED, 8), VOCABULARY_CHATS)


def row_tokens(step: int) -> int:
    """Tokens in each row of batch `step`."""
    return _drawn_row_tokens(_random(step), _phase(step))


def chats(corpus: Corpus, step: int) -> Iterator[Chat]:
    """Endless chats for batch `step`; those too short for its rows are passed over."""
    rng, phase = _random(step), _phase(step)
    n_tokens = _drawn_row_tokens(rng, phase)
    return corpus.chats(rng.getrandbits(64), n_tokens // TOKENS_PER_TURN + 2, phase.kinds)


def rows(corpus: Corpus, encoder: ChatEncoder, step: int) -> list[Row]:
    """Batch `step`: ids and whether each belongs to an answer, rows of equal length."""
    n_tokens = row_tokens(step)
    encoded = (encoder.encode(chat) for chat in chats(corpus, step))
    long_enough = ((ids[:n_tokens], answer[:n_tokens]) for ids, answer in encoded if len(ids) >= n_tokens)
    return list(islice(long_enough, BATCH_TOKENS // n_tokens))


def _phase(step: int) -> Phase:
    return [phase for phase in PHASES if phase.first_step <= step][-1]


def _drawn_row_tokens(rng: Random, phase: Phase) -> int:
    return rng.choices(list(phase.rows), list(phase.rows.values()))[0]


def _random(step: int) -> Random:
    return Random(SEED * 1_000_003 + step)
