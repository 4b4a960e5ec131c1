from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable

import click
import msgspec
import pytest

from prima_core.errors import ConfigError, PlanError, PluginError, PrimaError
from prima_core.events import NodeLost
from prima_core.interfaces import API, BackendOptions, Probe
from prima_core.plan.problem import ModelFacts, NodeFacts, Problem
from prima_core.plugins import PluginRow, Registry
from tests.site import Site

OURS = ["even", "halda", "inproc", "mlx", "nng", "numpy", "socket", "torch"]
OPTIONS = BackendOptions()
PROBLEM = Problem(ModelFacts("m", (1,), 0, 0, 0, 9), (NodeFacts("a", 10),), "a", 1)

SOLVER = """
@hookimpl
def prima_solvers():
    return [SolverPlugin(name="{name}", api={api}, summary="", solve=lambda problem: {plan})]
"""
BACKEND = """
class Backend:
    closed = []
    def devices(self): {devices}
    def describe(self): return {{}}
    def load(self, model, device, part, store): ...
    def close(self): self.closed.append("{name}")

def probe(): {probe}
def open_backend(options): {open}

@hookimpl
def prima_backends():
    return [BackendPlugin(name="{name}", api=1, probe=probe, open=open_backend)]
"""


def solver(name: str, *, api: int = API, plan: str = "None") -> str:
    return SOLVER.format(name=name, api=api, plan=plan)


def backend(
    name: str,
    *,
    probe: str = "return Probe(usable=True)",
    open: str = "return Backend()",
    devices: str = "return [Device('{name}:gpu', 1)]",
) -> str:
    return BACKEND.format(name=name, probe=probe, open=open, devices=devices.format(name=name))


def row(registry: Registry, name: str) -> PluginRow:
    (found,) = [row for row in registry.report() if row.name == name]
    return found


def assert_others_work(registry: Registry) -> None:
    rows = {row.name: row.state for row in registry.report() if row.distribution == "prima-llm"}
    assert sorted(rows) == OURS
    assert "fault" not in rows.values()
    assert registry.solver("even").solve(PROBLEM).solver == "even"


# ---------------------------------------------------------------- ours


def test_our_own_parts_come_in_by_entry_points() -> None:
    registry = Registry.load({})
    ours = {row.name: row for row in registry.report() if row.distribution == "prima-llm"}
    assert sorted(ours) == OURS
    assert ours["even"].offers == ("solver even",)
    assert ours["halda"].offers == ("solver halda", "solver halda-ilp", "solver compute")
    assert ours["nng"].offers == ("transport ipc", "transport tls+tcp")
    assert ours["socket"].offers == ("transport unix", "transport tcp")
    assert ours["numpy"].state == "ok"
    assert registry.faults == ()


def test_rows_are_plain_data_for_json() -> None:
    rows = json.loads(msgspec.json.encode(Registry.load({}).report()))
    assert set(rows[0]) == {"name", "distribution", "version", "state", "offers", "facts", "fault", "hint"}


# ---------------------------------------------------------------- loading: each alone

