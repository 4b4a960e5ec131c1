"""Endpoints in the form of llama.cpp's server, for the tools that know it: tokens, properties, slots. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from prima_core.engine.facts import EngineFacts, SequenceFacts
from prima_core.engine.request import Sampling
from prima_core.errors import RequestError
from prima_core.serve.bodies import fields_of, to_struct
from prima_core.serve.texts import Texts

MAX_TEXT_BYTES = 8 * 1024 * 1024
MAX_PIECES = 2**18
"""Answers may be many times as large as what asks for them."""


class TokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /tokenize. Special tokens are read out of the text unless `parse_special` is false."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0)]]


def tokenize(data: bytes, texts: Texts) -> dict[str, object]:
    """Raises RequestError."""
    told = {name: value for name, value in fields_of(data).items() if value is not None}
    body = to_struct(told, TokenizeBody)
    ids = texts.encode(body.content, add_special=body.add_special, parse_special=body.parse_special)
    if not body.with_pieces:
        return {"tokens": ids}
    if len(ids) > MAX_PIECES:
        raise RequestError(f"{len(ids)} tokens are more than {MAX_PIECES} with pieces", param="with_pieces")
    return {"tokens": [{"id": id, "piece": _piece(texts.token_bytes(id))} for id in ids]}


def _piece(data: bytes) -> str | list[int]:
    """Text, or the bytes of a token that holds only a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def detokenize(data: bytes, texts: Texts) -> dict[str, object]:
    """Special tokens are spelled out. Raises RequestError, also for an id that is none."""
    body = to_struct(fields_of(data), DetokenizeBody)
    if body.tokens and max(body.tokens) >= texts.vocab_size:
        raise RequestError(f"token id {max(body.tokens)} is not in [0, {texts.vocab_size})", param="tokens")
    n_bytes = sum(len(texts.token_bytes(token)) for token in body.tokens)
    if n_bytes > MAX_TEXT_BYTES:
        raise RequestError(f"a text of {n_bytes} bytes is more than {MAX_TEXT_BYTES}", param="tokens")
    return {"content": texts.decode(body.tokens, skip_special=False)}


# ---------------------------------------------------------------- what is served


class Served(Protocol):
    """What is told of the model and the engine: see `prima_core.node.head.Head`."""

    context_length: int
    sampling: Sampling
    model_file: str

    @property
    def chat_template(self) -> str | None: ...
    @property
    def tokenizer(self) -> Texts: ...

    def engine_facts(self) -> EngineFacts: ...


def props(served: Served, build: str) -> dict[str, object]:
    """Body of GET /props. Of the model's place only the file's name is told; what is not there is left out."""
    texts = served.tokenizer
    told = {
        "chat_template": served.chat_template,
        "bos_token": _spelling(texts.bos_id, texts),
        "eos_token": _spelling(texts.eos_id, texts),
    }
    return {
        "default_generation_settings": {"n_ctx": served.context_length, "params": _params(served.sampling)},
        "total_slots": n_slots(served),
        "model_path": served.model_file,
        "modalities": {"vision": False, "audio": False},
        **{name: text for name, text in told.items() if text is not None},
        "build_info": build,
    }


def _spelling(id: int | None, texts: Texts) -> str | None:
    return None if id is None else texts.decode([id], skip_special=False)


def _params(sampling: Sampling) -> dict[str, object]:
    """llama-server's names. A seed of 2**32 - 1 and a length of -1 stand there for a new one, and for no limit."""
    return {
        "n_predict": -1,
        "max_tokens": -1,
        "seed": 2**32 - 1,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.repetition_window,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": [],
        "ignore_eos": False,
        "n_probs": 0,
    }


def n_slots(served: Served) -> int:
    """How many requests that fill the context can run at a time; of shorter ones more can."""
    return max(1, served.engine_facts().kv_tokens // served.context_length)


def slots(served: Served) -> list[dict[str, object]]:
    """Body of GET /slots: every running request, and idle ones up to the number of `n_slots`. No text is told."""
    running = served.engine_facts().running
    idle = range(len(running), n_slots(served))
    made = [_slot(index, served.context_length, _busy(facts)) for index, facts in enumerate(running)]
    return made + [_slot(index, served.context_length, {"is_processing": False}) for index in idle]


def _slot(index: int, context_length: int, rest: Mapping[str, object]) -> dict[str, object]:
    return {"id": index, "n_ctx": context_length, "speculative": False, **rest}


def _busy(facts: SequenceFacts) -> dict[str, object]:
    n_left = max(0, facts.capacity - facts.n_prompt - facts.n_generated + 1)  # the last token needs no KV
    return {
        "is_processing": True,
        "id_task": facts.number,
        "n_prompt_tokens": facts.n_prompt,
        "n_prompt_tokens_processed": min(facts.n_computed, facts.n_prompt) - facts.n_cached,
        "n_prompt_tokens_cache": facts.n_cached,
        "next_token": [{"has_next_token": True, "n_remain": n_left, "n_decoded": facts.n_generated}],
    }
