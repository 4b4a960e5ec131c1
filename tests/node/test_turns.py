from __future__ import annotations

import threading
from pathlib import Path

from prima_core.node.turns import turn


def forever() -> bool:
    return False


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, leave, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        with turn(tmp_path / "new" / "lock", 10, forever):
            inside.set()
            leave.wait(10)
            order.append("first")

    def looked() -> bool:
        leave.set()  # the second has tried in vain
        return False

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with turn(tmp_path / "new" / "lock", 10, looked):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_waiting_comes_to_an_end(tmp_path: Path) -> None:
    with turn(tmp_path / "lock", 10, forever):
        with turn(tmp_path / "lock", 0.0, forever):
            pass
        with turn(tmp_path / "lock", 60, lambda: True):
            pass


def test_where_nothing_can_be_written_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with turn(tmp_path / "file" / "lock", 60, forever), turn(tmp_path / "file" / "lock", 60, forever):
        pass
