"""Errors in OpenAI's shape, each with the status that says whose fault it is."""

from __future__ import annotations

import logging

from starlette.requests import ClientDisconnect

from prima_core.errors import Busy, ClusterError, PrimaError, RequestError, TemplateError
from prima_core.serve.guard import Refusal

log = logging.getLogger(__name__)

MAX_TEXT = 4000  # an error may list what there is


class ClientGone(PrimaError):
    """Nobody is there to read the answer."""


def error_fields(error: Exception) -> tuple[int, dict[str, object]]:
    """Status and body: the request's fault is 4xx, the cluster's 503, ours 500."""
    match error:
        case Refusal(status=401):
            return 401, error_body(error.message, "authentication_error", code=error.code)
        case Refusal():
            return error.status, error_body(error.message, "invalid_request_error", code=error.code)
        case RequestError():
            return 400, error_body(str(error), "invalid_request_error", error.param, error.code)
        case TemplateError():
            return 400, error_body(str(error), "invalid_request_error", "messages", "template_failed")
        case ClientGone() | ClientDisconnect():
            return 499, error_body("the client has gone", "invalid_request_error", code="client_gone")
        case Busy():
            return 503, error_body(str(error), "service_unavailable", code="server_busy")
        case ClusterError():
            return 503, error_body(str(error), "service_unavailable", code="cluster_not_ready")
        case PrimaError():
            log.error("a request failed: %s", error)
            return 500, error_body(str(error), "server_error")
        case _:  # the server logs it with its traceback
            return 500, error_body(f"the server failed: {type(error).__name__}", "server_error")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """What a request said may stand in message and `param`: as much of it as helps."""
    return {"error": {"message": _cut(message), "type": kind, "param": param and _cut(param), "code": code}}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\u2026"
