"""Which experts stay: those that tokens choose often, of late."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from prima_core.memory.residents import Indices, Residents

N_LAYERS, N_EXPERTS, N_USED = 4, 64, 8


def residents(capacity: int, released: list[int] | None = None) -> Residents:
    gone: list[int] = [] if released is None else released
    made = Residents(N_LAYERS, N_EXPERTS, N_USED, N_LAYERS * N_EXPERTS, gone.append)
    made.resize(capacity)
    return made


def some(*experts: int) -> Indices:
    return np.array(experts, np.intp)


def use(table: Residents, row: int, chosen: Indices) -> int:
    """As a step does; how many were in memory."""
    wanted = table.count(row, chosen)
    held = table.hold(row, wanted)
    missing = np.setdiff1d(wanted, held)
    table.leave(row, held)
    while len(missing):
        came = table.admit(row, missing)
        table.leave(row, came)
        missing = missing[len(came) :]
    return len(held)


def choices(exponent: float, n_tokens: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.intp]]:
    """[tokens, layers, used]: by Zipf's law, in an order of each layer's own."""
    random = np.random.default_rng(3)
    weights = np.array([random.permutation(1 / np.arange(1, N_EXPERTS + 1) ** exponent) for _ in range(N_LAYERS)])
    keys = random.gumbel(size=(n_tokens, N_LAYERS, N_EXPERTS)) + np.log(weights)
    return np.argsort(-keys, axis=2)[:, :, :N_USED].astype(np.intp)


def hits_of_least_recently_used(chosen: np.ndarray[tuple[int, int, int], np.dtype[np.intp]], capacity: int) -> int:
    there: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in chosen:
        for row, experts in enumerate(token):
            for expert in experts.tolist():
                hits += (row, expert) in there
                there[row, expert] = None
                there.move_to_end((row, expert))
            while len(there) > capacity:
                there.popitem(last=False)
    return hits


@pytest.mark.parametrize(("exponent", "gain"), [(0.0, 1.0), (0.5, 1.2), (1.0, 1.1)])
def test_more_are_in_memory_than_if_the_least_recently_used_went(exponent: float, gain: float) -> None:
    chosen, capacity = choices(exponent, 300), N_LAYERS * N_EXPERTS * 3 // 10
    table = residents(capacity)
    hits = sum(use(table, row, experts) for token in chosen for row, experts in enumerate(token))
    assert hits > gain * hits_of_least_recently_used(chosen, capacity)


def test_a_long_prompt_puts_no_layer_before_another() -> None:
    """All of it goes through a layer before the next one; what it chose often stays, in each layer."""
    table = residents(N_LAYERS * 8 + 2 * N_USED)
    prompt = np.concatenate([np.repeat(np.arange(8), 100), np.arange(8, 40)])
    for row in range(N_LAYERS):
        use(table, row, prompt)
    for row in range(N_LAYERS):
        assert len(table.hold(row, np.arange(8))) == 8
        table.leave(row, np.arange(8))


def test_two_experts_never_have_one_slot() -> None:
    random, table = np.random.default_rng(1), residents(20)
    for _ in range(200):
        row = int(random.integers(N_LAYERS))
        use(table, row, random.integers(0, N_EXPERTS, 12))
        if random.random() < 0.1:
            table.resize(int(random.integers(1, 40)))
        slots = np.concatenate([table.slots(row, np.arange(N_EXPERTS)) for row in range(N_LAYERS)])
        assert len(np.unique(slots[slots >= 0])) == (slots >= 0).sum() <= table.n_with_memory


def test_what_is_busy_does_not_go_and_one_comes_even_then() -> None:
    table = residents(2)
    table.admit(0, some(1, 2))
    assert table.admit(0, some(3)).tolist() == []
    assert table.admit(1, some(3, 4)).tolist() == [3], "of another layer, where nothing is busy"
    assert table.slots(0, some(1, 2)).min() >= 0
    table.leave(0, some(1, 2))
    assert table.n_with_memory == 2


def test_the_slot_of_a_failed_read_is_used_again_but_not_of_one_that_may_still_come() -> None:
    table = residents(1)
    table.admit(0, some(5))
    [slot] = table.slots(0, some(5))
    table.drop(0, some(5))
    assert len(table.hold(0, some(5))) == 0
    table.admit(0, some(6))
    assert table.slots(0, some(6)) == slot
    lost = table.lose(0, some(6))
    assert lost == [slot]
    table.admit(0, some(7))
    assert table.slots(0, some(7)) != slot
    table.regain(lost)
    assert table.n_with_memory == 1


def test_no_more_slots_are_lost_than_may_be_and_what_is_in_memory_stays() -> None:
    """A disk that hangs for hours is asked again and again."""
    table = residents(200)
    use(table, 0, np.arange(40))
    lost: list[int] = []
    while len(came := table.admit(1, np.arange(N_USED))):
        lost += table.lose(1, came)
    assert len(lost) == 8 * N_USED
    assert len(table.hold(0, np.arange(40))) == 40
    table.regain(lost)
    assert len(table.admit(1, np.arange(N_USED))) == N_USED


def test_an_expert_whose_memory_cannot_be_had_takes_the_slot_of_another() -> None:
    released: list[int] = []
    table = residents(10, released)
    use(table, 0, some(1))
    [theirs] = table.slots(0, some(1))
    table.admit(1, some(2, 3))
    [without, other] = table.slots(1, some(2, 3))
    assert table.swap(1, 2)
    assert table.slots(1, some(2)) == theirs
    assert released == [without]
    assert not table.swap(1, 3), "all others are busy"
    table.give_back(1, some(3))
    assert released == [without, other]
    assert table.n_with_memory == 1
    table.leave(1, some(2))
    use(table, 0, some(1))
    assert table.n_with_memory == 2


def test_a_smaller_capacity_gives_memory_back_at_once() -> None:
    released: list[int] = []
    table = residents(10, released)
    use(table, 0, np.arange(10))
    table.resize(4)
    assert (len(released), table.n_with_memory) == (6, 4)
