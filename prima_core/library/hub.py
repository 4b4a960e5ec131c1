"""Fetch models from a Hugging Face hub into the models folder, as OWNER/REPO/FILE.

Not into the hub's own cache: there files have no names that a user could find, give to other programs or delete, and
links that Windows may refuse. And not by `hf_hub_download`: since version 2 it begins anew after an interruption.
So the hub's library says what there is and who may have it, and the bytes come by ranges into `FILE.SHA256.part`,
which gets its name when its checksum is right. huggingface_hub is imported when something is fetched.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.errors import LibraryError
from prima_core.library.candidates import Candidate, HubName, candidates, choose, readable
from prima_core.library.folder import UNFINISHED

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 20.0
TRIES = 5
"""So often is a download continued that brings nothing new, after ever longer waits."""
WAIT_S = 1.0
_CHUNK_BYTES = 1 << 20
_PASSING = (408, 429, 500, 502, 503, 504)

Progress = Callable[[str, int, int], None]
"""Called again and again with what is done (`fetching FILE`, `checking FILE`), and bytes done of all."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; `sha256` is known of those in large file storage, as models are."""

    path: str
    n_bytes: int
    sha256: str | None

    @property
    def part_suffix(self) -> str:
        return f".{(self.sha256 or 'unchecked')[:8]}{UNFINISHED}"


class Hub:
    """`endpoint` None: the public hub. Raises LibraryError where huggingface_hub is not installed."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._api = _make_api(self.endpoint)

    def pull(self, name: HubName, folder: Path, progress: Progress) -> Candidate:
        """Fetch the model with all its parts below `folder`/OWNER/REPO and check it; what is there already stays.

        Raises LibraryError: no such repository or file, several, no access, no network, no room, damaged.
        """
        with self._explained(name.repo):
            commit, files = self._files(name.repo)
        model = choose(candidates({path: file.n_bytes for path, file in files.items()}), name.file, name.repo)
        below = folder / name.repo
        with _explained_disk(below), _alone_in(folder):
            wanted = [files[path] for path in model.files]
            _refuse_huge(name.repo, wanted, below)
            _check_room(below, wanted)
            for file in wanted:
                self._fetch(name.repo, commit, file, below / file.path, progress)
        return model

    def _files(self, repo: str) -> tuple[str, dict[str, RemoteFile]]:
        """The newest commit and its files."""
        try:
            info = self._api.model_info(repo, files_metadata=True, timeout=TIMEOUT_S)
            files = dict(_told(file) for file in info.siblings or () if file.size is not None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LibraryError(
                f"{self.endpoint} does not answer as a hub: {error}", hint="check HF_ENDPOINT and the network's proxy"
            ) from error
        return info.sha or "main", files

    def _fetch(self, repo: str, commit: str, file: RemoteFile, target: Path, progress: Progress) -> None:
        if target.is_file() and target.stat().st_size == file.n_bytes and _is_intact(target, file, progress):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + file.part_suffix)
        with self._explained(repo):
            self._download(repo, commit, file, part, progress)
        if not _is_intact(part, file, progress):
            part.unlink()
            raise LibraryError(
                f"{file.path} came damaged: its SHA-256 is not {file.sha256}", hint="fetch it again; nothing was kept"
            )
        os.replace(part, target)
        for older in target.parent.glob(f"{glob.escape(target.name)}.*{UNFINISHED}"):
            older.unlink()

    def _download(self, repo: str, commit: str, file: RemoteFile, part: Path, progress: Progress) -> None:
        """Bring the part file to its full length, from wherever it is, trying again while the line is bad."""
        import httpx2
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        url = hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
        part.touch()
        tries, most = 0, part.stat().st_size
        while part.stat().st_size != file.n_bytes:
            error: Exception = LibraryError(f"{self.endpoint} sends no more of {file.path}", hint="try again later")
            try:
                self._append(url, file, part, progress)
            except httpx2.TransportError as broken:
                error = broken
            except HfHubHTTPError as refused:
                if refused.response.status_code not in _PASSING:
                    raise
                error = refused
            if (now := part.stat().st_size) > most:
                tries, most = 0, now
                continue
            tries += 1
            if tries == TRIES:
                raise error
            time.sleep(WAIT_S * 2 ** (tries - 1))

    def _append(self, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
        """Ask for what is missing and write it as it comes."""
        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, exported lazily

        done = part.stat().st_size
        headers = {**build_hf_headers(library_name="prima"), "Accept-Encoding": "identity"}
        if 0 < done < file.n_bytes:
            headers["Range"] = f"bytes={done}-"
        session = get_session()
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response, part.open("r+b") as out:
            hf_raise_for_status(response)
            _refuse_packed(file, response)
            done = done if _continues(response, done) else 0
            out.seek(done)
            out.truncate()
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                done += out.write(chunk)
                if done > file.n_bytes:
                    raise LibraryError(f"{file.path} is longer than the {file.n_bytes} bytes that the hub told of it")
                progress(f"fetching {file.path}", done, file.n_bytes)

    @contextmanager
    def _explained(self, repo: str) -> Iterator[None]:
        """Errors of the hub's library become ours: what happened, and what to do."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise LibraryError(
                "HF_HUB_OFFLINE is set, nothing is fetched", hint="unset it; `prima ls` shows the models that are here"
            ) from error
        except errors.GatedRepoError as error:
            raise LibraryError(
                f"{repo} is for those who accept its terms",
                hint=f"accept them at {self.endpoint}/{repo} and set HF_TOKEN to a token of that account",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise LibraryError(
                f"there is no repository {repo} at {self.endpoint}, or it is private",
                hint="check the name; for a private one set HF_TOKEN",
            ) from error
        except errors.HfHubHTTPError as error:
            raise _refused(self.endpoint, repo, error.response.status_code) from error
        except errors.HFValidationError as error:
            raise LibraryError(f"{repo!r} cannot be a repository: {error}", hint="write hf:OWNER/REPO") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise LibraryError(
                f"cannot reach {self.endpoint}: {error or type(error).__name__}",
                hint="check the network (and HF_ENDPOINT); the same command goes on where this one ended",
            ) from error


def _make_api(endpoint: str) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise LibraryError(
            f"fetching models needs huggingface_hub: {error}", hint='pip install "prima-llm[hub]"'
        ) from error
    return HfApi(endpoint, library_name="prima")


def _refused(endpoint: str, repo: str, status: int) -> LibraryError:
    match status:
        case 401:
            return LibraryError(f"{endpoint} does not know this token (401)", hint="check HF_TOKEN")
        case 403:
            return LibraryError(
                f"{endpoint} lets this account not read {repo} (403)", hint="check what HF_TOKEN's token may do"
            )
        case 404:
            return LibraryError(f"the file is not in {repo} any more (404)", hint="run the command again")
        case 429:
            return LibraryError(f"{endpoint} wants fewer requests (429)", hint="wait some minutes, or set HF_TOKEN")
    return LibraryError(f"{endpoint} answers with status {status}", hint="try again later")


def _refuse_huge(repo: str, files: list[RemoteFile], below: Path) -> None:
    """The public hub gives larger files only by a protocol of its own."""
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    most = readable(MAX_HTTP_DOWNLOAD_SIZE)
    for file in files:
        if file.n_bytes > MAX_HTTP_DOWNLOAD_SIZE:
            raise LibraryError(
                f"{file.path} has {readable(file.n_bytes)}, and hubs give at most {most} this way",
                hint=f"fetch it with: hf download {repo} {file.path} --local-dir {below}",
            )


def _told(file: RepoSibling) -> tuple[str, RemoteFile]:
    """A file as the hub tells of it; the hub's library looks at no types. The checksum becomes a part of a file's name.

    Raises ValueError.
    """
    path, size, sha256 = file.rfilename, file.size, file.lfs.sha256 if file.lfs else None
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise ValueError(f"{path!r:.80} with {size!r:.80} bytes is no file")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r:.80} is no SHA-256")
    return path, RemoteFile(path, size, sha256)


