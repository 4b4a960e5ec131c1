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
EXAMPLE = ROOT / "tests" / "plugins" / "prima-example-greedy"
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


@pytest.mark.parametrize("path", ["pyproject.toml", "prima_example_greedy/plugin.py", "prima_example_greedy/solver.py"])
def test_the_example_in_the_guide_is_the_one_that_is_tested(path: str) -> None:
    assert block(f"file={path}") == (EXAMPLE / path).read_text()


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
