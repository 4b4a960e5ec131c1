"""From a path to a model that can be served: checked, identified, its weights as views into the map."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prima_core.errors import ModelError
from prima_core.interfaces import Slice, Weight
from prima_core.memory.system import System, host
from prima_core.model.fingerprint import ModelId, fingerprint
from prima_core.model.gguf import GGUFFile
from prima_core.model.header import TensorInfo, Value
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD, layer_tensor, split_layer
from prima_core.model.spec import ModelSpec
from prima_core.model.split import model_name
from prima_core.model.visible import visible


class MappedStore:
    """All weights of a model as views into the map: `acquire` costs nothing and leaves reading to the page cache."""

    def __init__(self, file: GGUFFile, spec: ModelSpec, system: System) -> None:
        self._system = system
        self._shared: dict[str, Weight] = {}
        self._layers: list[dict[str, Weight]] = [{} for _ in range(spec.n_layers)]
        for full_name in file.tensors:
            place = split_layer(full_name)
            if place is None:
                self._shared[full_name] = file.view(full_name)
            else:
                self._layers[place[0]][place[1]] = file.view(full_name)

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        return self._layers[layer]

    def release(self, layer: int) -> None:
        """Nothing to let go: the pages belong to the page cache."""

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self._layers[layer]

    def give_back(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            self._system.forget(weight.data)

    def shared(self) -> Mapping[str, Weight]:
        return self._shared

    def is_streamed(self, name: str) -> bool:
        return False

    def blocks(self, name: str) -> Iterator[Weight]:
        yield self._shared[name]

    def close(self) -> None:
        """Forget the views. Idempotent."""
        self._shared = {}
        self._layers = []


@dataclass(frozen=True, slots=True)
class Model:
    """An open, checked model. Close it when no store of it is in use any more."""

    file: GGUFFile
    spec: ModelSpec
    fingerprint: str

    @property
    def path(self) -> Path:
        """The file, or the first part of a split one."""
        return self.file.path

    @property
    def name(self) -> str:
        """What the model is called by its file, as clients, other nodes and terminals can be told it."""
        return visible(model_name(self.path))

    @property
    def id(self) -> ModelId:
        return ModelId(self.fingerprint, self.file.size, self.spec.name)

    def store(self) -> MappedStore:
        return MappedStore(self.file, self.spec, host())

    def check_unchanged(self) -> None:
        """Raise ModelError when the files are not those that were opened, or were written to since."""
        self.file.check_unchanged()

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


ReadSpec = Callable[[Mapping[str, Value], Mapping[str, TensorInfo]], ModelSpec]


def open_file(path: str | os.PathLike[str], read_spec: ReadSpec) -> Model:
    """Open a model with weights whose metadata and tensors `read_spec` accepts: `arch.families.open_model` says whose.

    Raises ModelError, whose `field` names the culprit.
    """
    with ExitStack() as on_error:
        file = on_error.enter_context(GGUFFile.open(path))
        _refuse_other_content(file)
        spec = read_spec(file.metadata, file.tensors)
        model = Model(file, spec, fingerprint(file))
        on_error.pop_all()
    return model


def _refuse_other_content(file: GGUFFile) -> None:
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(
            f"{file.path} holds no model but: {kind!r:.80}", field="general.type", hint="name the model's file"
        )
    if not file.tensors:
        hint = "it serves `prima tokenize` only; use a file with weights"
        raise ModelError(f"{file.path} has no weights, only a vocabulary", field="tensor_count", hint=hint)


def end_tensors(model: ModelSpec, part: Slice) -> tuple[str, ...]:
    """Names of the tensors that the input and the output part of `part` hold, each once."""
    names = [TOKEN_EMBD] if part.has_input else []
    if part.has_output:
        names += [OUTPUT_NORM, TOKEN_EMBD if model.tied_output else OUTPUT]
    return tuple(dict.fromkeys(names))


# ---------------------------------------------------------------- sizes, for planners


def layer_names(file: GGUFFile, layer: int) -> list[str]:
    """Full names of one layer's tensors."""
    prefix = layer_tensor(layer, "")
    return [name for name in file.tensors if name.startswith(prefix)]


def bytes_by_type(file: GGUFFile, names: Iterable[str]) -> dict[str, int]:
    """How many bytes these tensors have in each type, by the type's name."""
    sizes: dict[str, int] = {}
    for info in (file.tensors[name] for name in names):
        sizes[info.type_name] = sizes.get(info.type_name, 0) + info.n_bytes
    return sizes
