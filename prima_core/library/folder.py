"""The models folder: models by name, whoever put them there."""

from __future__ import annotations

import difflib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import rich_click as click

from prima_core.errors import LibraryError
from prima_core.library.candidates import HUB_PREFIX, candidates, choose, read_hub_name
from prima_core.model.split import all_parts, model_name

UNFINISHED = ".part"


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in the folder: its `name` there (the path without ending), all of its files, and whether all are there.

    Other names lead to it too: the last part of its name, and `hf:OWNER/REPO:FILE`.
    """

    name: str
    files: tuple[Path, ...]
    is_complete: bool

    @property
    def path(self) -> Path:
        return self.files[0]

    @property
    def short_name(self) -> str:
        return PurePosixPath(self.name).name


def models_folder(given: str | None) -> Path:
    """The folder that the user named, or where the system wants such data of a user."""
    if given is not None:
        return Path(given)
    if sys.platform in ("win32", "darwin"):
        return Path(click.get_app_dir("prima", roaming=False)) / "models"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "prima" / "models"


def shown_names(known: list[Entry]) -> dict[Entry, str]:
    """What to call each: the short name where it is enough."""
    counts = Counter(entry.short_name for entry in known)
    return {entry: entry.short_name if counts[entry.short_name] == 1 else entry.name for entry in known}


def entries(folder: Path) -> list[Entry]:
    """All models in the folder and below, by name; those that are not there whole too. Nothing is opened."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.gguf*")) if folder.is_dir() else ():
        final = final_path(path)
        if final is not None and path.is_file():
            name = final.with_name(model_name(final)).relative_to(folder).as_posix()
            found.setdefault(name, []).append(path)
    return [Entry(name, tuple(files), _is_complete(files[0])) for name, files in sorted(found.items())]


def final_path(path: Path) -> Path | None:
    """Where a model's file lies, or will lie when its download `X.gguf.0123abcd.part` is finished; None for others."""
    if path.suffix == UNFINISHED:
        path = path.with_suffix("").with_suffix("")
    return path if path.suffix == ".gguf" else None


def _is_complete(path: Path) -> bool:
    final = final_path(path)
    return final is not None and all(part.exists() for part in all_parts(final))


def find_model(text: str, folder: Path) -> Path:
    """The file that MODEL means: a path, or a model in the folder by its name, a beginning of it, or `hf:OWNER/REPO`.

    What looks like a path is given back also where nothing is: opening it says what is wrong.
    Raises LibraryError where no model or several are meant.
    """
    if text.startswith(HUB_PREFIX):
        return _find_pulled(text, folder)
    path = Path(text)
    if path.exists() and not path.is_dir():
        return path
    known = entries(folder)
    found = _named(text, known) or _beginning(text, known)
    if len(found) == 1:
        return _whole(found[0])
    if found:
        names = "\n".join(f"  {entry.name}" for entry in found)
        raise LibraryError(f"{text!r} may mean {len(found)} models:\n{names}", hint="write more of the name")
    if path.exists() or path.suffix == ".gguf" or path.is_absolute() or text.startswith((".", "~")):
        return path
    raise LibraryError(
        f"there is no file {text!r}, and no model of that name in {folder}",
        hint=_alike(text, known)
        + "`prima ls` shows the models that are here, `prima pull hf:OWNER/REPO` fetches others",
    )


def find_entry(text: str, folder: Path) -> Entry:
    """A model of the folder by its exact name, complete or not. Raises LibraryError."""
    known = entries(folder)
    if text.startswith(HUB_PREFIX):
        path = _find_pulled(text, folder)
        return next(entry for entry in known if path in entry.files)
    found = _named(text, known)
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} models are called {text!r}" if found else f"there is no model {text!r}"
    raise LibraryError(f"{what} in {folder}", hint=f"{_alike(text, known)}`prima ls` shows the names")


def _alike(text: str, known: list[Entry]) -> str:
    """The beginning of a hint: the name that was perhaps meant, one that goes on after `text` or is spelled like it."""
    names = {name.lower(): shown for entry, shown in shown_names(known).items() for name in (entry.name, shown)}
    wanted = text.removesuffix(".gguf").lower()
    begun = [name for name in names if wanted and name.startswith(wanted)]
    close = begun or difflib.get_close_matches(wanted, names, n=1)
    return f"did you mean {names[close[0]]!r}? " if close else ""


def _named(text: str, known: list[Entry]) -> list[Entry]:
    text = text.removesuffix(".gguf")
    return [entry for entry in known if text == entry.name] or [entry for entry in known if text == entry.short_name]


def _beginning(text: str, known: list[Entry]) -> list[Entry]:
    return [entry for entry in known if text and (entry.name.startswith(text) or entry.short_name.startswith(text))]


def _whole(entry: Entry) -> Path:
    if entry.is_complete:
        return entry.path
    raise LibraryError(
        f"{entry.name} is not here whole: its download was not finished",
        hint="the same `prima pull` goes on with it",
    )


def _find_pulled(text: str, folder: Path) -> Path:
    name = read_hub_name(text)
    below = folder / name.repo
    models = candidates(_sizes(below))
    if not models:
        raise LibraryError(f"{name} is not here", hint=f"fetch it with: prima pull {name}")
    try:
        chosen = choose(models, name.file, str(below))
    except LibraryError as error:
        if name.file is None:
            raise
        raise LibraryError(error.message, hint=f"fetch it with: prima pull {name}") from error
    return below / chosen.files[0]


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*.gguf") if path.is_file())  # no folder, pipe, or link to nowhere
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def remove(entry: Entry, folder: Path) -> None:
    """Delete a model's files, and the folders that are empty then. Raises LibraryError where that is not allowed."""
    for path in entry.files:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise LibraryError(f"cannot delete {path}: {error.strerror}", hint="is it in use?") from error
    for parent in _parents(entry.path, folder):
        with suppress(OSError):  # not empty
            os.rmdir(parent)


def _parents(path: Path, folder: Path) -> Iterator[Path]:
    for parent in path.parents:
        if parent == folder:
            return
        yield parent