BROKEN = [
    pytest.param("raise RuntimeError('boom')", "import: RuntimeError: boom", id="raises at import"),
    pytest.param("import not_there_at_all", "import: ModuleNotFoundError", id="imports what is not there"),
    pytest.param("def (", "import: SyntaxError", id="syntax error"),
    pytest.param("raise SystemExit(3)", "import: SystemExit: 3", id="exits at import"),
    pytest.param("x = 1", "hooks: it implements no hook", id="no hook"),
    pytest.param("@hookimpl\ndef prima_frobnicate(): pass", "unknown hook 'prima_frobnicate'", id="unknown hook"),
    pytest.param("@hookimpl\ndef prima_on_event(event, when): pass", "when", id="unknown argument"),
    pytest.param("@hookimpl(wrapper=True)\ndef prima_solvers(): return (yield)", "is a hook wrapper", id="wrapper"),
    pytest.param("@hookimpl\ndef prima_solvers(): 1 / 0", "offer: ZeroDivisionError", id="offer raises"),
    pytest.param(
        "@hookimpl\ndef prima_solvers():\n    yield 1 / 0", "offer: ZeroDivisionError", id="offer raises late"
    ),
    pytest.param("@hookimpl\ndef prima_solvers(): return 7", "offer: TypeError", id="offer is no iterable"),
    pytest.param("@hookimpl\ndef prima_solvers(): return ['x']", "gave a str, not a SolverPlugin", id="offers garbage"),
    pytest.param(
        "@hookimpl\ndef prima_backends(): return [SolverPlugin('x', 1, '', print)]",
        "prima_backends gave a SolverPlugin, not a BackendPlugin",
        id="offers the wrong kind",
    ),
    pytest.param(solver("late", api=0), f"solver 'late' speaks API 0, this prima speaks API {API}", id="old api"),
    pytest.param(solver("even"), "solver 'even': the name is taken by prima-llm:even", id="clash with ours"),
    pytest.param(solver("auto"), "not a name that can be used", id="reserved name"),
    pytest.param(solver("Two Words"), "not a name that can be used", id="name with blanks"),
    pytest.param(backend("bad", probe="raise OSError('no driver')"), "probe: OSError: no driver", id="probe raises"),
    pytest.param(backend("bad", probe="return True"), "probe: it gave a bool, not a Probe", id="probe gives garbage"),
    pytest.param(backend("bad", probe="return None"), "probe: it gave a NoneType", id="probe gives nothing"),
]


@pytest.mark.parametrize(("code", "says"), BROKEN)
def test_a_broken_plugin_is_shown_and_hurts_nobody(site: Site, code: str, says: str) -> None:
    site.add("broken", code)
    site.add("zebra", solver("stripes"))
    registry = Registry.load({})
    broken = row(registry, "broken")
    assert broken.state == "fault"
    assert says in broken.fault
    assert broken.hint
    assert (broken.distribution, broken.version) == ("stranger-broken", "1.2")
    assert row(registry, "zebra").state == "ok"
    assert registry.solver("stripes").name == "stripes"
    assert_others_work(registry)


@pytest.mark.parametrize(("code", "says"), BROKEN)
def test_strict_makes_a_fault_an_error(site: Site, code: str, says: str) -> None:
    site.add("broken", code)
    with pytest.raises(PluginError) as error:
        Registry.load({"PRIMA_STRICT_PLUGINS": "1"}).report()
    assert says in error.value.message
    assert "stranger-broken:broken" in error.value.message


def test_what_a_broken_plugin_registered_goes_and_what_others_registered_stays(site: Site) -> None:
    heard = "heard = []\n@hookimpl\ndef prima_on_event(event): heard.append(event)\n"
    site.add("a", heard)
    site.add("b", heard + "@hookimpl\ndef prima_nonsense(): pass\n")
    registry = Registry.load({})
    registry.emit(NodeLost("n", "gone"))
    assert len(sys.modules["a_plugin"].heard) == 1
    assert sys.modules["b_plugin"].heard == []


def test_one_object_behind_two_entry_points_counts_once(site: Site) -> None:
    site.add("first", solver("one"), points="[prima]\nfirst = first_plugin\nsecond = first_plugin\n")
    registry = Registry.load({})
    assert row(registry, "first").state == "ok"
    assert "already registered by stranger-first:first" in row(registry, "second").fault
    assert registry.solver("one").name == "one"


def test_the_newcomer_of_two_strangers_is_faulted(site: Site) -> None:
    site.add("beta", solver("same"))
    site.add("alpha", solver("same"))
    registry = Registry.load({})
    assert row(registry, "alpha").state == "ok"
    assert "taken by stranger-alpha:alpha" in row(registry, "beta").fault


def test_other_offers_of_a_plugin_with_one_bad_offer_live(site: Site) -> None:
    both = "[SolverPlugin('even', 1, '', print), SolverPlugin('odd', 1, '', print), 'x']"
    site.add("mixed", f"@hookimpl\ndef prima_solvers(): return {both}")
    registry = Registry.load({})
    assert row(registry, "mixed").offers == ("solver odd",)
    assert row(registry, "mixed").state == "fault"
    assert registry.solver("odd").name == "odd"


