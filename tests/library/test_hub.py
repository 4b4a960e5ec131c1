"""Models come whole and checked, whatever the line does; or an error says what to do, and nothing half lies there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants

from prima_core.errors import LibraryError
from prima_core.library import hub as library_hub
from prima_core.library.candidates import read_hub_name
from prima_core.library.hub import Hub
from tests.library.fake_hub import FakeHub

REPO = "maker/Model-GGUF"
DATA = random.Random(7).randbytes(3_000_000)
MODEL = "Model-Q4_K_M.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def one(hub: FakeHub) -> FakeHub:
    """A hub with a repository of one model."""
    hub.repos[REPO] = {MODEL: DATA, "README.md": b"hello", "config.json": b"{}"}
    return hub


def pull(hub: FakeHub, folder: Path, name: str = f"hf:{REPO}") -> list[str]:
    """The paths of what was fetched, below the models folder."""
    hub_name = read_hub_name(name)
    model = Hub(hub.address).pull(hub_name, folder, lambda what, done, total: None)
    return [f"{hub_name.repo}/{file}" for file in model.files]


def refusal(hub: FakeHub, folder: Path, name: str = f"hf:{REPO}") -> LibraryError:
    with pytest.raises(LibraryError) as caught:
        pull(hub, folder, name)
    return caught.value


def files(folder: Path) -> dict[str, int]:
    """What lies in the models folder, without the lock."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# ---------------------------------------------------------------- whole


def test_the_only_model_of_a_repository_is_fetched_under_its_name(one: FakeHub, folder: Path) -> None:
    assert pull(one, folder) == [f"{REPO}/{MODEL}"]
    assert (folder / REPO / MODEL).read_bytes() == DATA
    assert files(folder) == {f"{REPO}/{MODEL}": len(DATA)}


