"""A hub of one's own: as much of Hugging Face's HTTP as fetching models takes, with the faults of real lines."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

from prima_core.library import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Asked:
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """`repos`: files by repository. The other fields are faults; they may change between requests."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    address: str = ""
    asked: list[Asked] = field(default_factory=list)
    token: str | None = None  # that one must have
    gated: bool = False
    status: dict[str, list[int]] = field(default_factory=dict)  # answers for a path's next requests
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    ignores_ranges: bool = False
    damages: bool = False
    answers_web_pages: bool = False
    told_sizes: dict[str, int] = field(default_factory=dict)  # lies about them
    told_sha256: object = None  # a lie about it
    packing: str | None = None

    def fetched(self, file: str) -> list[str | None]:
        """The ranges that were asked of a file."""
        return [asked.range for asked in self.asked if asked.path.endswith(f"/{file}") and "/cdn/" in asked.path]

    def info(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "sha": COMMIT,
            "siblings": [self._sibling(path, data) for path, data in self.repos[repo].items()],
        }

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.told_sizes.get(path, len(data))
        told: dict[str, Any] = {"rfilename": path, "size": size, "blobId": "b10b"}
        if path.endswith(".gguf") and not path.startswith("small"):
            digest = hashlib.sha256(data).hexdigest() if self.told_sha256 is None else self.told_sha256
            told["lfs"] = {"size": size, "sha256": digest, "pointerSize": 130}
        return told


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing of the user's own settings is read or changed, and nobody waits."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, file in (("HF_TOKEN_PATH", "token"), ("AGENT_HARNESSES_PATH", "agents.json")):
        monkeypatch.setattr(constants, name, str(folder / file))
    monkeypatch.setattr(hub, "WAIT_S", 0.0)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    served_hub = FakeHub()

    class Handler(_Handler):
        served = served_hub

    server = _Server(("127.0.0.1", 0), Handler)
    served_hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield served_hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that goes is none
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # as given


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake, path = self.served, unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        fake.asked.append(Asked(path, self.headers.get("Range"), token))
        for ending, codes in fake.status.items():
            if path.endswith(ending) and codes:
                return self._answer(codes.pop(0), b"no")
        if fake.answers_web_pages:
            return self._answer(200, b"<html>log in to the network</html>", {"Content-Type": "text/html"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._info(match[1], token)
        if match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            return self._resolve(match[1], match[2], token)
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._bytes(fake.repos[match[1]][match[2]])
        return self._answer(404, b"nothing here")

    def _info(self, repo: str, token: str | None) -> None:
        if repo not in self.served.repos or (self.served.token not in (None, token)):
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        return self._answer(200, json.dumps(self.served.info(repo)).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, file: str, token: str | None) -> None:
        if self.served.gated and token is None:
            return self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
        if file not in self.served.repos.get(repo, {}):
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        port = urlsplit(self.served.address).port
        location = f"http://localhost:{port}/cdn/{repo}/{quote(file)}"  # another host
        return self._answer(302, b"", {"Location": location, "X-Repo-Commit": COMMIT})

    def _bytes(self, data: bytes) -> None:
        fake, match = self.served, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        begin = int(match[1]) if match and not fake.ignores_ranges else 0
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        if fake.packing:
            headers["Content-Encoding"] = fake.packing
        body = bytearray(data[begin:])
        if fake.damages and body:
            body[-1] ^= 1
        return self._answer(
            206 if begin else 200, bytes(body), headers, fake.cut_after.pop(0) if fake.cut_after else None
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
