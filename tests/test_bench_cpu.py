"""bench/cpu.py: models of real shapes on this machine, beside llama.cpp."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench import cpu, cpu_measure, cpu_models, cpu_prima
from bench.cpu_figures import MEMORY, Memory, Result, Row
from bench.cpu_llama import SETTINGS, LlamaBench, LlamaSetting, parse, worth_another_run
from bench.cpu_models import LLAMA_8B_SHAPE, TYPES, BenchModel, Room, bench_model, model_file, why_not, why_not_repacked
from bench.cpu_prima import environment, peak_rss_bytes
from prima_core.errors import PrimaError
from prima_core.testing.reference import exact_logits, greedy_ids
from prima_core.testing.tinymodel import Types
from prima_numpy.kernels import Kernels

no_scripts = pytest.mark.skipif(sys.platform == "win32", reason="a script is no program in Windows")
SMALL = replace(LLAMA_8B_SHAPE, n_layers=2, d_model=256, d_ff=512, n_heads=4, n_kv_heads=2, vocab_size=320)
OFF, ON = LlamaSetting(False, True), LlamaSetting(True, True)


def small(types: Types = "Q4_K_M") -> BenchModel:
    return BenchModel("small", "Small", replace(SMALL, types=types))


def row(what: str, prima: float, llama: float) -> Row:
    return Row(what, (prima,), {ON: (llama,)})


def result(*rows: Row, types: Types = "Q4_K_M", own_bytes: int = 0) -> Result:
    return Result(small(types), "portable", 2, rows, 10**9, (25.0,), Memory(10**9 + 10**7 + own_bytes, 10**7, 10**9))


# ---------------------------------------------------------------- llama.cpp's side


def said(**test: float) -> dict[str, float]:
    return {"n_prompt": 0, "n_gen": 0, "n_depth": 0, "avg_ts": 1.0} | test


def test_rates_of_llama_bench_go_to_the_rows_of_the_same_work() -> None:
    report = [said(n_prompt=512, avg_ts=100.5), said(n_gen=64, avg_ts=15.25), said(n_gen=32, n_depth=8192, avg_ts=9.0)]
    assert parse(json.dumps(report)) == {"prefill 512": 100.5, "decode": 15.25, "decode at 8192": 9.0}


@pytest.mark.parametrize("report", ["", "no JSON", "[1]", '{"n_gen": 1}', '[{"n_gen": 1}]'])
def test_what_is_no_report_of_llama_bench_is_an_error(report: str) -> None:
    with pytest.raises(PrimaError, match="no JSON that is known"):
        parse(report)


def test_a_llama_bench_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PrimaError, match="cannot be run"):
        LlamaBench(tmp_path / "llama-bench", 1).build()


@no_scripts
def test_a_failing_llama_bench_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    fails = program(tmp_path, "sys.exit('no such model')")
    with pytest.raises(PrimaError, match="no such model"):
        LlamaBench(fails, 1).run(tmp_path / "model.gguf", ON, (16,), 4)


def test_only_settings_that_are_near_the_best_of_some_row_run_again() -> None:
    slow, near, best = ({"decode": 10.0, "prefill 16": prefill} for prefill in (80.0, 95.0, 100.0))
    first = {OFF: slow | {"decode": 5.0}, ON: near | {"decode": 5.0}, LlamaSetting(True, False): best}
    assert worth_another_run(first) == [ON, LlamaSetting(True, False)]


def program(folder: Path, body: str) -> Path:
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- figures


def test_a_row_is_compared_with_the_setting_whose_median_is_better() -> None:
    mixed = Row("decode", (30.0, 20.0, 40.0), {OFF: (50.0, 10.0, 11.0), ON: (15.0, 12.0, 13.0)})
    assert (mixed.better_setting, mixed.llama_tok_s) == (ON, 13.0)
    assert mixed.ratio == pytest.approx(30 / 13)


def test_a_row_without_llama_cpp_has_no_ratio_and_no_goal() -> None:
    alone = result(Row("decode", (30.0,), {}))
    assert alone.rows[0].ratio is None
    assert alone.goal("decode") is None


@pytest.mark.parametrize(
    ("types", "what", "ratio", "is_met"),
    [
        ("Q4_K_M", "decode", 2.0, True),
        ("Q4_K_M", "decode", 1.99, False),
        ("Q8_0", "decode", 1.35, True),
        ("Q8_0", "decode", 1.34, False),
        ("Q8_0", "prefill 512", 2.0, True),
        ("Q8_0", "prefill 512", 1.99, False),
    ],
)
def test_ratios_meet_their_goals_or_not(types: Types, what: str, ratio: float, is_met: bool) -> None:
    goal = result(row("decode", 10.0, 10.0), row(what, 10 * ratio, 10.0), types=types).goals()
    assert [found.is_met for found in goal if found.what == what][-1] is is_met


def test_rows_that_are_no_goal_have_none() -> None:
    assert result(row("prefill 16", 1.0, 10.0)).goal("prefill 16") is None


@pytest.mark.parametrize(("own_bytes", "is_met"), [(150_000_000, True), (150_000_001, False)])
def test_memory_beyond_the_file_and_its_kv_meets_its_goal_or_not(own_bytes: int, is_met: bool) -> None:
    goal = result(own_bytes=own_bytes).goal(MEMORY)
    assert goal is not None
    assert (goal.reached, goal.is_met) == (own_bytes, is_met)


def test_weights_read_are_a_share_of_plain_reading() -> None:
    found = result(row("decode", 20.0, 10.0))
    assert (found.weights_gb_s, found.share_of_reading) == (20.0, 0.8)
    assert found.facts()["share_of_reading"] == 0.8


# ---------------------------------------------------------------- models


def test_models_have_the_sizes_of_the_real_ones() -> None:
    sizes = {(key, types): bench_model(key, types).tensor_bytes / 1e9 for key in ("1b", "8b") for types in TYPES}
    expected = {("1b", "Q4_K_M"): 0.80, ("1b", "Q8_0"): 1.31, ("8b", "Q4_K_M"): 4.91, ("8b", "Q8_0"): 8.53}
    assert sizes == pytest.approx(expected, rel=0.01)
    assert bench_model("8b", "Q8_0").kv_bytes(1) == 2 * 32 * 8 * 128 * 2


def test_a_model_is_refused_where_disk_or_memory_is_short_and_both_sizes_are_told() -> None:
    model = bench_model("8b", "Q8_0")
    much, little = 100 * 10**9, 9 * 10**9
    assert why_not(model, Room(much, much), is_written=False) == ""
    assert why_not(model, Room(little, much), is_written=False) == (
        "it takes 8.5 GB and 1 GB to spare, but there are 9.0 GB of free disk"
    )
    assert why_not(model, Room(little, much), is_written=True) == ""
    assert "available memory" in why_not(model, Room(much, little), is_written=True)


def test_repacked_weights_need_memory_for_two_copies() -> None:
    model = bench_model("8b", "Q8_0")
    assert why_not_repacked(model, Room(0, 20 * 10**9)) == ""
    assert "17.1 GB" in why_not_repacked(model, Room(0, 18 * 10**9))


def test_a_file_goes_unless_it_is_kept_and_then_it_is_used_again(tmp_path: Path) -> None:
    with model_file(small(), tmp_path, keep=True) as path:
        written = path.stat().st_mtime_ns
    wrote: list[int] = []
    with model_file(small(), tmp_path, keep=False, wrote=wrote.append) as path:
        assert (path.stat().st_mtime_ns, wrote) == (written, [])
    assert not list(tmp_path.iterdir())


def test_progress_adds_up_to_the_size_that_was_told(tmp_path: Path) -> None:
    wrote: list[int] = []
    with model_file(small(), tmp_path, keep=False, wrote=wrote.append):
        assert sum(wrote) == small().tensor_bytes


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(n_bytes: int) -> None:
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model_file(small(), tmp_path, keep=True, wrote=interrupted):
        raise AssertionError("it was not written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("types", TYPES)
def test_models_run_natively_and_by_the_exact_twin_with_sound_logits(tmp_path: Path, types: Types) -> None:
    with model_file(small(types), tmp_path, keep=False) as path:
        logits = exact_logits(path, range(20))
        assert np.isfinite(logits).all()
        assert 0.5 < logits.std() < 20
        assert len(greedy_ids(path, range(5), n=3, twin="native")) == 3


# ---------------------------------------------------------------- runs


def test_settings_of_the_user_do_not_reach_what_is_measured() -> None:
    own = {"PATH": "x", "PRIMA_NODES": "3", "PRIMA_CPU": "avx2"}
    assert environment(own, "portable") == {"PATH": "x", "PRIMA_CPU": "portable"}


def test_the_peak_is_at_least_what_is_resident_now() -> None:
    resident = psutil.Process().memory_info().rss
    assert resident * 0.9 < peak_rss_bytes() < 100 * resident


def test_a_failing_prima_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(PrimaError, match="no file"):
        cpu_prima.run_prima(tmp_path / "nowhere.gguf", 2, 2, 1, "portable")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_models, "SHAPES", {"1b": ("Small", SMALL), "8b": ("Large", replace(SMALL, d_ff=2**44))})
    monkeypatch.setattr(cpu_measure, "PROMPTS", (4, 512))
    monkeypatch.setattr(cpu_measure, "N_GEN", 4)
    monkeypatch.setattr(cpu_prima, "READING_S", 0.01)


LLAMA = """
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--version" in sys.argv:
    print("llama.cpp of tests")
    sys.exit()