def test_progress_goes_from_nothing_to_all_of_it(one: FakeHub, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    Hub(one.address).pull(read_hub_name(f"hf:{REPO}"), folder, lambda *what: told.append(what))
    for doing in (f"fetching {MODEL}", f"checking {MODEL}"):
        steps = [done for what, done, _ in told if what == doing]
        assert steps == sorted(steps)
        assert steps[-1] == len(DATA)
    assert {total for _, _, total in told} == {len(DATA)}


def test_all_parts_of_a_split_model_are_fetched(hub: FakeHub, folder: Path) -> None:
    parts = {f"Q8_0/M-Q8_0-0000{n}-of-00003.gguf": DATA[n : n + 1000] for n in (1, 2, 3)}
    hub.repos[REPO] = {**parts, MODEL: DATA}
    assert pull(hub, folder, f"hf:{REPO}:Q8_0") == [f"{REPO}/{name}" for name in parts]
    assert files(folder) == {f"{REPO}/{name}": 1000 for name in parts}
    assert all((folder / REPO / name).read_bytes() == data for name, data in parts.items())


def test_what_is_here_already_is_checked_and_not_fetched_again(one: FakeHub, folder: Path) -> None:
    pull(one, folder)
    one.asked.clear()
    pull(one, folder)
    assert one.fetched(MODEL) == []


def test_a_damaged_model_is_fetched_again(one: FakeHub, folder: Path) -> None:
    pull(one, folder)
    (folder / REPO / MODEL).write_bytes(DATA[:-1] + b"x")
    pull(one, folder)
    assert (folder / REPO / MODEL).read_bytes() == DATA


def test_a_model_that_is_new_at_the_hub_replaces_the_old_one(one: FakeHub, folder: Path) -> None:
    pull(one, folder)
    (folder / REPO / f"{MODEL}.0123abcd.part").write_bytes(b"of a version between")
    one.repos[REPO][MODEL] = DATA[::-1]
    pull(one, folder)
    assert (folder / REPO / MODEL).read_bytes() == DATA[::-1]
    assert files(folder) == {f"{REPO}/{MODEL}": len(DATA)}


def test_a_small_file_of_which_no_checksum_is_known_is_fetched_by_its_size(hub: FakeHub, folder: Path) -> None:
    hub.repos[REPO] = {"small.gguf": DATA[:100]}
    pull(hub, folder)
    assert files(folder) == {f"{REPO}/small.gguf": 100}


def test_a_name_with_spaces_and_letters_of_the_world_is_fetched(hub: FakeHub, folder: Path) -> None:
    hub.repos[REPO] = {"M\u00f6del #1 100%.gguf": DATA[:100]}
    pull(hub, folder)
    assert files(folder) == {f"{REPO}/M\u00f6del #1 100%.gguf": 100}


def test_the_token_goes_to_the_hub_and_not_to_the_storage_elsewhere(
    one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.token, one.gated = "hf_secret", True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(one, folder)
    assert {asked.token for asked in one.asked if "/api/models/" in asked.path or "/resolve/" in asked.path} == {
        "hf_secret"
    }
    assert {asked.token for asked in one.asked if "/cdn/" in asked.path} == {None}


# ---------------------------------------------------------------- bad lines


def test_a_broken_connection_is_continued_where_it_ended(one: FakeHub, folder: Path) -> None:
    one.cut_after = [1_100_000, 1_100_000]
    pull(one, folder)
    first, *later = one.fetched(MODEL)
    assert first is None
    assert len(later) == 2
    assert all(begin is not None and begin > "bytes=0-" for begin in later)
    assert (folder / REPO / MODEL).read_bytes() == DATA


def test_an_interrupted_download_is_continued_by_the_next_command(one: FakeHub, folder: Path) -> None:
    class Interrupted(BaseException):
        """As Ctrl-C: nothing below may catch it."""

    def interrupt(what: str, done: int, total: int) -> None:
        if done > 2_000_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        Hub(one.address).pull(read_hub_name(f"hf:{REPO}"), folder, interrupt)
    ((name, size),) = files(folder).items()
    assert name.startswith(f"{REPO}/{MODEL}.")
    assert name.endswith(".part")
    one.asked.clear()
    pull(one, folder)
    assert one.fetched(MODEL) == [f"bytes={size}-"]
    assert files(folder) == {f"{REPO}/{MODEL}": len(DATA)}
    assert (folder / REPO / MODEL).read_bytes() == DATA


def test_a_server_that_ignores_ranges_begins_anew(one: FakeHub, folder: Path) -> None:
    one.ignores_ranges = True
    one.cut_after = [1_500_000]
    pull(one, folder)
    assert (folder / REPO / MODEL).read_bytes() == DATA


def test_a_line_that_brings_nothing_ends_and_what_came_is_kept(one: FakeHub, folder: Path) -> None:
    one.cut_after = [1_100_000, *[0] * 20]
    error = refusal(one, folder)
    assert f"cannot reach {one.address}" in error.message
    assert "goes on where this one ended" in error.hint
    assert len(one.fetched(MODEL)) == 1 + library_hub.TRIES
    ((name, size),) = files(folder).items()
    assert name.endswith(".part")
    assert 0 < size < len(DATA)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_asked_again(one: FakeHub, folder: Path, status: int) -> None:
    one.status[f"resolve/0123456789abcdef0123456789abcdef01234567/{MODEL}"] = [status, status]
    pull(one, folder)
    assert (folder / REPO / MODEL).read_bytes() == DATA


@pytest.mark.parametrize(("status", "what"), [(429, "wants fewer requests"), (503, "answers with status 503")])
def test_a_hub_that_stays_in_trouble_is_told(one: FakeHub, folder: Path, status: int, what: str) -> None:
    one.status[MODEL] = [status] * 20
    assert what in refusal(one, folder).message


def test_a_wrong_checksum_leaves_nothing(one: FakeHub, folder: Path) -> None:
    one.damages = True
    error = refusal(one, folder)
    assert f"{MODEL} came damaged" in error.message
    assert files(folder) == {}
    one.damages = False
    pull(one, folder)
    assert (folder / REPO / MODEL).read_bytes() == DATA


def test_a_file_longer_than_the_hub_told_is_refused(one: FakeHub, folder: Path) -> None:
    one.told_sizes[MODEL] = 1000
    assert "longer than the 1000 bytes" in refusal(one, folder).message
    assert f"{REPO}/{MODEL}" not in files(folder)


def test_a_file_shorter_than_the_hub_told_is_no_endless_wait(one: FakeHub, folder: Path) -> None:
    one.told_sizes[MODEL] = len(DATA) + 1
    assert "sends no more" in refusal(one, folder).message
    assert f"{REPO}/{MODEL}" not in files(folder)


# ---------------------------------------------------------------- no access


def test_no_network_is_told(folder: Path, hub: FakeHub) -> None:
    hub.address = "http://127.0.0.1:9"
    error = refusal(hub, folder)
    assert "cannot reach http://127.0.0.1:9" in error.message
    assert not folder.exists()


def test_offline_mode_is_told(one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(one, folder).message
    assert one.asked == []


def test_an_unknown_or_private_repository_is_told(hub: FakeHub, folder: Path) -> None:
    error = refusal(hub, folder, "hf:no/body")
    assert f"no repository no/body at {hub.address}, or it is private" in error.message
    assert "HF_TOKEN" in error.hint


def test_a_gated_repository_tells_where_to_accept_its_terms(one: FakeHub, folder: Path) -> None:
    one.gated = True
    error = refusal(one, folder)
    assert "accept its terms" in error.message
    assert f"{one.address}/{REPO}" in error.hint
    assert "HF_TOKEN" in error.hint
    assert f"{REPO}/{MODEL}" not in files(folder)


@pytest.mark.parametrize(
    ("status", "what"), [(403, "lets this account not read"), (404, "not in maker/Model-GGUF any more")]
)
def test_a_file_that_may_not_be_read_is_told_at_once(one: FakeHub, folder: Path, status: int, what: str) -> None:
    one.status[MODEL] = [status] * 20
    assert what in refusal(one, folder).message
    assert len(one.status[MODEL]) == 19


def test_a_server_that_is_no_hub_is_told(one: FakeHub, folder: Path) -> None:
    one.answers_web_pages = True
    error = refusal(one, folder)
    assert "does not answer as a hub" in error.message
    assert "HF_ENDPOINT" in error.hint


def test_without_the_hubs_library_the_command_that_installs_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refusal(hub, folder)
    assert "needs huggingface_hub" in error.message
    assert error.hint == 'pip install "prima-llm[hub]"'


# ---------------------------------------------------------------- the disk


def test_a_model_for_which_there_is_no_room_is_not_begun(
    one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refusal(one, folder)
    assert "3.0 MB are to be fetched, 1.0 MB are free" in error.message
    assert "prima rm" in error.hint
    assert files(folder) == {}


def test_what_was_fetched_before_needs_no_room(one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one.cut_after = [1_500_000, *[0] * library_hub.TRIES]
    refusal(one, folder)
    ((_, size),) = files(folder).items()
    usage = type("Usage", (), {"free": len(DATA) - size})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    pull(one, folder)


def test_a_disk_that_gets_full_is_told_and_nothing_half_has_the_models_name(
    one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really: Callable[..., Any] = Path.open

    class Full:
        def __init__(self, file: Any) -> None:  # a file of whatever kind
            self._file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if self._file.tell() + len(data) > 2_000_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self._file.write(data))

    def limited(path: Path, mode: str = "r", **more: Any) -> Any:
        return Full(really(path, mode, **more)) if "+" in mode else really(path, mode, **more)

    monkeypatch.setattr(Path, "open", limited)
    error = refusal(one, folder)
    assert "the disk is full" in error.message
    assert "what was fetched is kept" in error.hint
    ((name, size),) = files(folder).items()
    assert name.endswith(".part")
    assert size > 0
    monkeypatch.undo()


def test_a_folder_that_cannot_be_written_to_is_told(one: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to" in refusal(one, tmp_path / "file").message


def test_two_do_not_write_the_same_file(one: FakeHub, folder: Path) -> None:
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert "another `prima pull`" in refusal(one, folder).message
    pull(one, folder)


# ---------------------------------------------------------------- names from strangers


EVIL = [
    "../evil.gguf",
    "/evil.gguf",
    "a/../../evil.gguf",
    "..\\evil.gguf",
    "C:evil.gguf",
    ".x/e.gguf",
    "a\x9b2Jb.gguf",
    "a\u202eb.gguf",
    "\ud800.gguf",
]


@pytest.mark.parametrize("path", EVIL)
def test_a_file_name_that_leads_elsewhere_is_no_model(hub: FakeHub, folder: Path, path: str) -> None:
    hub.repos[REPO] = {path: DATA[:10]}
    assert "there is no GGUF file" in refusal(hub, folder).message
    assert files(folder) == {}


def test_a_file_that_hubs_do_not_give_this_way_gives_the_command_that_fetches_it(
    one: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 2_000_000)
    error = refusal(one, folder)
    assert f"{MODEL} has 3.0 MB, and hubs give at most 2.0 MB this way" in error.message
    assert error.hint == f"fetch it with: hf download {REPO} {MODEL} --local-dir {folder / REPO}"


@pytest.mark.parametrize("sha256", ["../../../evil", "", 7, "A" * 64])
def test_a_checksum_that_is_none_is_refused_and_names_no_file(one: FakeHub, folder: Path, sha256: object) -> None:
    one.told_sha256 = sha256
    assert "does not answer as a hub" in refusal(one, folder).message
    assert files(folder) == {}


@pytest.mark.parametrize("size", [-1, "10", 1.5])
def test_a_size_that_is_none_is_refused(one: FakeHub, folder: Path, size: Any) -> None:
    one.told_sizes[MODEL] = size
    assert "does not answer as a hub" in refusal(one, folder).message


def test_a_packed_answer_is_refused_and_not_unpacked(one: FakeHub, folder: Path) -> None:
    one.packing = "gzip, gzip"
    assert "packed" in refusal(one, folder).message
    assert files(folder).get(f"{REPO}/{MODEL}") is None


def test_an_address_that_is_none_is_told(folder: Path, hub: FakeHub) -> None:
    hub.address = "http://[::1"
    assert "[::1" in refusal(hub, folder).message
