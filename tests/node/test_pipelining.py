"""Steps of different prompts, and chunks of one, fill the ring: counted in times of a stage, on a virtual clock."""

from __future__ import annotations

import pytest

from tests.engine.fakes import request
from tests.node.fakes import ROOM, VirtualRing

CHUNK = ROOM.chunk_tokens


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 5, 10, 20])
def test_chunks_of_a_prompt_fill_the_ring(n_chunks: int) -> None:
    """Three stages: the first chunk is through after 3 times, each other one a time later."""
    took = VirtualRing(3).first_token_s(1, request(n_chunks * CHUNK))
    assert took <= 1.2 * (n_chunks + 2)
    assert took >= n_chunks + 2, "faster than three stages can be"


@pytest.mark.parametrize("n_chunks", [2, 5, 20])
def test_the_bound_finds_chunks_that_wait_for_each_other(n_chunks: int) -> None:
    took = VirtualRing(3, in_flight=1).first_token_s(1, request(n_chunks * CHUNK))
    assert took == 3 * n_chunks
    assert took > 1.2 * (n_chunks + 2)


@pytest.mark.parametrize("n_stages", [1, 2, 4, 8])
def test_rings_of_every_length_are_filled(n_stages: int) -> None:
    took = VirtualRing(n_stages).first_token_s(1, request(20 * CHUNK))
    assert took == 20 + n_stages - 1


def test_prompts_of_several_users_fill_the_ring_together() -> None:
    ring = VirtualRing(3)
    for number in range(8):
        ring.submit(number, request(CHUNK, max_tokens=1))
    while not all(ring.events.values()):
        ring.turn()
    assert ring.now_s == 8 + 2


def test_a_long_prompt_does_not_stop_those_who_decode() -> None:
    ring = VirtualRing(3)
    ring.first_token_s(1, request(1, max_tokens=50))
    began_s = ring.now_s
    ring.submit(2, request(12 * CHUNK))
    while not ring.events[2]:
        ring.turn()
    took = ring.now_s - began_s
    n_tokens = len(ring.events[1]) - 1
    assert n_tokens >= took / 4 - 1, "a token every fourth time at least: three stages and one chunk before it"
    assert took <= 1.2 * (12 + n_tokens + 2)
