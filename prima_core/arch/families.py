"""The model families that prima runs, and opening a file as one of them. A new family is a file and a line here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from prima_core.arch.family import Family
from prima_core.arch.gemma import GEMMA2, GEMMA3
from prima_core.arch.llama import LLAMA, MISTRAL3
from prima_core.arch.phi3 import PHI3
from prima_core.arch.qwen2 import QWEN2
from prima_core.arch.qwen3 import QWEN3, QWEN3MOE
from prima_core.errors import ModelError
from prima_core.model.header import TensorInfo, Value, printable
from prima_core.model.spec import ModelSpec, read_arch
from prima_core.model.weights import Model, open_file

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (LLAMA, MISTRAL3, QWEN2, QWEN3, QWEN3MOE, GEMMA2, GEMMA3, PHI3)}
)


def family(arch: str) -> Family:
    """Raises ModelError for an architecture that nobody has written yet."""
    if arch not in FAMILIES:
        raise ModelError(
            f"model family '{printable(arch)}' is not supported",
            field="general.architecture",
            hint=f"supported in this version: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[arch]


def read_spec(metadata: Mapping[str, Value], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """The numbers of a model with weights and fitting tensors. Raises ModelError, whose `field` names the culprit."""
    own = family(read_arch(metadata))
    spec = ModelSpec.from_metadata(metadata, tensors, own.defaults)
    own.check(spec, tensors)
    return spec


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a model with weights of a supported family. Raises ModelError, whose `field` names the culprit."""
    return open_file(path, read_spec)
