"""The text side of a model: what clients are told of it, and how their conversations become tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prima_core.engine.reasoning import ReasoningStream
from prima_core.model.chat import ChatPrompt, ChatTemplate, Message, encode_chat, n_system_tokens
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.weights import Model


class ModelText:
    """For any thread. `chat_template`: the name of one of the model file's. The model stays the caller's."""

    def __init__(self, model: Model, chat_template: str, context_shift: bool) -> None:
        self.model = model
        self.context_shift = context_shift
        self.tokenizer = Tokenizer.from_metadata(model.file.metadata)
        self._template = ChatTemplate.from_tokenizer(self.tokenizer, chat_template)

    def close_text(self) -> None:
        """End the process that renders templates."""
        self._template.close()

    @property
    def fingerprint(self) -> str:
        """A short name of what makes the answers: another file, another name."""
        return f"fp_{self.model.fingerprint[:12]}"

    @property
    def model_facts(self) -> Mapping[str, int]:
        """Sizes of the model as llama-server tells them: `size` in bytes of its weights."""
        tensors, spec = self.model.file.tensors.values(), self.model.spec
        return {
            "n_vocab": spec.vocab_size,
            "n_ctx_train": spec.context_length,
            "n_embd": spec.d_model,
            "n_params": sum(math.prod(info.shape) for info in tensors),
            "size": sum(info.n_bytes for info in tensors),
        }

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that conversations are rendered with."""
        return self._template.source

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> ChatPrompt:
        """A conversation as the model takes it; `variables` are what chat_template_kwargs are in a request.

        Raises TemplateError when the model's template refuses it or is broken, RequestError for a wrong role or name.
        """
        return encode_chat(self.tokenizer, self._template, messages, variables=variables)

    def reasoning_stream(self, prompt: ChatPrompt) -> ReasoningStream:
        """What cuts the text of the answer to `prompt` into reasoning and content."""
        tags = self.tokenizer.reasoning_tags
        return ReasoningStream(tags, starts_inside=tags is not None and tags.are_open_after(prompt.text))

    def n_keep(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        *,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> int:
        """`Request.n_keep` of a conversation that was encoded to `ids`: the system's messages at its begin.

        0 where there are none, where the template wants more than them, and where the context does not shift.
        """
        if not self.context_shift:
            return 0
        return n_system_tokens(self.tokenizer, self._template, messages, ids, variables)
