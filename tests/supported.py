"""The README's table of what is supported, made from the code: `python -m tests.supported` writes it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from starlette.routing import Route

from prima_core.arch.families import FAMILIES
from prima_core.cli import cli
from prima_core.engine.request import Sampling
from prima_core.interfaces import KvType
from prima_core.model.coding import MODELS
from prima_core.model.header import READ_VERSIONS
from prima_core.model.pretokenizers import PRE_TOKENIZERS
from prima_core.model.quant import GGUFType
from prima_core.model.rope import SCALINGS
from prima_core.serve.app import make_app
from prima_core.serve.guard import Guard
from tests.serve.fakes import FakeService

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by `python -m tests.supported` -->\n", "<!-- end -->\n"


def table() -> str:
    """Markdown, a row each."""
    return "| | |\n|---|---|\n" + "".join(f"| {what} | {which} |\n" for what, which in _rows())


def told() -> str:
    """What the README says."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + told() + END, BEGIN + table() + END), encoding="utf-8")


def _rows() -> Iterator[tuple[str, str]]:
    yield "model families (`general.architecture`)", _listed(sorted(FAMILIES))
    yield "RoPE scaling", _listed(["llama3", *SCALINGS])
    yield "GGUF", f"versions {' and '.join(map(str, READ_VERSIONS))}, one file or several (`-00001-of-0000N`)"
    yield "tensor types", _listed(type.name for type in GGUFType)
    yield "tokenizers (`tokenizer.ggml.model`)", _listed(MODELS)
    yield "BPE pre-tokenizers", f"{len(PRE_TOKENIZERS)}: all of llama.cpp's but one for embeddings"
    yield "KV cache", _listed(KvType)
    yield "sampling", _listed(field.name for field in fields(Sampling))
    yield "HTTP", _listed(_paths())
    yield "commands", _listed(sorted(cli.commands))


def _paths() -> Iterator[str]:
    for route in make_app(FakeService(), Guard("127.0.0.1")).routes:
        if isinstance(route, Route):
            yield route.path.replace("{name:path}", "NAME")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    write()
