"""The plugin author's guide says what is so."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from prima_core import hookspecs, interfaces, plugins
from tests.supported import table, told

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "plugins.md").read_text()
EXAMPLES = ROOT / "tests" / "plugins"
MOST_LINES = 80  # from nothing to a published plugin of each kind
BLOCKS = re.findall(r"^```\w+ ([^\n]+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def block(title: str) -> str:
    (text,) = [text for found, text in BLOCKS if found == title]
    return str(text)


def test_the_guide_lists_the_hooks_with_their_signatures() -> None:
    told = {
        node.name: (ast.unparse(node.args), ast.unparse(node.returns) if node.returns else "")
        for node in ast.parse(block("hooks")).body
        if isinstance(node, ast.FunctionDef)
    }
    source = ast.parse(inspect.getsource(hookspecs))
    specified = {
        node.name: (ast.unparse(node.args), ast.unparse(node.returns) if node.returns else "")
        for node in source.body
        if isinstance(node, ast.FunctionDef)
    }
    assert told == specified


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs) if name.startswith("prima_")])
def test_every_hook_is_explained(hook: str) -> None:
    assert inspect.getdoc(getattr(hookspecs, hook))
    assert len(re.findall(rf"\b{hook}\b", GUIDE)) >= 2


@pytest.mark.parametrize(("title", "text"), [found for found in BLOCKS if found[0].startswith(("file=", "part="))])
def test_the_examples_in_the_guide_are_those_that_are_tested(title: str, text: str) -> None:
    kind, path = title.split("=")
    file = (EXAMPLES / path).read_text()
    assert text == file if kind == "file" else text in file


@pytest.mark.parametrize("kind", ["solver", "backend", "transport"])
def test_each_kind_of_plugin_is_reached_in_few_lines(kind: str) -> None:
    chapters = {text.partition("\n")[0]: text for text in GUIDE.split("\n## ")}
    way = chapters["From nothing to a plugin"] + "\n" + chapters[f"A {kind}"]
    assert len(way.splitlines()) <= MOST_LINES
    assert re.search(r"^python -m prima_core.testing.checks ", way, re.MULTILINE)


@pytest.mark.parametrize("descriptor", [interfaces.BackendPlugin, interfaces.TransportPlugin])
def test_descriptors_are_shown_with_all_their_fields(descriptor: type) -> None:
    shown = block(f"descriptor={descriptor.__name__}").strip()
    names = re.fullmatch(rf"{descriptor.__name__}\((.*)\)", shown)
    assert names
    assert names[1].split(", ") == [field.name for field in fields(descriptor)]


@pytest.mark.parametrize("protocol", ["Backend", "Shard", "Transport", "ReceiveLink", "SendLink"])
def test_protocols_are_shown_with_all_their_methods(protocol: str) -> None:
    (line,) = re.findall(rf"^- `{protocol}`: (.*?)(?=^- |^$)", GUIDE, re.MULTILINE | re.DOTALL)
    for name, member in vars(getattr(interfaces, protocol)).items():
        if isinstance(member, property):
            assert f"`{name}`" in line
        elif inspect.isfunction(member) and not name.startswith("_"):
            parameters = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
            assert f"`{name}({', '.join(parameters)})`" in line


def test_devices_are_shown_with_all_their_facts() -> None:
    (line,) = re.findall(r"^- `Device`: (.*?)(?=^- )", GUIDE, re.MULTILINE | re.DOTALL)
    assert [field.name for field in fields(interfaces.Device) if f"`{field.name}`" not in line] == []


def test_the_variables_of_the_loader_are_told() -> None:
    read = set(re.findall(r"PRIMA_\w+", inspect.getsource(plugins.PluginSettings.read)))
    assert read == {"PRIMA_PLUGINS", "PRIMA_DISABLE_PLUGINS", "PRIMA_STRICT_PLUGINS", "PRIMA_TRACE_PLUGINS"}
    assert all(f"`{name}=" in GUIDE for name in read)


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert broken == []


def test_the_readme_tells_what_is_supported_as_the_code_has_it() -> None:
    assert told() == table(), "run `python -m tests.supported`"
