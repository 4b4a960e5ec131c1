from __future__ import annotations

import asyncio
import hmac
import json

import pytest
from starlette.requests import Request
from starlette.types import Message

from prima_core.errors import ConfigError
from prima_core.serve import guard
from prima_core.serve.guard import Guard, Refusal, is_loopback
from tests.serve.fakes import ASK, FakeService, client_of

KEY = "s3cret"


def request(path: str = "/v1/models", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": raw})


def refusal(guard: Guard, request: Request) -> tuple[int, str] | None:
    try:
        guard.check(request)
    except Refusal as refusal:
        return refusal.status, refusal.code
    return None


# ---------------------------------------------------------------- where to serve


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "desk.local", "localhost.evil.com", ""])
def test_another_interface_than_loopback_wants_an_api_key(host: str) -> None:
    with pytest.raises(ConfigError, match="without an API key") as error:
        Guard(host)
    assert "PRIMA_API_KEY" in error.value.hint
    Guard(host, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert refusal(Guard(host), request(host="localhost:7746")) is None


@pytest.mark.parametrize("key", ["", " ", "two words", "new\nline", "schlüssel", "\udcff"])
def test_a_key_that_no_client_could_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        Guard("0.0.0.0", key)


# ---------------------------------------------------------------- Host and Origin


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7746", "localhost:1", "LOCALHOST", "[::1]:7746", "[::1]"])
def test_local_names_are_taken(host: str) -> None:
    assert refusal(Guard("127.0.0.1"), request(host=host)) is None


@pytest.mark.parametrize("host", ["evil.com", "evil.com:7746", "localhost.evil.com", "[::1", "", "\xff", "192.168.1.5"])
def test_a_name_that_leads_here_by_a_trick_is_refused(host: str) -> None:
    assert refusal(Guard("127.0.0.1"), request(host=host)) == (403, "foreign_host")


def test_a_request_without_host_is_refused() -> None:
    assert refusal(Guard("127.0.0.1"), request()) == (403, "foreign_host")


def test_with_a_key_any_name_leads_here() -> None:
    assert refusal(Guard("0.0.0.0", KEY), request(host="desk.local", authorization=f"Bearer {KEY}")) is None


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "http://[", "http://127.0.0.1:1", "file://", ""])
def test_pages_of_others_are_refused(origin: str) -> None:
    asked = request(host="127.0.0.1:7746", origin=origin, authorization=f"Bearer {KEY}")
    assert refusal(Guard("127.0.0.1"), asked) == (403, "foreign_origin")
    assert refusal(Guard("127.0.0.1", KEY), asked) == (403, "foreign_origin")


def test_our_own_page_may_ask() -> None:
    asked = request(host="127.0.0.1:7746", origin="http://127.0.0.1:7746")
    assert refusal(Guard("127.0.0.1"), asked) is None


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"Bearer  {KEY} "])
def test_the_right_key_opens(header: str) -> None:
    assert refusal(Guard("0.0.0.0", KEY), request(host="x", authorization=header)) is None


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"]
)
def test_a_wrong_key_is_refused(header: str) -> None:
    assert refusal(Guard("0.0.0.0", KEY), request(host="x", authorization=header)) == (401, "invalid_api_key")


def test_no_key_is_refused() -> None:
    assert refusal(Guard("0.0.0.0", KEY), request(host="x")) == (401, "invalid_api_key")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return True

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert refusal(Guard("0.0.0.0", KEY), request(host="x", authorization="Bearer guess")) is None
    assert compared == [(b"guess", KEY.encode())]


def test_health_is_open_to_monitors() -> None:
    assert refusal(Guard("0.0.0.0", KEY), request("/health", host="x")) is None


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "/health?"])
def test_a_host_header_with_a_path_in_it_does_not_open_other_paths(host: str) -> None:
    assert refusal(Guard("0.0.0.0", KEY), request(host=host)) == (401, "invalid_api_key")


# ---------------------------------------------------------------- bodies


def test_the_guard_is_asked_before_anything_else() -> None:
    client = client_of(FakeService(), Guard("0.0.0.0", KEY))
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/nothing"),
        ("PUT", "/health/"),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_what_a_web_form_can_send_is_not_json(kind: str) -> None:
    service = FakeService()
    answer = client_of(service).post("/v1/chat/completions", content=b"{}", headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_may_tell_its_charset(kind: str) -> None:
    body = json.dumps(ASK).encode()
    answer = client_of(FakeService()).post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 200


def test_a_body_without_end_is_refused_when_the_limit_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    received: list[int] = []

    async def receive() -> Message:
        received.append(100)
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    headers = [(b"content-type", b"application/json")]
    with pytest.raises(Refusal, match="larger than 1000 bytes") as refused:
        asyncio.run(guard.read_json_body(Request({"type": "http", "headers": headers}, receive)))
    assert refused.value.status == 413
    assert sum(received) == 1100


def test_a_body_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.01)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    headers = [(b"content-type", b"application/json")]
    with pytest.raises(Refusal, match="did not come") as refused:
        asyncio.run(guard.read_json_body(Request({"type": "http", "headers": headers}, receive)))
    assert refused.value.status == 408


def test_a_body_may_have_the_size_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(ASK).encode()
    headers = {"Content-Type": "application/json"}
    statuses = []
    for limit in (len(body), len(body) - 1):
        monkeypatch.setattr(guard, "MAX_BODY_BYTES", limit)
        answer = client_of(FakeService()).post("/v1/chat/completions", content=body, headers=headers)
        statuses.append(answer.status_code)
    assert statuses == [200, 413]
