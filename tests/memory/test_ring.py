from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from prima_core.memory.ring import Ring


@dataclass
class Part:
    start: int
    size: int
    is_over: bool = False


def ring_of(size: int, *sizes: int) -> Ring[Part]:
    ring = Ring[Part](size)
    for n_bytes in sizes:
        start = ring.place(n_bytes)
        assert start is not None
        ring.append(Part(start, n_bytes))
    return ring


def test_a_part_that_would_straddle_the_end_goes_to_the_start_once_that_is_free() -> None:
    ring = ring_of(10, 4, 4)
    assert ring.place(3) is None
    ring[0].is_over = True
    assert ring.reclaim()
    assert ring.place(4) == 0
    assert ring.place(2) == 8
    assert ring.place(5) is None


def test_what_is_full_to_the_last_byte_is_full() -> None:
    ring = ring_of(10, 4, 6)
    ring[0].is_over = True
    ring.reclaim()
    ring.append(Part(0, 4))
    assert ring.place(1) is None


def test_an_empty_ring_starts_over() -> None:
    ring = ring_of(10, 7)
    ring[0].is_over = True
    assert ring.place(10) is None
    ring.reclaim()
    assert ring.place(10) == 0


def test_the_newest_parts_are_taken_back_too() -> None:
    ring = ring_of(10, 4, 3, 3)
    ring[1].is_over = True
    assert not ring.reclaim()
    ring[2].is_over = True
    assert ring.reclaim()
    assert ring.place(6) == 4


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=80))
def test_parts_never_overlap_and_stay_inside(steps: list[tuple[int, int]]) -> None:
    ring = Ring[Part](100)
    for n_bytes, over in steps:
        start = ring.place(n_bytes)
        if start is not None:
            new = Part(start, n_bytes)
            assert 0 <= start <= 100 - n_bytes
            assert all(new.start + new.size <= old.start or old.start + old.size <= new.start for old in ring)
            ring.append(new)
        if over < len(ring):
            ring[over].is_over = True
            ring.reclaim()