def test_a_hook_marked_optional_may_be_unknown(site: Site) -> None:
    site.add("modern", solver("new") + "@hookimpl(optionalhook=True)\ndef prima_of_the_future(): pass\n")
    registry = Registry.load({})
    assert row(registry, "modern").state == "ok"
    assert registry.solver("new").name == "new"


def test_an_unhashable_plugin_object_is_a_plugin_like_any_other(site: Site) -> None:
    code = (
        "class Plugin(list):\n    @hookimpl\n    def prima_on_event(self, event): self.append(event)\nplugin = Plugin()"
    )
    site.add("odd", code, points="[prima]\nodd = odd_plugin:plugin\n")
    registry = Registry.load({})
    registry.emit(NodeLost("n", "gone"))
    assert sys.modules["odd_plugin"].plugin == [NodeLost("n", "gone")]
    assert_others_work(registry)


@pytest.mark.parametrize("text", ["[prima]\nthis is no entry point\n", "[prima]\n = \n"])
def test_a_damaged_entry_point_file_hurts_nobody(site: Site, text: str) -> None:
    site.add("fine", solver("fine"))
    site.add("damaged", "", points=text)
    registry = Registry.load({})
    (damaged,) = [row for row in registry.report() if row.distribution == "stranger-damaged"]
    assert damaged.state == "fault"
    assert row(registry, "fine").state == "ok"
    assert_others_work(registry)


def test_a_distribution_without_metadata_hurts_nobody(site: Site) -> None:
    site.add("nameless", solver("fine"))
    (site.folder / "stranger_nameless-1.2.dist-info" / "METADATA").unlink()
    registry = Registry.load({})
    assert row(registry, "nameless").distribution == "?"
    assert registry.solver("fine").name == "fine"


