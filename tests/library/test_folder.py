"""Models are found by name in the models folder, and nowhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from prima_core.errors import LibraryError
from prima_core.library.folder import entries, find_entry, find_model, models_folder, remove, shown_names

A, B, SPLIT = "maker/A-GGUF/A-Q4_K_M", "other/A-GGUF/A-Q4_K_M", "maker/B/Q8_0/B-Q8_0"


def add(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a single model, a split one, one that a user put there, and an unfinished download."""
    folder = tmp_path / "models"
    add(folder, f"{A}.gguf", *(f"{SPLIT}-0000{n}-of-00002.gguf" for n in (1, 2)), "own.gguf", "README.md")
    add(folder, "maker/C/C-F16.gguf.0123abcd.part", ".lock")
    return folder


def test_all_models_are_listed_by_name(folder: Path) -> None:
    found = {entry.name: (len(entry.files), entry.is_complete) for entry in entries(folder)}
    assert found == {A: (1, True), SPLIT: (2, True), "maker/C/C-F16": (1, False), "own": (1, True)}


def test_names_are_short_where_that_is_enough(folder: Path) -> None:
    assert list(shown_names(entries(folder)).values()) == ["A-Q4_K_M", "B-Q8_0", "C-F16", "own"]
    add(folder, f"{B}.gguf")
    assert list(shown_names(entries(folder)).values()) == [A, "B-Q8_0", "C-F16", B, "own"]


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert entries(tmp_path / "none") == []


def test_an_unfinished_newer_version_leaves_the_model_usable(folder: Path) -> None:
    add(folder, f"{A}.gguf.89abcdef.part")
    (entry,) = [entry for entry in entries(folder) if entry.name == A]
    assert (entry.is_complete, entry.path) == (True, folder / f"{A}.gguf")
    assert find_model("A-Q4_K_M", folder) == folder / f"{A}.gguf"


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("A-Q4_K_M", f"{A}.gguf"),
        (A, f"{A}.gguf"),
        (f"{A}.gguf", f"{A}.gguf"),
        ("A", f"{A}.gguf"),
        ("maker/A", f"{A}.gguf"),
        ("B-Q8_0", f"{SPLIT}-00001-of-00002.gguf"),
        ("own", "own.gguf"),
        ("hf:maker/A-GGUF", f"{A}.gguf"),
        ("hf:maker/A-GGUF:q4_k_m", f"{A}.gguf"),
        ("hf:maker/B:Q8_0", f"{SPLIT}-00001-of-00002.gguf"),
    ],
)
def test_a_name_leads_to_its_file(folder: Path, text: str, file: str) -> None:
    assert find_model(text, folder) == folder / file


def test_a_path_goes_before_a_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    add(tmp_path, "own")
    assert find_model("own", folder) == Path("own")
    (tmp_path / "B-Q8_0").mkdir()  # but a folder is no model
    assert find_model("B-Q8_0", folder).name == "B-Q8_0-00001-of-00002.gguf"


def test_an_exact_name_goes_before_longer_ones(folder: Path) -> None:
    add(folder, "x/own.gguf", "own-2.gguf")
    assert find_model("own", folder) == folder / "own.gguf"


def test_a_beginning_of_several_names_lists_them(folder: Path) -> None:
    add(folder, f"{B}.gguf")
    for text in ("A-Q4_K_M", "A-"):
        with pytest.raises(LibraryError, match=f"may mean 2 models:\n  {A}\n  {B}"):
            find_model(text, folder)


