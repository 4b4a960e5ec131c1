"""Who may talk to the server: loopback or an API key, no foreign web pages, JSON only, bounded bodies.

A web page that a user visits can make his browser post to 127.0.0.1; the Host, Origin and Content-Type rules are
against that (DNS rebinding and cross-site requests), and need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request as HttpRequest

from prima_core.errors import ConfigError

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_S = 60.0
"""For a body to come whole."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health",)


class Refusal(Exception):
    """Ends a request with this HTTP status."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one server; `api_key` None: loopback only. Raises ConfigError for rules that would not guard."""

    host: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"serving on {self.host} without an API key would let the whole network use this server",
                hint="set PRIMA_API_KEY (or --api-key), or serve on 127.0.0.1",
            )
        if self.api_key is not None and not _can_be_sent(self.api_key):
            raise ConfigError(
                "the API key is empty, or has blanks or letters that no HTTP header carries",
                hint="use ASCII letters, digits and signs",
            )

    def check(self, request: HttpRequest) -> None:
        """Raises Refusal. `OPEN_PATHS` are open to monitors; everything else wants the key when there is one."""
        self._check_host(request)
        _check_origin(request)
        if self.api_key is not None and request.scope["path"] not in OPEN_PATHS:
            _check_key(request, self.api_key)

    def _check_host(self, request: HttpRequest) -> None:
        name = _host_name(request.headers.get("host", ""))
        if self.api_key is None and name not in (*LOCAL_NAMES, self.host):
            raise Refusal(403, f"the Host header names {name!r}, this server is {self.host!r}", "foreign_host")


def _check_origin(request: HttpRequest) -> None:
    """A browser tells whose page it is that asks: it must be ours."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host", ""):
        raise Refusal(403, f"pages of {origin!r} may not use this server", "foreign_origin")


def _check_key(request: HttpRequest, api_key: str) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
        raise Refusal(401, "the API key is missing or wrong (Authorization: Bearer KEY)", "invalid_api_key")


def _can_be_sent(api_key: str) -> bool:
    return api_key != "" and all("!" <= letter <= "~" for letter in api_key)


async def read_json_body(request: HttpRequest) -> bytes:
    """The body. Raises Refusal 415 when it does not claim to be JSON, 413 before more than `MAX_BODY_BYTES` are held,
    408 when it has not come within `BODY_S`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind or 'missing'}, application/json is wanted", "not_json")
    try:
        async with asyncio.timeout(BODY_S):
            return await _bounded_body(request)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_S:.0f} s", "body_too_slow") from None


async def _bounded_body(request: HttpRequest) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", "body_too_large")
    return bytes(body)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(header: str) -> str:
    """`name` of `name:port` and of `[address]:port`."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return header