def test_a_distribution_that_is_installed_twice_counts_once(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site.add("twin", solver("twin"))
    site.add("other", "", distribution="Stranger.Twin", points="[prima]\ntwin = twin_plugin\n")
    assert row(Registry.load({}), "twin").state == "ok"


# ---------------------------------------------------------------- settings


def test_only_allowed_plugins_are_imported(site: Site) -> None:
    site.add("loud", "raise RuntimeError('imported')")
    registry = Registry.load({"PRIMA_PLUGINS": "even, prima-llm"})
    assert row(registry, "loud").state == "disabled"
    assert registry.faults == ()
    assert registry.solver("even").name == "even"


def test_a_disabled_plugin_is_not_imported_and_says_so_when_asked_for(site: Site) -> None:
    site.add("loud", "raise RuntimeError('imported')")
    registry = Registry.load({"PRIMA_DISABLE_PLUGINS": "stranger-loud,torch"})
    assert {row(registry, "loud").state, row(registry, "torch").state} == {"disabled"}
    with pytest.raises(PluginError, match="no backend 'torch': plugin prima-llm:torch: it is disabled") as error:
        registry.open_backend("torch", OPTIONS)
    assert "PRIMA_DISABLE_PLUGINS" in error.value.hint


def test_an_allowed_plugin_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'evne'.*did you mean 'even'"):
        Registry.load({"PRIMA_PLUGINS": "evne"})


def test_a_switch_that_is_neither_on_nor_off_is_an_error() -> None:
    with pytest.raises(ConfigError, match="PRIMA_STRICT_PLUGINS is 'maybe'"):
        Registry.load({"PRIMA_STRICT_PLUGINS": "maybe"})


def test_trace_logs_what_is_loaded_and_the_traceback_of_a_fault(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.add("broken", "raise RuntimeError('boom')")
    logger = logging.getLogger("prima_core.plugins")
    level = logger.level
    try:
        Registry.load({"PRIMA_TRACE_PLUGINS": "1"})
    finally:
        logger.setLevel(level)
    assert "prima-llm:even" in caplog.text
    assert "raise RuntimeError('boom')" in caplog.text


# ---------------------------------------------------------------- asked for by name


def test_a_backend_whose_library_is_missing_is_an_error_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prima_torch.support.find_spec", lambda name: None)
    with pytest.raises(PluginError) as error:
        Registry.load({}).open_backend("torch", OPTIONS)
    assert error.value.message == "backend 'torch' is not usable: torch is not installed"
    assert error.value.hint == 'pip install "prima-llm[torch]"'


@pytest.mark.parametrize("kind", ["backend", "solver", "transport"])
def test_an_unknown_name_is_answered_with_the_names_there_are(kind: str) -> None:
    registry = Registry.load({})
    ask: dict[str, Callable[[], object]] = {
        "backend": lambda: registry.open_backend("nunpy", OPTIONS),
        "solver": lambda: registry.solver("evenn"),
        "transport": lambda: registry.transport("tpc://127.0.0.1:1"),
    }
    hint = {"backend": "'numpy'? there are: mlx, numpy, torch", "solver": "'even'", "transport": "'tcp'"}[kind]
    with pytest.raises(PluginError, match=f"there is no {kind}") as error:
        ask[kind]()
    assert f"did you mean {hint}" in error.value.hint


def test_a_name_whose_plugin_is_broken_is_answered_with_the_fault(site: Site) -> None:
    site.add("broken", "raise RuntimeError('boom')")
    with pytest.raises(PluginError, match=r"there is no solver 'broken': .*RuntimeError: boom"):
        Registry.load({}).solver("broken")


def test_a_backend_that_fails_to_open_is_an_error_of_the_plugin(site: Site) -> None:
    site.add("bad", backend("bad", open="raise OSError('no driver')"))
    registry = Registry.load({})
    with pytest.raises(PluginError, match="backend 'bad' failed at open: OSError: no driver"):
        registry.open_backend("bad", OPTIONS)
    assert row(registry, "bad").state == "fault"


def test_a_backend_that_opens_garbage_is_an_error_of_the_plugin(site: Site) -> None:
    site.add("bad", backend("bad", open="return 7"))
    with pytest.raises(PluginError, match="it gave a int, which is no Backend: devices, describe, load, close missing"):
        Registry.load({}).open_backend("bad", OPTIONS)


def test_an_error_of_ours_from_open_passes_as_it_is(site: Site) -> None:
    refusal = "from prima_core.errors import ConfigError; raise ConfigError('no kernels like that')"
    site.add("picky", backend("picky", open=refusal))
    registry = Registry.load({})
    with pytest.raises(ConfigError, match="no kernels like that"):
        registry.open_backend("picky", OPTIONS)
    assert row(registry, "picky").state == "ok"


def test_what_keeps_a_usable_backend_from_its_best_is_shown(site: Site) -> None:
    site.add("lame", backend("lame", probe="return Probe(True, 'no kernels', 'install a compiler')"))
    lame = row(Registry.load({}), "lame")
    assert (lame.state, lame.fault, lame.hint) == ("ok", "no kernels", "install a compiler")


def test_a_probe_is_asked_once(site: Site) -> None:
    site.add("slow", backend("slow", probe="calls.append(1); return Probe(usable=True)") + "\ncalls = []")
    registry = Registry.load({})
    registry.report()
    registry.open_backend("slow", OPTIONS)
    assert registry.backend("slow").probe() == Probe(usable=True)
    assert sys.modules["slow_plugin"].calls == [1]


def test_a_solver_that_raises_or_gives_garbage_is_an_error_of_the_plugin(site: Site) -> None:
    site.add("mad", solver("mad", plan="1 / 0"))
    site.add("vague", solver("vague", plan="'somehow'"))
    registry = Registry.load({})
    with pytest.raises(PluginError, match="solver 'mad' failed at solve: ZeroDivisionError"):
        registry.solver("mad").solve(PROBLEM)
    with pytest.raises(PluginError, match="solver 'vague' failed at solve: it gave a str, not a Plan"):
        registry.solver("vague").solve(PROBLEM)


def test_a_solver_may_say_that_nothing_fits() -> None:
    registry = Registry.load({})
    with pytest.raises(PlanError):
        registry.solver("even").solve(msgspec.structs.replace(PROBLEM, nodes=(NodeFacts("a", 0),)))
    assert registry.faults == ()


# ---------------------------------------------------------------- transports

TRANSPORT = """
class Transport:
    def listen(self, address, credentials, limits): ...
    def dial(self, address, credentials, limits): ...
    def close(self): closed.append(1); {close}

opened, closed = [], []
def open_transport(): opened.append(1); {open}

@hookimpl
def prima_transports():
    return [TransportPlugin(scheme="pigeon", api=1, open=open_transport)]
"""


def test_a_transport_is_opened_once_and_closed_with_the_registry(site: Site) -> None:
    site.add("pigeon", TRANSPORT.format(open="return Transport()", close=""))
    registry = Registry.load({})
    assert registry.transport("pigeon://roof") is registry.transport("pigeon://tree")
    registry.close()
    registry.close()
    assert (sys.modules["pigeon_plugin"].opened, sys.modules["pigeon_plugin"].closed) == ([1], [1])


def test_a_transport_that_fails_to_close_is_recorded(site: Site) -> None:
    site.add("pigeon", TRANSPORT.format(open="return Transport()", close="raise OSError('asleep')"))
    registry = Registry.load({})
    registry.transport("pigeon://roof")
    registry.close()
    assert "close: OSError: asleep" in row(registry, "pigeon").fault


@pytest.mark.parametrize(("code", "says"), [("1 / 0", "ZeroDivisionError"), ("return 'bird'", "is no Transport")])
def test_a_transport_that_cannot_be_opened_is_an_error_of_the_plugin(site: Site, code: str, says: str) -> None:
    site.add("pigeon", TRANSPORT.format(open=code, close=""))
    with pytest.raises(PluginError, match=f"transport 'pigeon' failed at open: .*{says}"):
        Registry.load({}).transport("pigeon://roof")


def test_an_address_without_a_scheme_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"'127\.0\.0\.1:80' is not an address") as error:
        Registry.load({}).transport("127.0.0.1:80")
    assert "tcp://" in error.value.hint


# ---------------------------------------------------------------- auto

CHOOSER = "@hookimpl\ndef prima_choose_backend(candidates, model): {does}"


def only(*names: str) -> dict[str, str]:
    return {"PRIMA_PLUGINS": ",".join(names)}


def test_auto_says_what_it_chose_and_why_not_the_others(site: Site) -> None:
    site.add("quick", backend("quick"))
    site.add("slow", backend("slow", devices="return [Device('slow:cpu', 1)]"))
    site.add("absent", backend("absent", probe="return Probe(False, 'no such chip', 'buy one')"))
    site.add("same", backend("same"))
    opened, why = Registry.load(only("quick", "slow", "absent", "same")).open_backend("auto", OPTIONS)
    assert [device.id for device in opened.devices()] == ["quick:gpu", "slow:cpu"]
    assert why == (
        "computing on quick:gpu, slow:cpu; not on same:gpu (may be the same hardware; --backend can name them);"
        " absent: no such chip"
    )
    closed = {name: sys.modules[f"{name}_plugin"].Backend.closed for name in ("quick", "slow", "same")}
    assert closed == {"quick": [], "slow": [], "same": ["same"]}


@pytest.mark.parametrize(
    "bad",
    [
        backend("bad", probe="raise OSError('no driver')"),
        backend("bad", open="raise OSError('no driver')"),
        backend("bad", open="return 7"),
        backend("bad", devices="raise OSError('no driver')"),
        backend("bad", devices="return ['bad:gpu']"),
        backend("bad", devices="return [Device('good:gpu', 1)]"),
        backend("bad", devices="return [Device('bad:gpu', 1, growth=dict(F16=0.5))]"),
        backend("bad", devices="return [Device('bad:gpu', 1), Device('bad:gpu', 2)]"),
        backend("bad", devices="return [Device('bad:\\x1b[2J', 1)]"),
        backend("bad", devices="return [Device('bad:gpu', -1)]"),
        backend("bad", devices="return [Device('bad:gpu', 1.5)]"),
        backend("bad", devices="return [Device('bad:gpu', 1 << 63)]"),
    ],
)
def test_auto_goes_on_past_a_broken_backend(site: Site, bad: str) -> None:
    site.add("bad", bad)
    site.add("good", backend("good"))
    registry = Registry.load(only("bad", "good"))
    _, why = registry.open_backend("auto", OPTIONS)
    assert why.startswith("computing on good:gpu; bad: ")
    assert len(why) > len("computing on good:gpu; bad: ")
    assert row(registry, "bad").state == "fault"


def test_auto_under_strict_raises_at_a_broken_backend(site: Site) -> None:
    site.add("bad", backend("bad", open="raise OSError('no driver')"))
    site.add("good", backend("good"))
    with pytest.raises(PluginError, match="no driver"):
        Registry.load({**only("bad", "good"), "PRIMA_STRICT_PLUGINS": "1"}).open_backend("auto", OPTIONS)


def test_auto_without_a_usable_backend_names_every_reason(site: Site) -> None:
    site.add("empty", backend("empty", devices="return []"))
    site.add("absent", backend("absent", probe="return Probe(False, 'no such chip')"))
    with pytest.raises(PluginError, match=r"no backend can be used: .*no such chip"):
        Registry.load(only("empty", "absent")).open_backend("auto", OPTIONS)
    assert sys.modules["empty_plugin"].Backend.closed == ["empty"]


def test_a_plugin_may_choose_the_devices(site: Site) -> None:
    site.add("one", backend("one"))
    site.add("two", backend("two"))
    site.add("three", backend("three"))
    site.add("taste", CHOOSER.format(does="return ('two:gpu', 'one:gpu', 'two:gpu')"))
    opened, why = Registry.load(only("one", "two", "three", "taste")).open_backend("auto", OPTIONS)
    assert [device.id for device in opened.devices()] == ["two:gpu", "one:gpu"]
    assert why == "computing on two:gpu, one:gpu, chosen by stranger-taste:taste; not on three:gpu"


@pytest.mark.parametrize(
    "does", ["return None", "1 / 0", "return ()", "return ('sun:gpu',)", "return [{}]", "return 7"]
)
def test_a_chooser_without_a_valid_opinion_leaves_the_choice_to_others(site: Site, does: str) -> None:
    site.add("one", backend("one"))
    site.add("taste", CHOOSER.format(does=does))
    registry = Registry.load(only("one", "taste"))
    _, why = registry.open_backend("auto", OPTIONS)
    assert why == "computing on one:gpu"
    assert row(registry, "taste").state == ("ok" if does == "return None" else "fault")


# ---------------------------------------------------------------- events and commands


def test_a_listener_that_raises_is_recorded_once_and_the_others_hear(site: Site) -> None:
    site.add("deaf", "n = []\n@hookimpl\ndef prima_on_event(event): n.append(1); raise ValueError(f'no. {len(n)}')")
    site.add("keen", "heard = []\n@hookimpl\ndef prima_on_event(event): heard.append(event)")
    registry = Registry.load({})
    events = [NodeLost("n", "gone"), NodeLost("m", "gone")]
    for event in events:
        registry.emit(event)
    assert sys.modules["keen_plugin"].heard == events
    assert row(registry, "deaf").fault == "event: ValueError: no. 1"


def test_plugins_add_commands_and_cannot_take_one(site: Site) -> None:
    command = "    import click\n    cli.add_command(click.Command('{name}'))\n"
    add = "@hookimpl\ndef prima_add_commands(cli):\n"
    site.add("good", add + command.format(name="good"))
    site.add("thief", add + command.format(name="serve") + command.format(name="thief"))
    site.add("vandal", add + "    cli.commands.clear()\n")
    site.add("clumsy", add + "    raise RuntimeError('oops')\n")
    serve = click.Command("serve")
    cli = click.Group(commands=[serve])
    registry = Registry.load({})
    registry.add_commands(cli)
    assert sorted(cli.commands) == ["good", "serve", "thief"]
    assert cli.commands["serve"] is serve
    assert row(registry, "thief").fault == "commands: the command 'serve' is taken"
    assert [row(registry, name).state for name in ("good", "vandal", "clumsy")] == ["ok", "fault", "fault"]


def test_every_error_of_the_registry_has_a_hint(site: Site) -> None:
    site.add("bad", backend("bad", probe="raise OSError('no driver')"))
    registry = Registry.load(dict(os.environ))
    for ask in (
        lambda: registry.open_backend("bad", OPTIONS),
        lambda: registry.open_backend("none", OPTIONS),
        lambda: registry.solver("none"),
        lambda: registry.transport("none"),
    ):
        with pytest.raises(PrimaError) as error:
            ask()
        assert error.value.hint
