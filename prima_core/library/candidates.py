"""Which of many files are models, and which of those somebody means: for a hub's repository and for a folder alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from prima_core.errors import LibraryError
from prima_core.model.split import all_parts, count_by_name, model_name, part_number

PREFERRED = "Q4_K_M"  # as llama.cpp's `-hf` prefers it
_NO_MODELS = ("mmproj", "imatrix")  # what lies beside models in many repositories

HUB_PREFIX = "hf:"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PIECE = re.compile(r"[^\\/:*?\"<>|]{1,255}")


@dataclass(frozen=True, slots=True)
class HubName:
    """`hf:OWNER/REPO[:FILE]`; FILE is a file's path, or a type of quantisation like Q8_0."""

    repo: str
    file: str | None

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repo}" + (f":{self.file}" if self.file else "")


def read_hub_name(text: str) -> HubName:
    """Raises LibraryError for what is no such name."""
    repo, _, file = text.removeprefix(HUB_PREFIX).partition(":")
    if not text.startswith(HUB_PREFIX) or not _REPOSITORY.fullmatch(repo) or ".." in repo:
        raise LibraryError(
            f"{text!r} names no model on a hub",
            hint="write hf:OWNER/REPO, or hf:OWNER/REPO:FILE with a file's name or a type like Q8_0",
        )
    return HubName(repo, file or None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model among files: the paths of its parts, in order, and their bytes together."""

    files: tuple[str, ...]
    n_bytes: int

    @property
    def name(self) -> str:
        """Its path without part number and ending."""
        first = PurePosixPath(self.files[0])
        return str(first.with_name(model_name(first)))


def candidates(sizes: Mapping[str, int]) -> list[Candidate]:
    """The models among files of these sizes, parts put together; a model that lacks parts is none."""
    found = []
    for text in sorted(sizes):
        path = PurePosixPath(text)
        if path.suffix == ".gguf" and part_number(path) <= 1 and is_harmless(text):
            files = tuple(map(str, all_parts(path))) if count_by_name(path) <= len(sizes) else ()
            if files and all(file in sizes for file in files):
                found.append(Candidate(files, sum(sizes[file] for file in files)))
    return found


def is_harmless(path: str) -> bool:
    """Whether a relative path that a stranger gave stays below the folder that it is put into, on every system, and
    shows on a terminal as what it is."""
    return path.isprintable() and all(map(_is_harmless_piece, path.split("/")))


def _is_harmless_piece(piece: str) -> bool:
    return _PIECE.fullmatch(piece) is not None and not piece.startswith(".") and piece[-1] not in ". "


def choose(models: Sequence[Candidate], wanted: str | None, place: str) -> Candidate:
    """The model that `wanted` means: a file's path, or a type of quantisation; without it the only one, or Q4_K_M.

    Raises LibraryError that lists what there is.
    """
    if wanted is not None:
        matching = [model for model in models if _is_named(model, wanted)] or _of_type(models, wanted)
    else:
        plain = [model for model in models if not PurePosixPath(model.name).name.startswith(_NO_MODELS)]
        matching = plain if len(plain) == 1 else _of_type(plain, PREFERRED)
    if len(matching) == 1:
        return matching[0]
    if not models:
        raise LibraryError(f"there is no GGUF file in {place}", hint="look for the model's repository with GGUF files")
    asked = repr(wanted) if wanted else f"{PREFERRED}, the default"
    found = f"has {len(matching)} models" if matching else "has no model"
    raise LibraryError(
        f"{place} {found} for {asked}; it has:\n{listing(matching or models)}", hint="say which: hf:OWNER/REPO:FILE"
    )


def _is_named(model: Candidate, wanted: str) -> bool:
    paths = (model.name, *model.files)
    return wanted in paths or wanted in (PurePosixPath(path).name for path in paths)


def _of_type(models: Iterable[Candidate], type: str) -> list[Candidate]:
    """Those with that type in their name, as a word: Q4_K is not in X-Q4_K_M, F16 not in X-BF16."""
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(type)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return [model for model in models if word.search(PurePosixPath(model.name).name)]


def listing(models: Iterable[Candidate]) -> str:
    return "\n".join(f"  {readable(model.n_bytes):>9}  {model.name}" for model in models)


def readable(n_bytes: int) -> str:
    """`4.92 GB`, `0.3 MB`."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