def _refuse_packed(file: RemoteFile, response: Response) -> None:
    """What was not asked for: some bytes could unpack to any number of them, and ranges would be of other bytes."""
    packing = response.headers.get("Content-Encoding", "identity")
    if packing != "identity":
        message = f"{file.path} comes packed ({packing!r:.80}), which was not asked for"
        raise LibraryError(message, hint="check HF_ENDPOINT and the network's proxy")


def _continues(response: Response, done: int) -> bool:
    """Whether an answer begins where we asked for, and not at the file's start."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and found is not None and int(found[1]) == done


def _is_intact(path: Path, file: RemoteFile, progress: Progress) -> bool:
    if file.sha256 is None:
        return True
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(f"checking {file.path}", done, file.n_bytes)
    return digest.hexdigest() == file.sha256


# ---------------------------------------------------------------- the disk


def _check_room(below: Path, files: list[RemoteFile]) -> None:
    """Raises LibraryError where the disk has no room for what is still to be fetched."""
    missing = sum(max(0, file.n_bytes - _have(below / file.path, file)) for file in files)
    place = next(folder for folder in (below, *below.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise _no_room(below, f"{readable(missing)} are to be fetched, {readable(free)} are free")


def _have(target: Path, file: RemoteFile) -> int:
    part = target.with_name(target.name + file.part_suffix)
    return max((path.stat().st_size for path in (target, part) if path.exists()), default=0)


def _no_room(below: Path, why: str) -> LibraryError:
    return LibraryError(
        f"there is no room in {below}: {why}",
        hint="make room (`prima ls`, `prima rm`) or take another folder (--models); what was fetched is kept",
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two that write the same part file would spoil it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise LibraryError(f"another `prima pull` is writing to {folder}", hint="wait until it is done") from error


@contextmanager
def _explained_disk(below: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(below, "the disk is full") from error
        raise LibraryError(f"cannot write to {below}: {error}", hint="check the folder (--models)") from error
