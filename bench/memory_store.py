"""Models whose weights are arrays in memory: nothing of their files need be on a disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from prima_core.interfaces import Layers, Slice, Weight
from prima_core.model.names import TOKEN_EMBD
from prima_core.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """`Store` over arrays in memory. Layers share them; what a device copies is nevertheless a copy for each."""

    layers: tuple[Mapping[str, Weight], ...]
    ends: Mapping[str, Weight]

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        return self.layers[layer]

    def release(self, layer: int) -> None: ...

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self.layers[layer]

    def give_back(self, weights: Iterable[Weight]) -> None: ...

    def shared(self) -> Mapping[str, Weight]:
        return self.ends

    def is_streamed(self, name: str) -> bool:
        return False

    def blocks(self, name: str) -> Iterator[Weight]:
        yield self.ends[name]

    def close(self) -> None: ...

    def bytes_of_a_token(self) -> int:
        """What a decode step reads of the weights: all but the token embeddings, of which it reads a row."""
        tensors = [weight for layer in self.layers for weight in layer.values()]
        tensors += [weight for name, weight in self.ends.items() if name != TOKEN_EMBD]
        return sum(weight.data.nbytes for weight in tensors)

    def weights_of_layers(self) -> int:
        """Weights of the matrices that each token of a prompt is multiplied by."""
        shapes = [weight.shape for layer in self.layers for weight in layer.values()]
        return sum(prod(shape) for shape in shapes if len(shape) > 1)


def whole(model: ModelSpec, kv_tokens: int = 0) -> Slice:
    return Slice((Layers(0, model.n_layers),), has_input=True, has_output=True, kv_tokens=kv_tokens)
