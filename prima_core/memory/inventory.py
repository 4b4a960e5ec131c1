"""What a node has of a model: which weights stay in memory, which are streamed, and where in the files these lie."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.errors import ModelError
from prima_core.interfaces import Layers, Weight
from prima_core.memory.reader import JOIN_S, Unit
from prima_core.memory.residency import Streamed, holding, part_of, resized
from prima_core.model.gguf import GGUFFile
from prima_core.model.names import TOKEN_EMBD, split_layer
from prima_core.model.spec import ModelSpec
from prima_core.model.weights import MappedStore

if TYPE_CHECKING:
    from prima_core.memory.system import DirectFile, System

_NONE: frozenset[str] = frozenset()


class Inventory:
    """The layers of `visits`, in this order, and `ends`, of which `streamed_bytes` are not kept (see `residency`).

    `host_bytes`: of a device with a memory of its own: what it does not keep passes on it again and again, and so much
    of that stays in the host's memory; the rest of what it has no longer counts here. None: what is kept is the host's.

    `stations`: what is streamed of each layer in their order, then of each block of the output matrix: `ReadAhead`
    looks at them when their turn comes, so they may change at any time; `version` tells that they did.
    """

    def __init__(
        self,
        file: GGUFFile,
        spec: ModelSpec,
        visits: Sequence[Layers],
        ends: Sequence[str],
        streamed_bytes: int,
        system: System,
        host_bytes: int | None = None,
    ) -> None:
        self._file, self._system, self._ends = file, system, tuple(ends)
        self.mapped = MappedStore(file, spec, system)
        layers = (self.mapped.views(layer).values() for layer in range(spec.n_layers))
        self._weights = {weight.name: weight for weight in itertools.chain(self.mapped.shared().values(), *layers)}
        self.holding = holding(file.tensors, visits, ends)
        self._is_beside = host_bytes is not None
        if host_bytes is not None:
            keeps_all = host_bytes >= streamed_bytes  # whole tensors are a little more: no buffer is needed meanwhile
            self.holding = part_of(self.holding, resized(self.holding, Streamed(), streamed_bytes))
            streamed_bytes = 0 if keeps_all else self.holding.streamable_bytes - host_bytes
        self._station_of = {layer: index for index, layer in enumerate(self.holding.layers)}
        self.stations: list[tuple[Unit, ...]] = []
        self.version = 0
        self._given_back: set[str] = set()  # a device has a copy of its own, which counts as kept
        self._is_closed = False
        self._resizing = threading.Lock()
        self._set(resized(self.holding, Streamed(), streamed_bytes))

    @property
    def pinned_bytes(self) -> int:
        return self.holding.total_bytes - self.streamed_bytes

    @property
    def device_bytes(self) -> int:
        """Of that, what a device has in a memory of its own."""
        return self.holding.fixed_bytes if self._is_beside else 0

    @property
    def copied_bytes(self) -> int:
        """Of what is kept, what a device has a copy of."""
        given_back = self._given_back.copy()
        return sum(len(weight.data) for weight in self._kept() if weight.name in given_back) if given_back else 0

    def station_of(self, layer: int) -> int | None:
        """None for a layer of another device, which has a memory of its own."""
        return self._station_of.get(layer)

    def station_of_block(self, index: int) -> int:
        return len(self._station_of) + index

    def streamed_of(self, layer: int) -> frozenset[str]:
        """Full names."""
        return self._streamed_of(layer, self.streamed)

    def passing_of(self, layer: int) -> frozenset[str]:
        """What its device does not keep, whether it stays in the host's memory or not."""
        if not self._is_beside:
            return self.streamed_of(layer)
        return frozenset([*self.holding.layers.get(layer, ()), *self.holding.experts.get(layer, ())])

    def passes(self, end: str) -> bool:
        """The same of a tensor outside the layers."""
        if end == self.holding.output:
            return self._is_beside or self.streamed.n_blocks > 0
        return end == TOKEN_EMBD and (self.holding.table_bytes > 0 if self._is_beside else self.streamed.table)

    def stays(self, name: str) -> bool:
        """Whether a tensor is in memory between passes, its device's or the host's; of the output all of it."""
        place = split_layer(name)
        if place is not None:
            return name not in self.streamed_of(place[0])
        if name == self.holding.output:
            return not self.streamed.n_blocks
        return not (name == TOKEN_EMBD and self.streamed.table)

    def all_stations(self) -> list[tuple[Unit, ...]]:
        """What `stations` are when all is streamed that can be."""
        blocks = [(self._block(index),) for index in range(len(self.holding.blocks))]
        return [*(self._units(sizes) for sizes in self.holding.layers.values()), *blocks]

    def kept_ends(self) -> list[Weight]:
        return self._kept_ends(self.streamed)

    def lost_bytes(self) -> int | None:
        """Of what is kept, how much is not in memory any more; None where the system does not tell."""
        lost = 0
        for weight in self._kept():
            if weight.name in self._given_back:
                continue
            resident = self._system.resident_bytes(weight.data, self._path(weight.name))
            if resident is None:
                return None
            lost += len(weight.data) - resident
        return lost

    def close(self) -> None:
        """Ends a `resize` at its next tensor; one whose disk hangs is not waited for. Idempotent."""
        self._is_closed = True
        is_over = self._resizing.acquire(timeout=JOIN_S)
        self.mapped.close()
        self._weights = {}
        if is_over:
            self._resizing.release()

    # ------------------------------------------------------------ pages

    def give_back(self, weights: Iterable[Weight]) -> None:
        """From now on only a device's copy of them counts: pages are not missed here."""
        for name in [weight.name for weight in weights]:
            self._given_back.add(name)
            self._system.forget(self._weights[name].data)

    def drop(self, name: str) -> None:
        info = self._file.tensors[name]
        self._drop(Unit(name, info.part, info.offset, info.n_bytes))

    def drop_streamed(self) -> None:
        for unit in itertools.chain.from_iterable(self.stations):
            self._drop(unit)
        if self.streamed.on_demand:
            self._drop_experts()

    def resize(self, pinned_bytes: int) -> None:
        """Keep at most so much; see `StreamingStore.resize`."""
        with self._resizing:
            if not self._is_closed:
                wanted = self._resized(pinned_bytes)
                self._demote(wanted)
                self._promote(wanted)

    def stations_with(self, pinned_bytes: int) -> list[tuple[Unit, ...]]:
        """What `stations` will be once at most so much is kept."""
        return self._stations_of(self._resized(pinned_bytes))

    def _resized(self, pinned_bytes: int) -> Streamed:
        return resized(self.holding, self.streamed, self.holding.total_bytes - pinned_bytes)

    def _demote(self, wanted: Streamed) -> None:
        now, before = self.streamed, {unit for units in self.stations for unit in units}
        layers = {layer: names | wanted.layers[layer] for layer, names in now.layers.items()}
        expert_bytes = max(now.expert_bytes, wanted.expert_bytes)
        more = Streamed(
            layers, max(now.n_blocks, wanted.n_blocks), now.table or wanted.table, expert_bytes, wanted.on_demand
        )
        self._set(more)
        for unit in itertools.chain.from_iterable(self.stations):
            if unit not in before:
                self._drop(unit)
        if wanted.table and not now.table:
            self.drop(TOKEN_EMBD)
        if wanted.on_demand and not now.on_demand:
            self._drop_experts()

    def _promote(self, wanted: Streamed) -> None:
        """Layer by layer; what the system took of what stays comes back too."""
        for layer, names in wanted.layers.items():
            if not self._populate(self._kept_of(layer, wanted)):
                return
            self._set(replace(self.streamed, layers={**self.streamed.layers, layer: names}))
        if self._populate(self._kept_ends(wanted)):
            self._set(wanted)

    def _populate(self, weights: Iterable[Weight]) -> bool:
        """False once this is closed."""
        for weight in weights:
            if self._is_closed:
                return False
            if weight.name in self._given_back:
                continue
            try:
                self._system.populate(weight.data)
            except OSError as error:
                raise unreadable(self._path(weight.name), error) from error
        return not self._is_closed

    def _drop_experts(self) -> None:
        for name in itertools.chain.from_iterable(self.holding.experts.values()):
            self.drop(name)

    def _drop(self, unit: Unit) -> None:
        info, weight = self._file.tensors[unit.name], self._weights.get(unit.name)
        if weight is not None:  # not closed
            data = weight.data[unit.offset - info.offset :][: unit.n_bytes]
            self._system.drop(data, self._path(unit.name), unit.offset)

    def _path(self, name: str) -> Path:
        return self._file.parts[self._file.tensors[name].part].path

    # ------------------------------------------------------------ what is streamed

    def _set(self, streamed: Streamed) -> None:
        self.streamed = streamed
        self.streamed_bytes = self.holding.streamed_bytes(streamed)
        self.stations[:] = self._stations_of(streamed)
        self.version += 1

    def _stations_of(self, streamed: Streamed) -> list[tuple[Unit, ...]]:
        layers = self.holding.layers.items()
        units = [self._units(name for name in names if name in streamed.layers[layer]) for layer, names in layers]
        n_kept = len(self.holding.blocks) - streamed.n_blocks
        blocks = [() if index < n_kept else (self._block(index),) for index in range(len(self.holding.blocks))]
        return [*units, *blocks]

    def _units(self, names: Iterable[str]) -> tuple[Unit, ...]:
        infos = (self._file.tensors[name] for name in names)
        return tuple(Unit(info.name, info.part, info.offset, info.n_bytes) for info in infos)

    def _block(self, index: int) -> Unit:
        info, sizes = self._file.tensors[self.holding.output], self.holding.blocks
        return Unit(info.name, info.part, info.offset + sum(sizes[:index]), sizes[index])

    # ------------------------------------------------------------ what is kept

    def _kept(self) -> Iterator[Weight]:
        streamed = self.streamed
        for layer in self._station_of:
            yield from self._kept_of(layer, streamed)
        yield from self._kept_ends(streamed)

    def _kept_of(self, layer: int, streamed: Streamed) -> list[Weight]:
        left_out = self._streamed_of(layer, streamed)
        return [weight for weight in self.mapped.views(layer).values() if weight.name not in left_out]

    def _streamed_of(self, layer: int, streamed: Streamed) -> frozenset[str]:
        names = streamed.layers.get(layer, _NONE)  # as it is: this is asked twice a layer and token
        return names.union(self.holding.experts.get(layer, ())) if streamed.on_demand else names

    def _kept_ends(self, streamed: Streamed) -> list[Weight]:
        """Of the output matrix perhaps its first rows only."""
        left_out = {self.holding.output, TOKEN_EMBD if streamed.table else ""}
        kept = [self._weights[name] for name in self._ends if name not in left_out]
        n_kept = (len(self.holding.blocks) - streamed.n_blocks) * self.holding.block_rows
        if n_kept:
            output = self._weights[self.holding.output]
            kept.append(output.part(0, min(n_kept, output.shape[0])))
        return kept


def opened(file: GGUFFile, parts: Iterable[int], system: System, exits: ExitStack) -> dict[int, DirectFile]:
    """These parts, past the page cache; `exits` closes them. Raises ModelError when they are not there any more, or not
    those that are mapped."""
    files: dict[int, DirectFile] = {}
    for part in parts:
        path = file.parts[part].path
        try:
            files[part] = system.open_direct(path)
        except OSError as error:
            raise unreadable(path, error) from error
        exits.callback(files[part].close)
    file.check_unchanged()
    return files


def unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{path} cannot be read: {error.strerror or error}", field="file", hint="is the disk sound, the file whole?"
    )
