"""What every transport of ours has to do, whatever carries it: all that the kit for authors asks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

import prima_inproc.plugin
import prima_nng.plugin
import prima_socket.plugin
from prima_core.errors import LinkBroken
from prima_core.interfaces import Limits
from prima_core.testing.report import State
from prima_core.testing.transports import CHECKS, OURS, STRANGERS, check_transport

OFFERS = {
    offer.scheme: offer
    for plugin in (prima_inproc.plugin, prima_socket.plugin, prima_nng.plugin)
    for offer in plugin.prima_transports()
}
NEEDS_NOT = {"inproc": 7, "unix": 2, "ipc": 2, "tcp": 0, "tls+tcp": 0}
"""How many checks are not for it: who shares the process, or can open the folder, is let in."""


@pytest.fixture(autouse=True)
def _folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="prima-") as folder:  # shorter than `tmp_path`: sockets lie there
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield


def free_address(scheme: str) -> str:
    return f"{scheme}://127.0.0.1:0" if "tcp" in scheme else f"{scheme}://"


def test_all_of_ours_are_known() -> None:
    assert set(OFFERS) == set(NEEDS_NOT)


@pytest.mark.parametrize("scheme", NEEDS_NOT)
def test_our_transports_do_what_is_asked(scheme: str) -> None:
    report = check_transport(
        OFFERS[scheme],
        address=free_address(scheme),
        wrong_credentials=STRANGERS if "tcp" in scheme else None,
        crosses_processes=scheme != "inproc",
    )
    assert report.subject == f"transport {scheme}"
    assert len(report.checks) == len(CHECKS)
    assert sum(check.state is State.NOT_OFFERED for check in report.checks) == NEEDS_NOT[scheme]


@pytest.mark.parametrize("scheme", NEEDS_NOT)
def test_a_taken_address_is_refused_with_a_hint(scheme: str) -> None:
    transport = OFFERS[scheme].open()
    link = transport.listen(free_address(scheme), OURS, Limits())
    try:
        with pytest.raises(LinkBroken) as caught:
            transport.listen(link.address, OURS, Limits())
        assert "choose another" in caught.value.hint
    finally:
        link.close()
