"""`prima plan --explain` and `--svg`: words and pictures."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from prima_core.commands import explain
from prima_core.commands.bars import MOST_NAME, short_name, time_bars, time_title
from prima_core.commands.picture import svg
from prima_core.plan.plan import Plan, Visit, plan_from_json
from prima_core.plan.problem import NodeFacts, Problem, problem_to_json
from prima_core.plan.timeline import timeline
from tests.commands.conftest import Prima
from tests.plan.home import ATTIC, DESK, LAPTOP, PHONE, TWO_VISITS, home, node, told

HOME = home(DESK, LAPTOP, ATTIC, PHONE)
PLAN = told(TWO_VISITS, HOME)
HOSTILE = '<script>alert("1")</script>&amp;\u202e\ufffe\U0001f600漢字漢字漢字漢字'


def renamed(problem: Problem, old: str, new: str) -> Problem:
    """And the model."""
    text = problem_to_json(msgspec.structs.replace(problem, model=msgspec.structs.replace(problem.model, name=new)))
    nodes = [msgspec.structs.replace(node, name=new if node.name == old else node.name) for node in problem.nodes]
    whole = msgspec.json.decode(text, type=Problem)
    return msgspec.structs.replace(whole, nodes=tuple(nodes), links=whole.links[-1:])


def hostile() -> tuple[Plan, Problem]:
    visits = [msgspec.structs.replace(v, node=HOSTILE if v.node == "laptop" else v.node) for v in TWO_VISITS.visits]
    problem = renamed(HOME, "laptop", HOSTILE)
    return told(msgspec.structs.replace(TWO_VISITS, visits=tuple(visits)), problem), problem


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(HOME))
    return file


# ---------------------------------------------------------------- the command


def test_a_plan_is_explained_in_80_columns(prima: Prima, problem_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = prima("plan", "--problem", problem_file, "--solver", "even", "--explain")
    assert (shown.code, shown.err) == (0, "")
    told = shown.out[: shown.out.index("Memory")]
    for part in (
        "Who does what",
        "desk (the head) computes",
        "How long it takes",
        "What would help",
        "A cable to phone",
    ):
        assert part in told
    bars = [line for line in shown.out.splitlines() if "│" in line]
    assert [line.split()[0] for line in bars] == ["desk", "laptop", "attic", "phone"] * 2
    assert max(map(cell_len, shown.out.splitlines())) <= 80


def test_json_has_the_explanation_and_can_be_planned_with(prima: Prima, problem_file: Path) -> None:
    plain = prima("plan", "--problem", problem_file, "--solver", "even", "--json").json
    explained = prima("plan", "--problem", problem_file, "--solver", "even", "--json", "--explain")
    assert plain["explanation"]["what_ifs"] == []
    found = explained.json["explanation"]
    assert found["time_s"] == explained.json["forecast"]["token_s"]
    assert {one["change"] for one in found["what_ifs"]} == {"memory", "cable", "without"}
    assert {name: value for name, value in plain.items() if name != "explanation"} == {
        name: value for name, value in explained.json.items() if name != "explanation"
    }


def test_an_explained_plan_is_loaded_from_its_file(prima: Prima, tiny: Path, tmp_path: Path) -> None:
    options = (tiny, "--nodes", 2, "-c", 64, "--parallel", 1)
    explained = prima("plan", *options, "--json", "--explain")
    file = tmp_path / "plan.json"
    file.write_text(explained.out)
    again = prima("plan", *options, "--plan", file, "--json")
    assert again.code == 0
    assert plan_from_json(again.out.encode()).visits == plan_from_json(explained.out.encode()).visits


def test_without_rates_it_is_told_who_does_what_and_why_there_are_no_times(prima: Prima, tmp_path: Path) -> None:
    nodes = tuple(NodeFacts(node.name, node.memory_bytes) for node in (DESK, LAPTOP, ATTIC))
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(Problem(HOME.model, nodes, "desk", 1000)))
    shown = prima("plan", "--problem", file, "--solver", "even", "--explain")
    assert "desk (the head) computes" in shown.out
    assert "no forecast: decode_bytes_s of the memory on laptop is not known" in shown.out
    assert "How long it takes" not in shown.out
    drawn = prima("plan", "--problem", file, "--solver", "even", "--svg", tmp_path / "plan.svg")
    assert drawn.code == 1
    assert "no forecast" in drawn.err
    assert not (tmp_path / "plan.svg").exists()


def test_a_plan_for_this_machine_is_foretold_once_it_was_measured(
    prima: Prima, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ("plan", tiny, "--nodes", 2, "--backend", "numpy", "--solver", "even")
    assert "is not known; `prima profile` finds it out" in prima(*options, "--explain").out
    drawn = prima(*options, "--svg", tmp_path / "plan.svg")
    assert drawn.code == 1
    assert "hint: `prima profile` finds it out" in drawn.err
    assert prima("profile", tiny, "--backend", "numpy").code == 0
    foretold = prima(*options, "--json").json["forecast"]
    assert foretold["token_s"] > 0
    assert len(foretold["nodes"]) == 2
    assert 0 < sum(node["link_s"] for node in foretold["nodes"]) < 1e-3  # processes of this machine, not Wi-Fi
    assert "A token takes" in prima(*options, "--explain").out


def test_who_was_left_out_is_told_without_being_asked(prima: Prima, tmp_path: Path) -> None:
    large = msgspec.structs.replace(DESK.devices[1], memory_bytes=3 * 10**9)
    desk = msgspec.structs.replace(DESK, memory_bytes=3 * 10**9, devices=(DESK.devices[0], large))
    file = tmp_path / "problem.json"
    file.write_bytes(problem_to_json(home(desk, PHONE)))
    shown = prima("plan", "--problem", file, "--solver", "halda").out
    assert "phone was left out, as with it a token would take" in shown


def test_a_picture_is_written_beside_whatever_else_is_printed(prima: Prima, problem_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    shown = prima("plan", "--problem", problem_file, "--solver", "even", "--svg", file, "--json")
    assert shown.json["visits"]
    assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_picture_that_cannot_be_written_is_an_error_that_names_it(
    prima: Prima, problem_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "nowhere" / "plan.svg"
    ended = prima("plan", "--problem", problem_file, "--solver", "even", "--svg", file)
    assert ended.code == 1
    assert f"cannot write the picture {file}: No such file or directory" in ended.err
    assert "check --svg" in ended.err


def test_progress_is_shown_only_where_it_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(explain, "error_console", screen)
    clock = iter([0.0, 0.5, 2.0])
    progress = explain.Progressing(lambda: next(clock))
    progress.show(0, 3)
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue() == ""
    progress.show(1, 3)
    progress.close()
    assert "trying what would help" in screen.file.getvalue()


@pytest.mark.parametrize(
    ("goal", "headline", "step"),
    [
        ("latency", "a token in ", "A token: "),
        ("throughput", " tokens a second in 4 sequences", " from left to right"),
        ("ttft", "the first token after ", "A token: "),
    ],
)
def test_a_picture_says_what_the_plan_is_for(
    prima: Prima, problem_file: Path, tmp_path: Path, goal: str, headline: str, step: str
) -> None:
    file = tmp_path / "plan.svg"
    assert prima("plan", "--problem", problem_file, "--solver", "even", "--svg", file, "--goal", goal).code == 0
    title, below, *_ = [one.text or "" for one in ElementTree.parse(file).getroot() if one.tag.endswith("text")]
    assert title.startswith("eight layers: ")
    assert headline in title
    assert step in below


def test_where_the_output_part_is_is_told_if_that_is_not_the_head(prima: Prima, tmp_path: Path) -> None:
    problem = tmp_path / "problem.json"
    problem.write_bytes(problem_to_json(msgspec.structs.replace(HOME, output="laptop")))
    options = ("plan", "--problem", problem, "--solver", "even")
    assert "the output part is on laptop, the logits go from there to desk" in prima(*options).out
    assert ", and the output;" in " ".join(prima(*options, "--explain").out.split())


# ---------------------------------------------------------------- bars


def test_steps_of_several_tokens_are_called_so() -> None:
    line = timeline(PLAN, HOME)
    assert time_title(line).startswith("A token: ")
    assert time_title(dataclasses.replace(line, n_tokens=3)).startswith("A step of 3 tokens: ")


def test_a_node_that_computes_nothing_has_a_bar_without_computing() -> None:
    large = node("attic", 3000, 9e9)
    problem = home(node("desk", 400, 15e9), large)
    plan = told(Plan(8, "desk", (Visit("attic", 0, 8),), output="attic"), problem)
    desk, attic, _ = (text.plain for text in time_bars(timeline(plan, problem), 60, ascii_only=True))
    assert "#" not in desk
    assert "#" in attic


def test_bars_show_what_takes_most_of_each_cell_and_every_node_that_computes() -> None:
    desk, laptop, attic, legend = (text.plain for text in time_bars(timeline(PLAN, HOME), 60, ascii_only=True))
    assert desk.startswith("desk   |#")
    assert laptop.count("-") >= 2
    assert all("#" in bar for bar in (desk, laptop, attic))
    assert len(desk) <= 60
    assert legend == "  # computes  - waits for a link  . reads meanwhile"
    narrow = [text.plain for text in time_bars(timeline(PLAN, HOME), 20, ascii_only=True)]
    assert all("#" in bar for bar in narrow)


def test_names_are_cut_by_the_columns_that_they_take() -> None:
    assert short_name("desk") == "desk"
    for name in ("x" * 40, "漢字" * 20, HOSTILE):
        assert cell_len(short_name(name)) <= MOST_NAME
    assert "\u202e" not in short_name("a\u202eb")


# ---------------------------------------------------------------- pictures


def drawn(plan: Plan, problem: Problem) -> ElementTree.Element:
    return ElementTree.fromstring(svg(plan, problem, timeline(plan, problem)))


def boxes(root: ElementTree.Element) -> Iterator[tuple[str, float, float, float, float]]:
    """Of texts and rectangles: left, top, right, bottom. A letter of the font is 0.6 of its size wide."""
    for one in root.iter():
        tag = one.tag.rsplit("}", 1)[-1]
        if tag == "rect":
            x, y, width, height = (float(one.attrib[name]) for name in ("x", "y", "width", "height"))
            yield tag, x, y, x + width, y + height
        elif tag == "text":
            x, y, points = (float(one.attrib[name]) for name in ("x", "y", "font-size"))
            width = 0.6 * points * cell_len(one.text or "")
            left = x - width / 2 if one.attrib["text-anchor"] == "middle" else x
            yield tag, left, y - points, left + width, y


@pytest.mark.parametrize("which", ["home", "hostile"])
def test_nothing_is_drawn_outside_of_the_picture_and_no_text_over_another(which: str) -> None:
    root = drawn(*((PLAN, HOME) if which == "home" else hostile()))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = list(boxes(root))
    for _, left, top, right, bottom in found:
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
    texts = [box[1:] for box in found if box[0] == "text"]
    assert len(texts) > 10
    for one, other in combinations(texts, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_names_that_are_code_stay_text() -> None:
    root = drawn(*hostile())
    assert {one.tag.rsplit("}", 1)[-1] for one in root.iter()} == {"svg", "rect", "text", "title"}
    assert [one.text for one in root.iter() if (one.text or "").startswith("<script>")]


def test_bars_of_a_pass_are_as_long_as_what_they_stand_for() -> None:
    line = timeline(PLAN, HOME)
    root = drawn(PLAN, HOME)
    titles = [
        (float(one.attrib["width"]), one[0].text or "") for one in root.iter() if len(one) and one.tag.endswith("rect")
    ]
    computing = sum(width for width, title in titles if title.startswith("laptop computes"))
    laptop = next(lane for lane in line.lanes if lane.node == "laptop")
    share = sum(span.stop_s - span.start_s for span in laptop.work if span.kind == "compute") / line.pass_s
    assert computing == pytest.approx(650 * share, abs=0.1)
    weights = [width for width, title in titles if title == "weights 200 MB"]
    assert weights == [pytest.approx(650 * 200e6 / DESK.room_bytes, abs=0.1)]


def test_the_same_plan_is_drawn_alike() -> None:
    assert svg(PLAN, HOME, timeline(PLAN, HOME)) == svg(PLAN, HOME, timeline(PLAN, HOME))
