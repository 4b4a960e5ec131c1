"""What other programs said about tiny models: read from fixtures/*.json, each a few kilobytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import gguf

from prima_core.testing.tinymodel import TinyModel

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True, slots=True)
class Greedy:
    """llama.cpp's greedy continuation of `prompt_ids` by the model that `model` describes.

    Margins and noise are in units of the largest logit of their step. `margin` is the least distance between the best
    and the second-best token, in llama.cpp and in float32 `transformers`; `noise` is how far these two were apart at
    most (llama.cpp rounds activations to the precision of the weights).
    """

    model: TinyModel
    tensors_sha256: str
    prompt_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    margin: float
    noise: float


@dataclass(frozen=True, slots=True)
class Converted:
    """What llama.cpp's converter made of the same model saved by `transformers`: hashes and metadata."""

    model: TinyModel
    tensors: dict[str, str]
    metadata: dict[str, object]
    rope_freqs: list[float]


def greedy_names() -> list[str]:
    """Names of all greedy fixtures."""
    return sorted(path.stem for path in FIXTURES.glob("greedy-*.json"))


def converted_names() -> list[str]:
    """Names of all fixtures of the converter."""
    return sorted(path.stem for path in FIXTURES.glob("converted-*.json"))


def load_greedy(name: str) -> Greedy:
    """The fixture called `name`."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    return Greedy(
        model=TinyModel(**data["model"]),
        tensors_sha256=data["tensors_sha256"],
        prompt_ids=tuple(data["prompt_ids"]),
        greedy_ids=tuple(data["greedy_ids"]),
        margin=data["margin"],
        noise=data["noise"],
    )


def load_converted(name: str) -> Converted:
    """The fixture called `name`."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    return Converted(TinyModel(**data["model"]), data["tensors"], data["metadata"], data["rope_freqs"])


def tensor_digests(path: Path) -> dict[str, str]:
    """For each tensor of a GGUF file: its type, shape and the start of its bytes' SHA-256, in one line."""
    return {
        tensor.name: f"{tensor.tensor_type.name} {'x'.join(str(n) for n in tensor.shape)} "
        f"{sha256(tensor.data.tobytes()).hexdigest()[:32]}"
        for tensor in gguf.GGUFReader(path).tensors
    }


def tensors_sha256(path: Path) -> str:
    """One digest of all tensors of a GGUF file: equal when names, types, shapes and bytes are."""
    return sha256(json.dumps(tensor_digests(path), sort_keys=True).encode()).hexdigest()


def metadata(path: Path) -> dict[str, object]:
    """The file's keys about the model and its tokenizer; arrays as a digest.

    Without name and file type, and without `add_bos_token` and its like: the converter takes those from what
    `transformers` writes into its own tokenizer files.
    """
    fields = gguf.GGUFReader(path).fields
    return {
        key: _shortened(field.contents())
        for key, field in sorted(fields.items())
        if key == "general.architecture" or not key.startswith(("general.", "GGUF.", "tokenizer.ggml.add_"))
    }


def _shortened(value: object) -> object:
    if not isinstance(value, list):
        return value
    return f"{len(value)} items, {sha256(json.dumps(value).encode()).hexdigest()[:32]}"
