"""Model files, and workers that outlive the heads of many tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.engine.request import GREEDY, Sampling
from prima_core.model.weights import Model
from prima_core.node.head import HeadOptions
from prima_core.testing.cluster import NODE
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.node.cluster import Cluster, free_port, worker_process

N_LAYERS = 8
PROMPTS = {
    "short": tuple(range(5, 12)),
    "long": tuple(7 * i % 250 for i in range(100)),
}


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "qwen2"):
        wanted = TinyModel(arch=arch, n_layers=N_LAYERS, types="Q8_0", context_length=4096, seed=11)
        write_tiny_model(folder / f"{arch}.gguf", wanted)
    with (folder / "builtin.gguf").open("wb") as copy:
        copy.write((files("prima_core.builtin") / "prima-builtin.gguf").read_bytes())
    return folder


@pytest.fixture(scope="session")
def open_models(models_folder: Path) -> Iterator[dict[str, Model]]:
    with ExitStack() as exits:
        yield {path.stem: exits.enter_context(open_model(path)) for path in models_folder.glob("*.gguf")}


@pytest.fixture
def llama(open_models: dict[str, Model]) -> Model:
    return open_models["llama"]


@pytest.fixture
def tied(tmp_path: Path) -> Iterator[Model]:
    """A model whose output matrix is its embedding."""
    wanted = TinyModel(tied_output=True, d_model=64, d_ff=64, types="F32")
    with open_model(write_tiny_model(tmp_path / "tied.gguf", wanted)) as model:
        yield model


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a test's processes put their temporary files; the name is short, because sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="prima-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Opens clusters that end with the test: `cluster(model, listen=..., n_local=...)`."""
    with ExitStack() as exits:

        def start(model: Model, **options: object) -> Cluster:
            return exits.enter_context(Cluster(model, HeadOptions(node=NODE, **options)))  # type: ignore[arg-type]

        yield start


Tokens = Callable[..., list[int]]


@pytest.fixture(scope="session")
def one_node(open_models: dict[str, Model]) -> Iterator[Tokens]:
    """What one node without a ring answers, asked once for each question."""
    known: dict[tuple[object, ...], list[int]] = {}
    with ExitStack() as exits:
        clusters: dict[str, Cluster] = {}

        def tokens(model: str, prompt: Sequence[int], n: int, sampling: Sampling = GREEDY) -> list[int]:
            if model not in clusters:
                clusters[model] = exits.enter_context(Cluster(open_models[model], HeadOptions(node=NODE)))
                clusters[model].until_serving_with("head")
            key = model, tuple(prompt), n, sampling
            if key not in known:
                known[key] = clusters[model].tokens(prompt, n, sampling)
            return known[key]

        yield tokens


@dataclass(frozen=True)
class Pool:
    """Three worker processes, w1 to w3, that join whatever head comes up at `address`."""

    address: str


@pytest.fixture(scope="session", params=["ipc", "tcp"])
def pool(request: pytest.FixtureRequest, models_folder: Path) -> Iterator[Pool]:
    with ExitStack() as exits:
        folder = tempfile.mkdtemp(prefix="prima-")  # a short path: those of sockets have a limit
        exits.callback(shutil.rmtree, folder)
        address = f"ipc://{folder}/head" if request.param == "ipc" else f"tcp://127.0.0.1:{free_port()}"
        for name in ("w1", "w2", "w3"):
            exits.enter_context(worker_process(address, name, models_folder))
        yield Pool(address)
