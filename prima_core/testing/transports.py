"""For authors of transports: whether a transport does what `prima_core.interfaces` asks of links.

from prima_core.testing.checks import check_transport

def test_conformance() -> None:
    [plugin] = prima_transports()
    print(check_transport(plugin, address="pigeon://loft:0"))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prima_core.errors import ConfigError, LinkError
from prima_core.interfaces import Credentials, TransportPlugin
from prima_core.testing import linkchecks, linkprocesses
from prima_core.testing.limits import within
from prima_core.testing.links import Bench, Case, opener
from prima_core.testing.report import Figures, Recorder, Report, State, Wrong

Check = Callable[[Bench], Figures | None]

CHECKS: tuple[Check, ...] = (*linkchecks.CHECKS, *linkprocesses.CHECKS)
OURS = Credentials(b"of the cluster that is checked..")
STRANGERS = Credentials(b"of some other cluster, not ours.")

_CHECK_S = 60.0  # a check that is not at its end by then hangs; the slowest take a few seconds


def check_transport(
    transport: TransportPlugin | str,
    *,
    address: str = "",
    credentials: Credentials = OURS,
    wrong_credentials: Credentials | None = STRANGERS,
    crosses_processes: bool = True,
) -> Report:
    """What became of every check. Raises CheckFailed with all that failed, PluginError for a scheme that does not open,
    ConfigError for what is no transport or an address of another one.

    `transport`: the offer, or the scheme of one that is installed. Other processes open it too, by the name of the
    offer's `open`: a function of a module, or a `partial` of one; call this from a test or below
    `if __name__ == "__main__"`.
    `address`: where to listen so that the transport finds a free place, e.g. `tcp://127.0.0.1:0`; without it `scheme://`.
    `wrong_credentials`: such as it must not talk to; None: it asks for none, because only friends can reach it.
    `crosses_processes`: whether its links reach other processes; some checks kill one.
    """
    if not isinstance(transport, TransportPlugin | str):
        raise ConfigError(f"{transport!r} is no transport", hint="give the TransportPlugin, or the scheme of one")
    scheme = transport if isinstance(transport, str) else transport.scheme
    if address and not address.startswith(f"{scheme}://"):
        raise ConfigError(f"{address!r} is no address of {scheme}", hint=f"it starts with {scheme}://")
    case = Case(opener(transport), address or f"{scheme}://", credentials, wrong_credentials, crosses_processes)
    if isinstance(transport, str):
        Bench(case).close()
    first, recorder = Recorder(), Recorder()
    run_check(first, listening, case)
    if first.checks[0].state is State.FAILED:  # told once, not by every check
        return first.report(f"transport {scheme}").demand()
    for check in CHECKS:
        run_check(recorder, check, case)
    return recorder.report(f"transport {scheme}").demand()


def run_check(recorder: Recorder, check: Check, case: Case, limit_s: float = _CHECK_S) -> None:
    """One check, by its function's name in words; one that hangs is told with the line where it does."""
    recorder.run(check.__name__.replace("_", " "), lambda: within(limit_s, partial(_checked, check, case), _HANGS))


def listening(bench: Bench) -> None:
    """What every check begins with."""
    try:
        bench.listen()
    except LinkError as error:
        place = bench.case.address
        hint = "give an address where it finds a free place, e.g. tcp://127.0.0.1:0"
        raise Wrong(f"a link that listens at {place}", f"{type(error).__name__}: {error}", hint) from error


_HANGS = "no call may outlast its timeout, and close ends every call"


def _checked(check: Check, case: Case) -> Figures | None:
    bench = Bench(case)
    try:
        return check(bench)
    finally:
        bench.close()
