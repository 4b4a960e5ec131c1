"""For authors of transports: whether a transport does what `prima_core.interfaces` asks of links.

from prima_core.testing.checks import check_transport

def test_conformance() -> None:
    [plugin] = prima_transports()
    print(check_transport(plugin, address="pigeon://loft:0"))
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from prima_core.interfaces import Credentials, TransportPlugin
from prima_core.testing import linkchecks, linkprocesses
from prima_core.testing.links import Bench, Case, opener
from prima_core.testing.report import Figures, Recorder, Report, Wrong

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
    """What became of every check. Raises CheckFailed with all that failed, PluginError for a scheme that does not open.

    `transport`: the offer, or the scheme of one that is installed. Other processes open it too, by the name of the
    offer's `open`: a function of a module, or a `partial` of one; call this from a test or below
    `if __name__ == "__main__"`.
    `address`: where to listen so that the transport finds a free place, e.g. `tcp://127.0.0.1:0`; without it `scheme://`.
    `wrong_credentials`: such as it must not talk to; None: it asks for none, because only friends can reach it.
    `crosses_processes`: whether its links reach other processes; some checks kill one.
    """
    scheme = transport if isinstance(transport, str) else transport.scheme
    case = Case(opener(transport), address or f"{scheme}://", credentials, wrong_credentials, crosses_processes)
    if isinstance(transport, str):
        Bench(case).close()
    recorder = Recorder()
    for check in CHECKS:
        run_check(recorder, check, case)
    return recorder.report(f"transport {scheme}").demand()


def run_check(recorder: Recorder, check: Check, case: Case, limit_s: float = _CHECK_S) -> None:
    """One check, by its function's name in words; one that hangs is told with the line where it does."""
    recorder.run(check.__name__.replace("_", " "), lambda: _within(limit_s, check, case))


def _within(limit_s: float, check: Check, case: Case) -> Figures | None:
    figures: list[Figures | None] = []
    errors: list[Exception] = []

    def main() -> None:
        try:
            figures.append(_checked(check, case))
        except Exception as error:  # noqa: BLE001  # raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=main, name="prima-check", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        where = "".join(_innermost(thread))
        hint = "no call may outlast its timeout, and close ends every call"
        raise Wrong(f"an end within {limit_s:g} s", f"it hangs: {where}", hint)
    if errors:
        raise errors[0]
    return figures[0]


def _checked(check: Check, case: Case) -> Figures | None:
    bench = Bench(case)
    try:
        return check(bench)
    finally:
        bench.close()


def _innermost(thread: threading.Thread) -> Iterator[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is not None:
        last = traceback.extract_stack(frame)[-1]
        yield f"{last.filename}:{last.lineno} {last.line}"
