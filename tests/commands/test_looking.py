"""Commands that look and tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import msgspec
import pytest

from prima_core.arch.families import open_model
from prima_core.commands.profile import MachineNow
from prima_core.model.gguf import GGUFFile
from prima_core.model.tokenizer import Tokenizer
from prima_core.node.coordinate import model_facts
from prima_core.plan.plan import plan_from_json
from prima_core.plan.problem import DeviceFacts, ModelFacts, NodeFacts, Problem, problem_to_json
from prima_core.plan.profile import Profile
from prima_core.plan.words import duration
from prima_core.testing.tinyvocab import tiny_vocab
from prima_numpy.kernels import Kernels
from prima_numpy.threads import default_threads
from prima_numpy.variants import ALL_VARIANTS
from tests.commands.conftest import Prima
from tests.node.fakegpu import add_fake_gpu
from tests.site import Site

# ---------------------------------------------------------------- prima plan


def test_a_plan_is_shown_as_a_table(prima: Prima, tiny: Path) -> None:
    shown = prima("plan", tiny, "--nodes", 2)
    assert shown.code == 0
    assert "[0, 3)" in shown.out
    assert "[3, 6)" in shown.out
    assert "solver halda" in shown.out


def test_a_plan_shows_the_devices_of_a_node(prima: Prima, site: Site, tiny: Path) -> None:
    """The fake GPU has room for two layers and the ends of the model."""
    sizes = prima("plan", tiny, "--json", "-c", 64, "--parallel", 1).json["residency"][0]
    with open_model(tiny) as model:
        facts = model_facts(model, 64)
    ends = facts.input_bytes + facts.output_bytes
    layer = (sizes["weight_bytes"] - ends + sizes["kv_bytes"]) // 6
    add_fake_gpu(site, sizes={"fakegpu:gpu:0": ends + 2 * layer})
    arguments = ("plan", tiny, "-c", 64, "--parallel", 1)
    assert prima(*arguments, "--json").json["visits"][0]["split"] == [
        {"device": "fakegpu:gpu:0", "start": 0, "stop": 2},
        {"device": "numpy:cpu", "start": 2, "stop": 6},
    ]
    table = prima(*arguments).out
    assert [line.split("│")[3].strip() for line in table.splitlines() if "[" in line] == ["fakegpu:gpu:0", "numpy:cpu"]
    assert "[0, 2)" in table
    assert "[2, 6)" in table
    only = prima(*arguments, "--backend", "numpy:cpu,numpy", "--json").json
    assert [need["device"] for need in only["residency"]] == ["numpy:cpu"]


def test_a_plan_can_be_printed_and_used(prima: Prima, tiny: Path, tmp_path: Path) -> None:
    printed = prima("plan", tiny, "--nodes", 2, "--json", "-c", 64, "--parallel", 2)
    plan = plan_from_json(printed.out.encode())
    assert [(visit.start, visit.stop) for visit in plan.visits] == [(0, 3), (3, 6)]
    assert plan.kv_tokens == 128
    file = tmp_path / "plan.json"
    file.write_text(printed.out)
    again = prima("plan", tiny, "--nodes", 2, "--plan", file, "--json", "-c", 64, "--parallel", 2)
    assert again.json == printed.json | {"certificate": None}, "a plan of one's own is vouched for by no solver"
    alone = prima("run", tiny, "-p", "x", "-n", 5, "--temp", 0, "--json")
    planned = prima("run", tiny, "-p", "x", "-n", 5, "--temp", 0, "--json", "--transport", "inproc", "--nodes", 2,
                    "--plan", file, "-c", 64, "--wire", "f32")  # fmt: skip
    assert planned.json["generated_ids"] == alone.json["generated_ids"]


def test_the_type_of_kv_is_in_the_plan_and_in_its_bytes(prima: Prima, tiny: Path) -> None:
    kv_bytes = {}
    for kv_type in ("f16", "q8_0", "f32"):
        plan = prima("plan", tiny, "--json", "-c", 64, "--kv-type", kv_type).json
        assert (plan["kv_type"], plan["context"]) == (kv_type, 64)
        kv_bytes[kv_type] = plan["residency"][0]["kv_bytes"]
    assert kv_bytes["f32"] == 2 * kv_bytes["f16"] == 4 / (34 / 32) * kv_bytes["q8_0"]
    assert "in q8_0, contexts of 64" in prima("plan", tiny, "-c", 64, "--kv-type", "q8_0").out


def test_a_problem_file_is_solved(prima: Prima, tmp_path: Path) -> None:
    model = ModelFacts(
        "m", layer_bytes=(100,) * 4, input_bytes=10, output_bytes=10, kv_bytes_per_token_layer=1, context_length=8
    )
    problem = Problem(model, (NodeFacts("a", 10_000), NodeFacts("b", 10_000)), head="a", kv_tokens=8)
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(problem))
    plan = plan_from_json(prima("plan", "--problem", file, "--solver", "even", "--json").out.encode())
    assert (plan.n_layers, plan.nodes, plan.solver) == (4, ("a", "b"), "even")
    assert [need.node for need in plan.residency] == ["a", "b"]


def large_problem(disk_bytes_s: float) -> Problem:
    model = ModelFacts("m", (100_000_000,) * 8, 0, 0, 0, 8, largest_tensor_bytes=20_000_000)
    cpu = DeviceFacts("cpu", 10**9, decode_bytes_s=10e9, prefill_bytes_s=1e12)
    nodes = (NodeFacts("a", 350_000_000, (cpu,), disk_bytes_s), NodeFacts("b", 900_000_000, (cpu,), disk_bytes_s))
    return Problem(model, nodes, head="a", kv_tokens=8)


def test_a_plan_larger_than_memory_shows_what_comes_from_disk_and_what_is_foretold(
    prima: Prima, tmp_path: Path
) -> None:
    file, problem = tmp_path / "problem.json", large_problem(1e9)
    file.write_bytes(problem_to_json(msgspec.structs.replace(problem, nodes=problem.nodes[:1])))
    plan = plan_from_json(prima("plan", "--problem", file, "--json").out.encode())
    [need] = plan.residency
    assert need.streamed_bytes > 450_000_000
    assert plan.forecast is not None
    assert plan.forecast.nodes[0].read_bytes == need.streamed_bytes
    shown = prima("plan", "--problem", file).out
    for part in ("stays", "from disk for every token", "buffer", "waits for its disk", "most of it is the disk of a"):
        assert part in shown
    assert f"{need.buffer_bytes / 1e6:,.0f} MB" in shown
    assert f"{1e3 * plan.forecast.token_s:,.1f} ms per token" in shown


def test_a_plan_without_rates_is_shown_without_times_and_says_why(prima: Prima, tmp_path: Path) -> None:
    file = tmp_path / "problem.json"
    problem = large_problem(0.0)
    file.write_bytes(problem_to_json(msgspec.structs.replace(problem, nodes=problem.nodes[:1])))
    shown = prima("plan", "--problem", file).out
    assert "no forecast: disk_bytes_s of a is not known" in shown
    assert "foretold" not in shown
    assert prima("plan", "--problem", file, "--json").json["forecast"] is None


def test_rounds_are_asked_for_on_the_command_line(prima: Prima, tiny: Path, tmp_path: Path) -> None:
    plan = prima("plan", tiny, "--nodes", 2, "--rounds", 3, "--json", "-c", 64)
    assert [visit["node"][-2:] == ".2" for visit in plan.json["visits"]] == [False, True] * 3
    alone = prima("run", tiny, "-p", "x", "-n", 5, "--temp", 0, "--json")
    rounds = prima("run", tiny, "-p", "x", "-n", 5, "--temp", 0, "--json", "--transport", "inproc", "--nodes", 2,
                   "--rounds", 3, "-c", 64, "--wire", "f32")  # fmt: skip
    assert rounds.json["generated_ids"] == alone.json["generated_ids"]
    problem = tmp_path / "problem.json"
    problem.write_bytes(problem_to_json(large_problem(1e9)))
    asked = prima("plan", "--problem", problem, "--rounds", 2, "--json").json
    assert len(asked["visits"]) == 4


# ---------------------------------------------------------------- prima tokenize


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a vocabulary and no model."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tiny_vocab("llama", 512).add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEXT = "hello <|begin_of_text|> wörld\n"


def test_what_a_solver_vouches_for_is_shown(prima: Prima, tmp_path: Path) -> None:
    problem = tmp_path / "problem.json"
    problem.write_bytes(problem_to_json(large_problem(1e9)))
    plan = ("plan", "--problem", problem, "--solver", "halda")
    certificate = prima(*plan, "--json").json["certificate"]
    assert f"no plan is foretold less than {duration(certificate['bound_s'])} for a token: " in prima(*plan).out
    problem.write_bytes(problem_to_json(Problem(ModelFacts("m", (9,), 0, 0, 0, 9), (NodeFacts("a", 99),), "a", 1)))
    assert "as `even`: decode_bytes_s of the memory on a is not known" in prima(*plan).out.splitlines()


def test_ids_and_pieces_of_a_text(prima: Prima, vocabulary: Path) -> None:
    shown = prima("tokenize", vocabulary, TEXT, "--json").json
    with GGUFFile.open(vocabulary) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert list(shown) == ["ids", "pieces"]
    assert shown["ids"] == tokenizer.encode(TEXT)
    assert len(shown["pieces"]) == len(shown["ids"])
    assert tokenizer.bos_id not in shown["ids"]


def test_special_tokens_are_added_and_read_when_asked(prima: Prima, tiny: Path) -> None:
    shown = prima("tokenize", tiny, TEXT, "--json", "--special").json
    assert shown["pieces"].count("<|begin_of_text|>") == 2
    assert shown["pieces"][0] == "<|begin_of_text|>"


def test_without_a_text_standard_input_is_read(prima: Prima, tiny: Path) -> None:
    as_argument = prima("tokenize", tiny, TEXT, "--json").json
    assert prima("tokenize", tiny, "--json", stdin=TEXT.encode()).json == as_argument
    assert prima("tokenize", tiny, "", "--json", stdin=TEXT.encode()).json == {"ids": [], "pieces": []}


def test_input_that_is_not_utf8_is_tokenized_too(prima: Prima, tiny: Path) -> None:
    shown = prima("tokenize", tiny, "--json", stdin=b"a\xffb\xed\xa0\x80")
    assert shown.code == 0
    assert shown.json["pieces"][0] == "a"
    assert prima("tokenize", tiny, "a\udcffb", "--json").json["pieces"][0] == "a"


def test_tokens_are_a_line_each(prima: Prima, tiny: Path) -> None:
    ids = prima("tokenize", tiny, TEXT, "--json").json["ids"]
    lines = prima("tokenize", tiny, TEXT).out.splitlines()
    assert [int(line.split()[0]) for line in lines] == ids


# ---------------------------------------------------------------- prima plugins, prima doctor


def test_plugins_are_listed_with_what_is_wrong_with_them(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_DISABLE_PLUGINS", "mlx")
    rows = {row["name"]: row for row in prima("plugins", "--json").json}
    assert {"numpy", "torch", "mlx", "inproc", "nng", "even"} <= set(rows)
    assert set(rows["numpy"]) >= {"name", "distribution", "version", "state", "fault", "hint"}
    assert (rows["numpy"]["state"], rows["numpy"]["distribution"]) == ("ok", "prima-llm")
    assert rows["mlx"]["state"] == "disabled"
    table = prima("plugins")
    assert table.code == 0
    assert all(name in table.out for name in rows)


def test_plugins_and_doctor_show_the_cpu_variant_and_the_threads(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_CPU", "portable")
    shown = f"native, portable, {default_threads()} threads; can run: {' '.join(Kernels.variants())}"
    rows = {row["name"]: row for row in prima("plugins", "--json").json}
    assert (rows["numpy"]["facts"], rows["numpy"]["fault"]) == (shown, "")
    assert "native, portable" in prima("plugins").out
    fact = {finding["topic"]: finding["fact"] for finding in prima("doctor", "--json").json}["backend numpy"]
    assert "kernels native, portable; " in fact
    assert f"threads {default_threads()}; variants {' '.join(Kernels.variants())}" in fact


def test_a_variant_that_this_cpu_cannot_run_is_told_by_plugins(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_CPU", "abacus")
    row = next(row for row in prima("plugins", "--json").json if row["name"] == "numpy")
    assert (row["state"], row["facts"]) == ("unusable", "")
    assert "abacus" in row["fault"]
    assert "portable" in row["hint"]


def test_doctor_tells_what_works_and_how_to_get_what_is_missing(prima: Prima) -> None:
    findings = {finding["topic"]: finding for finding in prima("doctor", "--json").json}
    assert {"prima", "python", "memory", "backend auto", "device numpy:cpu", "cluster token"} <= set(findings)
    assert findings["backend auto"]["ok"]
    missing = [finding for finding in findings.values() if not finding["ok"]]
    assert all(finding["hint"] for finding in missing)
    table = prima("doctor")
    assert table.code == 0
    assert "numpy:cpu" in table.out


def test_doctor_shows_every_device_and_what_keeps_a_backend_from_its_best(
    prima: Prima, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = {
        "graphics": "Probe(True, 'graphics 2.13 is a CPU build', 'pip install graphics-cuda')",
        "absent": "Probe(False, 'graphics is not installed', 'pip install graphics')",
    }
    for name, probe in probes.items():
        site.add(name, DEVICES.format(name=name, probe=probe))
    monkeypatch.setenv("PRIMA_DISABLE_PLUGINS", "mlx")
    findings = {finding.pop("topic"): finding for finding in prima("doctor", "--json").json}
    assert findings["backend graphics"] == {
        "ok": True,
        "fact": "graphics 2.13 is a CPU build; driver 570.1; library 13",
        "hint": "pip install graphics-cuda",
    }
    assert findings["device graphics:gpu:0"]["fact"] == "8.0 GB free of its own; a card"
    assert findings["device graphics:cpu"]["fact"] == "6.0 GB free of the host's"
    assert findings["backend absent"] == {
        "ok": False,
        "fact": "backend 'absent' is not usable: graphics is not installed",
        "hint": "pip install graphics",
    }
    assert findings["plugin absent"]["ok"], "what it lacks is told once"
    assert findings["plugin mlx"]["fact"] == "disabled"
    assert "device numpy:cpu" in findings, "auto does without some devices, the doctor shows all"
    assert findings["backend auto"]["fact"].startswith("computing on graphics:gpu:0, numpy:cpu; ")


DEVICES = """
class Backend:
    def devices(self): return [Device('{name}:gpu:0', 8 * 10**9, 'a card', False), Device('{name}:cpu', 6 * 10**9)]
    def describe(self): return dict(driver="570.1", library="13")
    def load(self, model, device, part, store): ...
    def close(self): ...

