"""`prima pull`, `ls` and `rm`, and names where a path is expected."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from prima_core.commands.library import shown_progress
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.commands.conftest import Prima, Start
from tests.library.fake_hub import FakeHub, fake_hub, isolate
from tests.model.gguf_builder import STRING, Key, build
from tests.model.part_files import split_copy

REPO = "maker/Tiny-GGUF"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder of this test."""
    monkeypatch.setenv("PRIMA_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, models: Path) -> Iterator[FakeHub]:
    """A hub with the tiny model, whole in F32 and split in another type."""
    isolate(monkeypatch, tmp_path / "hf")
    (tmp_path / "made").mkdir()
    quantised = write_tiny_model(tmp_path / "Tiny-Q8_0.gguf", TinyModel(types="Q8_0"))
    parts = split_copy(quantised, tmp_path / "made", 10)
    with fake_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        served.repos[REPO] = {"Tiny-F32.gguf": tiny.read_bytes(), **{part.name: part.read_bytes() for part in parts}}
        yield served


def test_a_model_is_pulled_listed_used_by_name_and_removed(hub: FakeHub, prima: Prima, models: Path) -> None:
    pulled = prima("pull", f"hf:{REPO}:Q8_0")
    assert pulled.code == 0
    assert pulled.out.startswith("Tiny-Q8_0 (")
    assert "fetching Tiny-Q8_0-00001-of-00003.gguf: 100 % of" in pulled.err
    (listed,) = prima("ls", "--json").json
    assert (listed["name"], listed["architecture"], listed["context_length"]) == ("Tiny-Q8_0", "llama", 512)
    assert listed["n_bytes"] == sum(len(data) for name, data in hub.repos[REPO].items() if "Q8_0" in name)
    assert list(listed["types"]) == ["Q8_0", "F32"]
    assert listed["fault"] is None
    for name in ("Tiny-Q8_0", "Tiny", f"hf:{REPO}", f"hf:{REPO}:Q8_0"):
        answered = prima("run", name, "-p", "a b", "--raw", "-n", 2, "--temp", 0, "--json")
        assert (answered.code, len(answered.json["generated_ids"])) == (0, 2)
    assert prima("rm", "-y", "Tiny-Q8_0").code == 0
    assert list(models.iterdir()) == [models / ".lock"]


@pytest.mark.parametrize(
    "command", [("plan",), ("bench", "--prompt", "4", "--gen", "2"), ("run", "-p", "x", "-n", "1")]
)
def test_every_command_takes_a_split_model_by_any_part(
    prima: Prima, tiny: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    parts = split_copy(tiny, tmp_path, 20)
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert prima(*command, part).code == 0


def test_a_split_model_tokenizes_as_the_whole(prima: Prima, tiny: Path, tmp_path: Path) -> None:
    parts = split_copy(tiny, tmp_path, 20)
    whole = prima("tokenize", tiny, "hello there", "--json").json
    assert prima("tokenize", parts[1], "hello there", "--json").json == whole


def test_a_split_model_is_served_on_several_nodes(tiny: Path, tmp_path: Path, start: Start) -> None:
    parts = split_copy(tiny, tmp_path, 20)
    with start("run", parts[0], "-p", "x", "-n", 3, "--nodes", 2, "--temp", 0, "--json") as many:
        ended = many.end(40)
    assert ended.code == 0, ended.err
    assert len(ended.json["generated_ids"]) == 3


def test_the_program_by_itself_asks_the_hub_that_the_environment_names(
    hub: FakeHub, models: Path, tmp_path: Path
) -> None:
    hub.token = "hf_secret"
    command = [sys.executable, "-m", "prima_core", "pull", f"hf:{REPO}:Tiny-F32.gguf"]
    own = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command,
        env={**os.environ, **own, "HF_TOKEN": "hf_secret"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout[:10]) == (0, "Tiny-F32 ("), done.stderr
    assert (models / REPO / "Tiny-F32.gguf").read_bytes() == hub.repos[REPO]["Tiny-F32.gguf"]
    offline = subprocess.run(
        command,
        env={**os.environ, **own, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert offline.returncode == 1
    assert "prima: HF_HUB_OFFLINE is set" in offline.stderr


def test_several_candidates_are_listed_with_their_sizes(hub: FakeHub, prima: Prima) -> None:
    ended = prima("pull", f"hf:{REPO}")
    assert (ended.code, ended.out) == (1, "")
    assert "has no model for Q4_K_M, the default" in ended.err
    for name in ("Tiny-F32", "Tiny-Q8_0"):
        assert any(line.endswith(name) and " MB " in line for line in ended.err.splitlines())


def test_a_model_that_prima_cannot_serve_is_kept_and_told(hub: FakeHub, prima: Prima) -> None:
    hub.repos["maker/other"] = {"other.gguf": b"GGUF" + bytes(100)}
    ended = prima("pull", "hf:maker/other")
    assert ended.code == 0
    assert "it cannot be served by this version of prima: version" in ended.err


def test_a_name_that_was_not_pulled_gives_the_command(hub: FakeHub, prima: Prima) -> None:
    for command in (("run", "-p", "x"), ("serve",), ("plan",), ("tokenize",), ("bench",)):
        ended = prima(*command, f"hf:{REPO}")
        assert (ended.code, ended.err.splitlines()[-1]) == (1, f"  hint: fetch it with: prima pull hf:{REPO}")
        assert "no model of that name" in prima(*command, "nothing").err


# ---------------------------------------------------------------- ls and rm


def test_broken_models_are_listed_with_what_is_wrong(prima: Prima, models: Path, tiny: Path) -> None:
    models.mkdir()
    parts = split_copy(tiny, models, 20)
    parts[1].unlink()
    (models / "cut.gguf").write_bytes(tiny.read_bytes()[:5000])
    (models / "half.gguf.0123abcd.part").write_bytes(b"GGUF")
    (models / "good.gguf").write_bytes(tiny.read_bytes())
    faults = {model["name"]: model["fault"] for model in prima("ls", "--json").json}
    assert faults["good"] is None
    assert "not here whole" in faults["half"]
    assert "not here whole" in faults["tiny"]
    assert "entries" in faults["cut"] or "file" in faults["cut"]
    table = prima("ls").out
    assert all(name in table for name in faults)
    assert "llama" in table
    assert "F32 100%" in table


def test_an_empty_folder_tells_how_to_fill_it(prima: Prima, models: Path) -> None:
    ended = prima("ls")
    assert (ended.code, ended.out) == (0, "")
    assert f"no models in {models}" in ended.err
    assert prima("ls", "--json").json == []


@pytest.mark.parametrize(("answer", "stays"), [(b"n\n", True), (b"", True), (b"y\n", False)])
def test_rm_asks(prima: Prima, models: Path, tiny: Path, answer: bytes, stays: bool) -> None:
    models.mkdir()
    (models / "m.gguf").write_bytes(tiny.read_bytes())
    ended = prima("rm", "m", stdin=answer)
    assert "Delete m (" in ended.out
    assert str(models / "m.gguf") in ended.out
    assert ended.code == (1 if stays else 0)
    assert (models / "m.gguf").exists() == stays


def test_rm_of_what_is_not_there_is_an_error(prima: Prima, models: Path) -> None:
    ended = prima("rm", "-y", "m")
    assert ended.code == 1
    assert "there is no model 'm'" in ended.err


# ---------------------------------------------------------------- showing


def test_a_terminal_shows_bars_and_a_pipe_lines() -> None:
    out = io.StringIO()
    with shown_progress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress("fetching [x].gguf", 500_000, 1_000_000)
        progress("fetching [x].gguf", 1_000_000, 1_000_000)
    assert "fetching [x].gguf" in out.getvalue()
    assert "1.0/1.0 MB" in out.getvalue()


def test_lines_are_ten_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(Console(file=io.StringIO())) as progress:
        for done in range(0, 1001):
            progress("fetching x", done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (11, "fetching x: 100 % of 0.0 MB")


def test_the_shell_completes_names_of_models(
    prima: Prima, models: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.mkdir()
    (models / "Alpha-Q8_0.gguf").write_bytes(tiny.read_bytes())
    monkeypatch.setenv("_PRIMA_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "prima serve Al")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert prima().out.splitlines() == ["file,Al", "plain,Alpha-Q8_0"]


EVIL = "x\x1b]0;evil\x07\x9b2J"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_files_and_texts_in_them_cannot_drive_the_terminal(prima: Prima, models: Path) -> None:
    models.mkdir()
    (models / f"{EVIL}.gguf").write_bytes(b"GGUF")
    (models / os.fsdecode(b"y\xff.gguf")).write_bytes(b"GGUF")
    architecture = Key("general.architecture", STRING, EVIL.encode() + b"\xff")
    (models / "z.gguf").write_bytes(build([architecture]).data)
    assert len(prima("ls", "--json").json) == 3
    shown = prima("ls").out + prima("rm", EVIL, "-y").err + prima("serve", str(models / EVIL)).err
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert "evil" in shown
