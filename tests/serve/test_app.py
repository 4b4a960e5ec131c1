from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.types import Message, Scope

from prima_core.engine.facts import EngineFacts, SequenceFacts
from prima_core.engine.request import Event, Failed, Finished, FinishReason, Piece, Request, Sampled
from prima_core.errors import Busy, ClusterError, ModelError, PrimaError, RequestError, TemplateError
from prima_core.model.chat import ChatPrompt
from prima_core.model.chat import Message as ChatMessage
from prima_core.model.reasoning import ReasoningTags
from prima_core.serve.app import MAX_TEXTS, make_app
from prima_core.serve.guard import Guard
from tests.serve.fakes import ASK, HELLO, FakeService, client_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 3,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
LOST = ClusterError("node 'desk' was lost", hint="ask again")


def error_of(answer: Any) -> dict[str, Any]:
    """The error, after a look at its shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


def events_of(answer: Any) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ---------------------------------------------------------------- answers


def test_a_chat_is_answered_as_a_whole() -> None:
    service = FakeService()
    answer = client_of(service).post(CHAT, json={**ASK, "seed": 3, "stop": "x"})
    body = answer.json()
    assert answer.status_code == 200
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == USAGE
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("chat.completion", "fake", "fp_1")
    assert service.conversations == [ASK["messages"]]
    assert service.requests == [
        Request(prompt=(0, 1), max_tokens=9, sampling=service.requests[0].sampling, stop=("x",))
    ]


def test_a_chat_is_streamed() -> None:
    chunks = events_of(client_of(FakeService()).post(CHAT, json={**ASK, "stream": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1


def test_a_stream_tells_its_usage_at_the_end_when_asked() -> None:
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events_of(client_of(FakeService()).post(CHAT, json=asked))
    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert [chunk["usage"] for chunk in chunks] == [None] * 5


def test_an_answer_may_be_empty() -> None:
    client = client_of(FakeService([Finished(FinishReason.STOP, "", 2, 0)]))
    assert client.post(CHAT, json=ASK).json()["choices"][0]["message"]["content"] == ""
    assert len(events_of(client.post(CHAT, json={**ASK, "stream": True}))) == 2


class Scripted(FakeService):
    """Each request gets the next script."""

    def __init__(self, *scripts: Sequence[Event]) -> None:
        super().__init__()
        self.scripts = list(scripts)

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        self.script = self.scripts.pop(0)
        return super().submit(request, deliver)


def spoken(text: str, n_cached: int, *events: Event) -> list[Event]:
    return [*events, Finished(FinishReason.LENGTH, text, 2, len(events), n_cached)]


TWO = (spoken("one", 1, HELLO[0]), spoken("two", 2, *HELLO[:2]))


def test_choices_are_requests_of_their_own_and_come_in_order() -> None:
    service = Scripted(*TWO)
    body = client_of(service).post(CHAT, json={**ASK, "n": 2, "seed": 5}).json()
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [
        (0, "Helone"),
        (1, "Heltwo"),
    ]
    assert [request.sampling.seed for request in service.requests] == [5, 6]
    assert service.cancelled == [1, 2]
    told = body["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (2, 3, 5)
    assert told["prompt_tokens_details"] == {"cached_tokens": 1}  # what was computed for one choice was computed


def test_choices_are_streamed_side_by_side() -> None:
    asked = {**ASK, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events_of(client_of(Scripted(*TWO)).post(CHAT, json=asked))
    for index, text in enumerate(("Helone", "Heltwo")):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_ends_all(stream: bool) -> None:
    service = Scripted([], [Failed(LOST)])
    answer = client_of(service).post(CHAT, json={**ASK, "n": 2, "stream": stream})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "cluster_not_ready")
    assert service.cancelled == [1, 2]


def test_logprobs_are_told_with_the_tokens_that_have_no_text_yet() -> None:
    script: list[Event] = [
        Piece("", Sampled(1, -1.0)),
        Piece("w1w2", Sampled(2, -2.0)),
        Finished(FinishReason.STOP, "", 2, 2),
    ]
    service = FakeService(script)
    asked = {**ASK, "logprobs": True}
    whole = client_of(service).post(CHAT, json=asked).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in whole] == ["w1", "w2"]
    chunks = events_of(client_of(service).post(CHAT, json={**asked, "stream": True}))
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry["token"] for one in told if one for entry in one["content"]] == ["w1", "w2"]


THOUGHTS: list[Event] = [
    *(Piece(text, Sampled(token)) for token, text in enumerate(("<think>", "\nhm", ", so</think>", "\n\nyes"), 1)),
    Finished(FinishReason.STOP, ".", 2, 5),
]


def thoughtful() -> FakeService:
    service = FakeService(THOUGHTS)
    service.reasoning_tags = ReasoningTags("<think>", "</think>")
    return service


def test_what_a_model_thinks_is_told_apart_from_what_it_says() -> None:
    body = client_of(thoughtful()).post(CHAT, json=ASK).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, so", "yes.")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_thoughts_are_streamed_first() -> None:
    chunks = events_of(client_of(thoughtful()).post(CHAT, json={**ASK, "stream": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"reasoning_content": ", so"},
        {"content": "yes"},
        {"content": "."},
        {},
    ]


def test_every_token_is_told_its_logprob_once_whatever_becomes_of_its_text() -> None:
    service = thoughtful()
    service.script = [
        Piece(event.text, Sampled(event.token, -1.0)) if isinstance(event, Piece) else event for event in THOUGHTS
    ]
    for asked in (ASK, {**ASK, "stream": True}):
        answer = client_of(service).post(CHAT, json={**asked, "logprobs": True})
        bodies = [answer.json()] if asked is ASK else events_of(answer)
        told = [body["choices"][0]["logprobs"] for body in bodies]
        tokens = [entry["token"] for one in told if one for entry in one["content"]]
        assert tokens == ["w1", "w2", "w3", "w4"]


def test_thoughts_that_never_end_are_no_answer() -> None:
    service = thoughtful()
    service.script = [*THOUGHTS[:2], Finished(FinishReason.LENGTH, "", 2, 2)]
    body = client_of(service).post(CHAT, json=ASK).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_a_completion_is_as_the_model_wrote_it() -> None:
    body = client_of(thoughtful()).post(COMPLETIONS, json={"prompt": "a"}).json()
    assert body["choices"][0]["text"] == "<think>\nhm, so</think>\n\nyes."


def test_variables_of_the_template_are_handed_to_it() -> None:
    service = FakeService()
    client_of(service).post(CHAT, json={**ASK, "chat_template_kwargs": {"enable_thinking": False}})
    assert service.variables == {"enable_thinking": False}


def test_a_completion_is_answered_as_a_whole() -> None:
    service = FakeService()
    body = client_of(service).post(COMPLETIONS, json={"prompt": ["a b", [5]], "max_tokens": 3}).json()
    assert body["object"] == "text_completion"
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        (0, "Hello!", "stop"),
        (1, "Hello!", "stop"),
    ]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 6)
    assert [(request.prompt, request.max_tokens) for request in service.requests] == [((0, 1, 2), 3), ((5,), 3)]


def test_a_completion_is_streamed() -> None:
    chunks = events_of(client_of(FakeService()).post(COMPLETIONS, json={"prompt": "a", "stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hel", "lo", "!", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_tokens_of_a_text_and_back() -> None:
    client = client_of(FakeService())
    assert client.post("/tokenize", json={"content": "a b"}).json() == {"tokens": [1, 2]}
    assert client.post("/detokenize", json={"tokens": [1, 2]}).json() == {"content": "w1w2"}


def test_models_lists_the_one_that_is_served() -> None:
    client = client_of(FakeService())
    meta = {"n_params": 5, "size": 6, "n_ctx": 10}
    model = {"id": "fake", "object": "model", "created": 1_700_000_000, "owned_by": "prima", "meta": meta}
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/fake").json() == model


def test_a_client_that_leaves_v1_out_is_understood() -> None:
    client = client_of(FakeService())
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.post("/chat/completions", json=ASK).json()["object"] == "chat.completion"


def test_properties_and_slots_are_told() -> None:
    client = client_of(FakeService())
    assert client.get("/props").json()["build_info"].startswith("prima-")
    assert [slot["is_processing"] for slot in client.get("/slots").json()] == [False]
    assert client.get("/slots?fail_on_no_slot=1").status_code == 200


def test_that_no_slot_is_free_is_an_error_for_who_asks_for_it() -> None:
    service = FakeService()
    service.facts = EngineFacts((SequenceFacts(1, False, 3, 4, 0, 6, 0, 10),), kv_tokens=10)
    assert client_of(service).get("/slots").status_code == 200
    answer = client_of(service).get("/slots?fail_on_no_slot=1")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "server_busy")


def test_another_model_is_not_found() -> None:
    answer = client_of(FakeService()).get("/v1/models/some/other")
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'some/other'" in error["message"]


def test_health_is_200_when_requests_are_served_and_503_when_not() -> None:
    service = FakeService()
    client = client_of(service)
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok"})
    service.ok = False
    assert (client.get("/health").status_code, client.get("/health").json()) == (503, {"status": "waiting"})


def test_head_is_get_without_a_body() -> None:
    for path in ("/health", "/v1/models"):
        answer = client_of(FakeService()).head(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/", "/v1", "/completions", "/v1/chat/completions/", "/%ff"])
def test_an_unknown_path_is_404_for_every_method(method: str, path: str) -> None:
    answer = client_of(FakeService()).request(method, path, follow_redirects=False)
    assert answer.status_code == 404
    assert method == "HEAD" or error_of(answer)["code"] == "unknown_url"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
def test_a_wrong_method_is_405_and_tells_the_right_one(method: str) -> None:
    answer = client_of(FakeService()).request(method, CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert method == "HEAD" or error_of(answer)["code"] == "method_not_allowed"


def test_what_no_format_can_read_is_400() -> None:
    client = client_of(FakeService())
    answer = client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["type"]) == (400, "invalid_request_error")
    answer = client.post(CHAT, json={**ASK, "store": True})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, "store", "unsupported_parameter")


def test_a_prompt_longer_than_the_context_is_400_with_both_numbers() -> None:
    answer = client_of(FakeService()).post(CHAT, json={"messages": [{"role": "user", "content": "a " * 11}]})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "11 tokens" in error["message"]
    assert "context has 10" in error["message"]


FAULTS = [
    (RequestError("no", param="seed", code="odd", hint="yes"), 400, "invalid_request_error", "seed", "odd"),
    (TemplateError("no", hint="yes"), 400, "invalid_request_error", "messages", "template_failed"),
    (Busy("no", hint="yes"), 503, "service_unavailable", None, "server_busy"),
    (ClusterError("no", hint="yes"), 503, "service_unavailable", None, "cluster_not_ready"),
    (ModelError("no", hint="yes"), 500, "server_error", None, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status", "kind", "param", "code"), FAULTS)
def test_whose_fault_it_is_decides_the_status(
    fault: PrimaError, status: int, kind: str, param: str | None, code: str | None, stream: bool
) -> None:
    answer = client_of(FakeService([Failed(fault)])).post(CHAT, json={**ASK, "stream": stream})
    assert answer.status_code == status
    assert error_of(answer) == {"message": "no (yes)", "type": kind, "param": param, "code": code}
    assert answer.headers.get("retry-after") == ("2" if status == 503 else None)


def test_a_prompt_that_is_none_is_400() -> None:
    answer = client_of(FakeService()).post(COMPLETIONS, json={"prompt": [256]})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")


def test_a_fault_of_the_template_is_the_messages() -> None:
    class Picky(FakeService):
        def encode_chat(
            self, messages: Sequence[ChatMessage], *, variables: Mapping[str, Any] | None = None
        ) -> ChatPrompt:
            raise TemplateError("roles must alternate")

    answer = client_of(Picky()).post(CHAT, json=ASK)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "messages")


def test_an_unforeseen_error_is_a_500_in_the_same_shape() -> None:
    class Broken(FakeService):
        def encode_chat(
            self, messages: Sequence[ChatMessage], *, variables: Mapping[str, Any] | None = None
        ) -> ChatPrompt:
            raise ZeroDivisionError("secret of the house")

    answer = client_of(Broken()).post(CHAT, json=ASK)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert "secret" not in error["message"]


@pytest.mark.parametrize("n_before", [1, 2])
def test_an_error_in_the_middle_of_a_whole_answer_is_an_error_status(n_before: int) -> None:
    answer = client_of(FakeService([*HELLO[:n_before], Failed(LOST)])).post(CHAT, json=ASK)
    assert (answer.status_code, error_of(answer)["message"]) == (503, "node 'desk' was lost (ask again)")


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    answer = client_of(FakeService([*HELLO[:2], Failed(LOST)])).post(CHAT, json={**ASK, "stream": True})
    assert answer.status_code == 200
    *chunks, last = events_of(answer)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "Hel"]
    assert last == {
        "error": {
            "message": "node 'desk' was lost (ask again)",
            "type": "service_unavailable",
            "param": None,
            "code": "cluster_not_ready",
        }
    }


# ---------------------------------------------------------------- clients that go away


class Browser:
    """A client that hangs up when told to: by `leave`, or as soon as it has got a chunk with the text `enough`."""

    def __init__(self, service: FakeService, enough: str = "") -> None:
        self._app = make_app(service, Guard("127.0.0.1"))
        self._enough = enough.encode()
        self._gone = asyncio.Event()
        self.body = b""
        self.statuses: list[int] = []

    def leave(self) -> None:
        self._gone.set()

    async def post(self, **fields: object) -> None:
        """Ends when the server has done with the request."""
        sent = iter([{"type": "http.request", "body": json.dumps({**ASK, **fields}).encode()}])
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope: Scope = {
            "type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip

        async def receive() -> Message:
            if (message := next(sent, None)) is None:
                await self._gone.wait()
            return message or {"type": "http.disconnect"}

        await asyncio.wait_for(self._app(scope, receive, self._send), timeout=10)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
        self.body += message.get("body", b"")
        if self._enough and self._enough in self.body:
            self.leave()


class Endless(FakeService):
    """Says what the script says and then nothing more; calls `asked` when it has a request."""

    def __init__(self, *script: Event, asked: Callable[[], None] = lambda: None) -> None:
        super().__init__(script)
        self.asked = asked

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        number = super().submit(request, deliver)
        self.asked()
        return number


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_leaving_while_an_answer_is_awaited_stops_its_generation(n_before: int, stream: bool) -> None:
    async def go() -> list[int]:
        service = Endless(*HELLO[:n_before])
        browser = Browser(service)
        service.asked = browser.leave
        await browser.post(stream=stream)
        await asyncio.sleep(0)  # one turn of the loop, in which the cancelled task ends
        return list(service.cancelled)  # before the end of the loop ends everything

    assert asyncio.run(go()) == [1]


def test_leaving_in_the_middle_of_a_stream_stops_the_generation() -> None:
    async def go() -> tuple[list[int], Browser]:
        service = Endless(*HELLO[:3])
        browser = Browser(service, enough='"lo"')
        await browser.post(stream=True)
        return list(service.cancelled), browser

    cancelled, browser = asyncio.run(go())
    assert cancelled == [1]
    assert browser.statuses == [200]
    assert b"[DONE]" not in browser.body


def test_a_stream_that_cannot_even_begin_stops_the_generation() -> None:
    class Deaf(Browser):
        async def _send(self, message: Message) -> None:
            raise OSError("nobody listens")

    async def go() -> list[int]:
        service = Endless(*HELLO[:1])
        with pytest.raises(OSError, match="nobody listens"):
            await Deaf(service).post(stream=True)
        return list(service.cancelled)

    assert asyncio.run(go()) == [1]


def test_a_client_that_leaves_while_it_sends_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> FakeService:
        service = FakeService()
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            assert message.get("status") != 500

        await make_app(service, Guard("127.0.0.1"))(scope, receive, send)
        return service

    assert asyncio.run(go()).requests == []
    assert caplog.records == []


def test_a_finished_request_has_nothing_left_to_stop() -> None:
    service = FakeService()
    client_of(service).post(CHAT, json={**ASK, "stream": True})
    client_of(service).post(CHAT, json=ASK)
    assert len(service.requests) == 2
    assert service.cancelled == [1, 2]  # said for certainty: cancelling what has ended does nothing


def test_events_that_come_after_the_server_has_gone_do_no_harm() -> None:
    late: list[Callable[[Event], None]] = []

    class Late(Endless):
        def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
            late.append(deliver)
            return super().submit(request, deliver)

    async def go() -> None:
        service = Late()
        browser = Browser(service)
        service.asked = browser.leave
        await browser.post()

    asyncio.run(go())
    late[0](Failed(LOST))


# ---------------------------------------------------------------- bounds


def test_an_error_tells_no_more_than_helps_of_what_a_request_said() -> None:
    answer = client_of(FakeService()).post(CHAT, json={**ASK, "x" * 100_000: 1})
    assert answer.status_code == 400
    assert "xxx" in error_of(answer)["message"]
    assert len(answer.content) < 10_000


def test_only_a_few_texts_are_read_at_a_time() -> None:
    """Each may take a hundred times its own size."""

    class Slow(FakeService):
        reading, most, lock, full = 0, 0, threading.Lock(), threading.Event()

        def encode_chat(
            self,
            messages: Sequence[ChatMessage],
            *,
            variables: Mapping[str, Any] | None = None,  # Any: JSON
        ) -> ChatPrompt:
            with self.lock:
                self.reading += 1
                self.most = max(self.most, self.reading)
            if self.most > MAX_TEXTS:
                self.full.set()
            self.full.wait(0.05)
            with self.lock:
                self.reading -= 1
            return super().encode_chat(messages, variables=variables)

    service = Slow()
    with client_of(service) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post(CHAT, json=ASK), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert service.most == MAX_TEXTS