@hookimpl
def prima_backends():
    return [BackendPlugin("{name}", 1, lambda: {probe}, lambda options: Backend())]
"""


def test_doctor_says_what_to_do_about_a_cpu_variant_that_cannot_run(
    prima: Prima, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = next(name for name in ALL_VARIANTS if name not in Kernels.variants())
    monkeypatch.setenv("PRIMA_CPU", lacking)
    findings = {finding["topic"]: finding for finding in prima("doctor", "--json").json}
    assert not findings["backend numpy"]["ok"]
    assert f"'{lacking}' needs instructions" in findings["backend numpy"]["fact"]
    assert not findings["backend auto"]["ok"]
    assert (
        f"leave PRIMA_CPU unset for the best, or set it to one of: auto, {Kernels.variants()[0]}"
        in findings["backend numpy"]["hint"]
    )


def test_doctor_makes_nothing(prima: Prima, tmp_path: Path) -> None:
    assert prima("doctor").code == 0
    assert not (tmp_path / "home").exists()


HEAVY = {
    "numpy", "torch", "mlx", "pynng", "scipy", "tokenizers", "jinja2", "psutil", "uvicorn", "starlette", "asyncio",
    "msgspec",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["serve", "--help"], set()),
        (["plugins", "--json"], {"msgspec", "numpy", "psutil"}),
    ],
)
def test_nothing_heavy_is_imported_to_tell_what_there_is(arguments: list[str], allowed: set[str]) -> None:
    code = f"""
