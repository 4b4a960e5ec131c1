"""What `python -m bench.live` makes of what it measured."""

from __future__ import annotations

from bench.live import Row, bars

HALDA = Row("home", "halda", 1.0, 1.25)


def test_the_first_solver_is_held_against_its_forecast_and_all_others() -> None:
    found = list(bars([HALDA, Row("home", "even", 3.0, 2.0), Row("home", "compute", 0.5, None)]))
    assert [round(bar.measured, 3) for bar in found] == [0.2, 3.0, 0.5]
    assert [bar.holds for bar in found] == [True, True, False]


def test_a_solver_without_a_plan_is_told_of_and_not_compared() -> None:
    broken = Row("home", "compute", None, None, error="no room")
    assert len(list(bars([HALDA, broken]))) == 1
    assert list(bars([broken, HALDA])) == []
    assert "no room" in broken.line()
