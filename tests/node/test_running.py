"""A plan is followed by nodes that load it, or that do not get on with that."""

from __future__ import annotations

from prima_core.node.driver import State
from prima_core.node.running import LOAD_STALLS_AFTER_S
from tests.node.fakes import Rig


def test_a_node_whose_load_does_not_go_on_is_left_out() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.ready("head")
    for done in range(3):
        rig.now_s += LOAD_STALLS_AFTER_S
        rig.driver.tick()
        assert rig.visited() == ("head", "b")
        rig.progress("b", done, 100)
    rig.progress("b", 2, 100)
    rig.now_s += LOAD_STALLS_AFTER_S + 1
    rig.progress("b", 2, 100)
    rig.driver.tick()
    assert rig.visited() == ("head",)
    rig.ready("head")
    assert rig.state() is State.SERVING
    rig.now_s += 2 * LOAD_STALLS_AFTER_S
    rig.driver.tick()
    assert rig.state() is State.SERVING


def test_when_nothing_goes_without_a_node_that_hangs_its_reason_is_told() -> None:
    rig = Rig(wait_for=2, needs=2)
    rig.join("head", "b")
    rig.ready("head")
    rig.progress("b", 7, 100)
    rig.now_s += LOAD_STALLS_AFTER_S + 1
    rig.driver.tick()
    assert rig.state() is State.WAITING
    assert "node 'b' cannot serve: it has not loaded more than 7% of its part for 300 s" in rig.driver.status.reason
