"""The process in which chat templates run: they come out of downloaded files, so none runs where the server does.

Started by `chat_process.py`; imports nothing but the standard library and jinja2. Frames on both pipes: four bytes of
length, then the payload. In: JSON, the first time what to set up, then requests. Out: one letter (`Reply`) and UTF-8.
It ends when its standard input does.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from jinja2 import Template

LENGTH = struct.Struct("<I")
MAX_REQUEST_BYTES = 16 * 1024 * 1024
MAX_TEXT_CHARACTERS = 8 * 1024 * 1024
MAX_REPLY_BYTES = 4 * MAX_TEXT_CHARACTERS + 1
_MAX_REASON_CHARACTERS = 1000

Request = dict[str, Any]
"""JSON from our own process: {source, bos, eos, memory_bytes}, then {limit_s, variables}. Any: used as it comes."""


class Reply:
    """First letter of an answer: the rendered text follows, or why there is none."""

    READY = b"r"
    TEXT = b"t"
    REFUSED = b"x"  # the template called raise_exception
    INVALID = b"i"  # not Jinja
    FAILED = b"f"
    MEMORY = b"m"
    TOO_LONG = b"l"


class _TooLongError(Exception):
    """The template wrote more than MAX_TEXT_CHARACTERS."""


def main() -> None:
    """Set limits, say that we are ready, then answer requests until the pipe ends or memory has run out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; it is our owner who ends us
    setup = _receive(sys.stdin.buffer)
    if setup is None:
        return
    render = _renderer(setup)
    _limit_memory(setup["memory_bytes"])
    _send(sys.stdout.buffer, Reply.READY, "")
    while (request := _receive(sys.stdin.buffer)) is not None:
        # Should our owner be killed, nobody else would end a template that never ends.
        faulthandler.dump_traceback_later(request["limit_s"], exit=True)
        letter, text = _answer(render, request)
        faulthandler.cancel_dump_traceback_later()
        _send(sys.stdout.buffer, letter, text)
        if letter == Reply.MEMORY:
            return  # what is left of the heap may be in pieces


def _receive(pipe: BinaryIO) -> Request | None:
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    request: Request = json.loads(pipe.read(*LENGTH.unpack(head)))
    return request


def _send(pipe: BinaryIO, letter: bytes, text: str) -> None:
    payload = letter + text.encode("utf-8", "surrogatepass")
    pipe.write(LENGTH.pack(len(payload)) + payload)
    pipe.flush()


def _renderer(setup: Request) -> Callable[[Request], str]:
    from prima_core.model.chat_sandbox import environment

    env = environment()
    template: Template | None = None

    def render(request: Request) -> str:
        nonlocal template  # compiled at the first request, under its time limit: constants are folded by compiling
        template = template or env.from_string(setup["source"])
        tokens = {"bos_token": setup["bos"], "eos_token": setup["eos"]}
        return _joined(template.generate(request["variables"] | tokens))

    return render


def _answer(render: Callable[[Request], str], request: Request) -> tuple[bytes, str]:
    from jinja2 import TemplateSyntaxError

    from prima_core.model.chat_sandbox import RefusedError

    try:
        return Reply.TEXT, render(request)
    except RefusedError as error:
        return Reply.REFUSED, str(error)[:_MAX_REASON_CHARACTERS]
    except _TooLongError:
        return Reply.TOO_LONG, ""
    except MemoryError:
        return Reply.MEMORY, ""
    except TemplateSyntaxError as error:
        return Reply.INVALID, f"line {error.lineno}: {error.message}"[:_MAX_REASON_CHARACTERS]
    except Exception as error:  # noqa: BLE001  # a border: whatever a foreign template does is an answer
        return Reply.FAILED, f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]


def _joined(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    left = MAX_TEXT_CHARACTERS
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise _TooLongError
        kept.append(piece)
    return "".join(kept)


def _limit_memory(n_bytes: int) -> None:
    """Windows has no such limit; there the time limit alone holds."""
    if sys.platform == "win32":
        return
    import resource

    for limit, most in ((resource.RLIMIT_AS, n_bytes), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(limit, (most, most))
        except (OSError, ValueError):  # macOS refuses RLIMIT_AS
            continue


if __name__ == "__main__":
    main()
