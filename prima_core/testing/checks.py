"""For authors of plugins: whether a backend, a transport or a solver does what prima asks of it.

from prima_core.testing.checks import Tolerance, check_backend

def test_conformance() -> None:
    [plugin] = prima_backends()
    print(check_backend(plugin, tolerance=Tolerance(logits=1e-3, batch=1e-5)))
"""

from __future__ import annotations

from prima_core.testing.backends.check import check_backend
from prima_core.testing.backends.subject import Tolerance
from prima_core.testing.report import Check, CheckFailed, Report, State
from prima_core.testing.solvers import check_solver
from prima_core.testing.transports import check_transport

__all__ = [
    "Check",
    "CheckFailed",
    "Report",
    "State",
    "Tolerance",
    "check_backend",
    "check_solver",
    "check_transport",
]

if __name__ == "__main__":
    from prima_core.testing.command import checks

    checks(prog_name="python -m prima_core.testing.checks")