@pytest.mark.parametrize("text", ["none", "maker/none", "../models/own", "hf", "", "own/../own"])
def test_a_name_that_leads_nowhere_tells_how_to_get_models(folder: Path, text: str) -> None:
    if text == "":  # the present folder, as a path
        assert find_model(text, folder) == Path()
        return
    if text.startswith("."):  # a path
        assert find_model(text, folder) == Path(text)
        return
    with pytest.raises(LibraryError, match="no model of that name") as caught:
        find_model(text, folder)
    assert "prima pull hf:OWNER/REPO" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "name"), [("OWN", "own"), ("onw", "own"), ("a-q4_k_n", "A-Q4_K_M"), ("c-f16.gguF", "C-F16")]
)
def test_a_name_that_is_nearly_right_gives_the_right_one(folder: Path, text: str, name: str) -> None:
    with pytest.raises(LibraryError) as caught:
        find_model(text, folder)
    assert caught.value.hint.startswith(f"did you mean {name!r}? ")


def test_a_beginning_that_is_not_removed_gives_the_name(folder: Path) -> None:
    with pytest.raises(LibraryError) as caught:
        find_entry("A-Q4", folder)
    assert caught.value.hint.startswith("did you mean 'A-Q4_K_M'? ")


@pytest.mark.parametrize("text", ["hf:no/body", "hf:no/body:Q8_0", "hf:maker/A-GGUF:Q8_0", "hf:maker/C"])
def test_a_hubs_model_that_is_not_here_gives_the_command_that_fetches_it(folder: Path, text: str) -> None:
    with pytest.raises(LibraryError) as caught:
        find_model(text, folder)
    assert caught.value.hint == f"fetch it with: prima pull {text}"


def test_names_do_not_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    add(tmp_path, "secret.gguf")
    for text in (
        "../secret",
        "maker/../../secret",
        str(tmp_path / "secret"),
        "hf:../secret",
        "hf:maker/A:../../../secret",
    ):
        with pytest.raises(LibraryError):
            find_entry(text, folder)


def test_an_unfinished_download_is_told(folder: Path) -> None:
    with pytest.raises(LibraryError, match="C-F16 is not here whole") as caught:
        find_model("C-F16", folder)
    assert "prima pull" in caught.value.hint


# ---------------------------------------------------------------- removing


def test_removing_takes_all_parts_and_the_folders_that_are_empty_then(folder: Path) -> None:
    remove(find_entry("B-Q8_0", folder), folder)
    assert not (folder / "maker" / "B").exists()
    assert (folder / f"{A}.gguf").exists()
    remove(find_entry("hf:maker/A-GGUF", folder), folder)
    remove(find_entry("C-F16", folder), folder)
    remove(find_entry("own", folder), folder)
    assert entries(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "README.md"]


def test_only_an_exact_name_is_removed(folder: Path) -> None:
    for text in ("A", "maker", "ow", str(folder / "own.gguf")):
        with pytest.raises(LibraryError, match="there is no model"):
            find_entry(text, folder)
    add(folder, f"{B}.gguf")
    with pytest.raises(LibraryError, match="2 models are called 'A-Q4_K_M'"):
        find_entry("A-Q4_K_M", folder)
    assert find_entry(B, folder).path == folder / f"{B}.gguf"


def test_a_file_that_cannot_be_deleted_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LibraryError, match=r"cannot delete .*own\.gguf: Permission denied"):
        remove(find_entry("own", folder), folder)


# ---------------------------------------------------------------- where it is


def test_the_folder_is_the_users_or_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models_folder("there") == Path("there")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert models_folder(None) == tmp_path / ".local" / "share" / "prima" / "models"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert models_folder(None) == tmp_path / "data" / "prima" / "models"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert models_folder(None) == tmp_path / "Library" / "Application Support" / "prima" / "models"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there, and there are no pipes")
def test_links_to_nowhere_folders_and_pipes_are_no_models(folder: Path) -> None:
    place = folder / "maker" / "A-GGUF"
    (place / "gone.gguf").symlink_to(place / "nowhere.gguf")
    (place / "loop.gguf").symlink_to(place / "loop.gguf")
    (place / "folder.gguf").mkdir()
    if sys.platform != "win32":  # for the types only
        os.mkfifo(place / "pipe.gguf")
    assert find_model("hf:maker/A-GGUF", folder) == folder / f"{A}.gguf"
    assert A in {entry.name for entry in entries(folder)}