import sys
from prima_core.cli import main
try:
    main()
finally:
    print(*(name for name in {sorted(HEAVY - allowed)} if name in sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.split()) == (0, [])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(prima: Prima, flag: str) -> None:
    shown = prima(flag)
    assert shown.code == 0
    for command in ("serve", "join", "run", "chat", "plan", "tokenize", "bench", "plugins", "doctor"):
        assert command in shown.out


def test_the_version_is_told(prima: Prima) -> None:
    assert prima("--version").out.startswith("prima, version ")


def test_this_machine_is_measured_and_that_is_kept(
    prima: Prima, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = msgspec.json.decode(prima("profile", tiny, "--backend", "numpy", "--json").out, type=MachineNow)
    told = machine.profile
    assert machine.devices["numpy:cpu"] > 0
    assert 0 < machine.memory_bytes < machine.available_bytes <= machine.total_bytes
    assert told.devices["numpy:cpu"].decode_bytes_s > 0
    assert told.devices["numpy:cpu"].prefill_bytes_s > 0
    if sys.platform == "linux":
        [kept] = (tmp_path / "prima" / "profiles").iterdir()
        assert msgspec.json.decode(kept.read_bytes(), type=Profile) == told
    shown = prima("profile", tiny, "--backend", "numpy").out
    assert "numpy:cpu" in shown
    assert "disk, read past the page cache" in shown
    assert "output part" in shown
