"""The shipped model, served as users get it, answers questions that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from prima_core.arch.families import open_model
from prima_core.engine.request import Request
from prima_core.model.tokenizer import Tokenizer
from prima_core.node.head import HeadOptions
from tests.builtin.rewordings import NEEDED_SHARE, Message, load_cases, score
from tests.node.cluster import Cluster
from training.train import GGUF_FILE

LONGEST_ANSWER = 120  # tokens: a story has about ninety


@pytest.fixture(scope="module")
def generate() -> Iterator[Callable[[list[Message]], str]]:
    with open_model(GGUF_FILE) as model, Cluster(model, HeadOptions()) as cluster:
        cluster.until_serving_with("head")
        tokenizer = Tokenizer.from_metadata(model.file.metadata)

        def generate(messages: list[Message]) -> str:
            prompt = cluster.head.encode_chat(messages)
            return tokenizer.decode(cluster.submit(Request(tuple(prompt.ids), LONGEST_ANSWER)).rest())

        yield generate


@pytest.mark.timeout(300)  # 158 answers: six seconds on two idle cores
def test_it_answers_the_held_out_rewordings(generate: Callable[[list[Message]], str]) -> None:
    result = score(load_cases(), generate)

    wrong = "\n".join(f"{case.kind}: {case.ask}\n    {answer}" for case, answer in result.wrong)
    assert result.share >= NEEDED_SHARE, f"{result.n_right} of {result.n_asked} right, wrong are\n{wrong}"


def test_it_ends_its_answers_itself(generate: Callable[[list[Message]], str]) -> None:
    answer = generate([{"role": "user", "content": "Tell me a story about an owl."}])

    assert "owl" in answer
    assert answer.endswith((".", "!", '"'))