assert words["-t"] == "1", words
row = {"n_prompt": 0, "n_gen": 0, "n_depth": int(words["-d"]), "avg_ts": 1e-3}
prompts = [row | {"n_prompt": int(n)} for n in words["-p"].split(",") if n != "0"]
print(json.dumps([*prompts, row | {"n_gen": int(words["-n"]), "avg_ts": 1e9 if words["--repack"] == "1" else 1e3}]))
"""


@no_scripts
@pytest.mark.usefixtures("quick")
def test_a_model_is_measured_beside_llama_cpp_and_one_that_is_too_large_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, numbers = tmp_path / "models", tmp_path / "numbers.json"
    arguments = ["--shapes", "1b", "8b", "--types", "Q4_K_M", "--runs", "1", "--depth", "30", "-t", "1"]
    arguments += ["--llama-bench", str(program(tmp_path, LLAMA)), "--models", str(models), "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", ["cpu", *arguments, "--variants", *Kernels.variants()[:1], "portable"])

    assert cpu.main() == 0

    report = json.loads(numbers.read_text())
    assert report["llama_cpp"] == "llama.cpp of tests"
    assert report["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert [left["model"] for left in report["left_out"]] == ["Large"]
    first, short = report["results"]
    rows = {row["what"]: row for row in first["rows"]}
    assert set(rows) == {"decode", "prefill 4", "prefill 512", "decode at 30", "prefill 30"}
    assert all(row["prima_tok_s"] > 0 for row in rows.values())
    assert rows["decode"]["llama_cpp_setting"] == "repack on, flash attention off"
    assert rows["prefill 30"]["ratio"] is None
    met = {goal["what"]: goal["met"] for goal in first["goals"]}
    assert met["decode"] is False
    assert met["prefill 512"] is True
    assert first["share_of_reading"] > 0
    assert first["peak_rss_bytes"] == first["file_bytes"] + first["kv_bytes"] + first["own_bytes"]
    assert (short["variant"], [row["what"] for row in short["rows"]]) == ("portable", ["decode", "prefill 128"])
    shown = capsys.readouterr().out
    assert "Large Q4_K_M is left out: it takes" in shown
    assert "2: NOT met" in shown
    assert [path.name for path in models.iterdir()] == ["1b-q4_k_m.gguf"]


@pytest.mark.usefixtures("quick")
def test_without_a_folder_for_models_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["cpu", "--types", "Q8_0", "--runs", "1"])
    assert cpu.main() == 0
    assert not list(tmp_path.iterdir())


def test_an_error_is_told_with_its_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu", "--llama-bench", str(tmp_path / "nothing")])
    assert cpu.main() == 1
    assert "hint: --llama-bench names that program" in capsys.readouterr().err


def test_without_a_choice_the_small_shape_is_measured_with_the_best_variant() -> None:
    options = cpu.parse([])
    assert (options.shapes, options.types, options.variants) == (["1b"], TYPES, [Kernels.variants()[0]])


def test_all_means_both_shapes_and_every_variant_and_each_may_be_chosen() -> None:
    options = cpu.parse(["--all"])
    assert (options.shapes, options.variants) == (["1b", "8b"], list(Kernels.variants()))
    assert cpu.parse(["--all", "--shapes", "1b", "--variants", "portable"]).variants == ["portable"]


def test_llama_cpp_runs_in_every_setting() -> None:
    assert len({str(setting) for setting in SETTINGS}) == 4
