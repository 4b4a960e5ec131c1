"""The command line: names, help and settings of every command. What they do is in `commands/`, imported when run."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import rich_click as click

from prima_core.config import options
from prima_core.errors import PrimaError

NODE = ("backend", "threads", "kernels", "memory")
RING = ("nodes", "wait", "plan", "solver", "transport", "wire")
CONTEXT = ("context", "parallel", "chunk")
SAMPLING = ("temp", "top_k", "top_p", "seed")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model_argument = click.argument("model", required=False, metavar="[MODEL]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="prima-llm", prog_name="prima")
def cli() -> None:
    """prima makes one LLM server out of the computers of a home.

    MODEL is the path of a GGUF file; without it the small built-in demonstration model is used.
    """


@cli.command()
@model_argument
@options(*NODE, *RING, "listen", "advertise", "token_file", "name", *CONTEXT, "temp", "top_k", "top_p")
@options("host", "port", "api_key", "log_level")
def serve(model: str | None, **settings: Any) -> None:  # Any: the values of config.TABLE
    """Serve MODEL with an OpenAI-compatible API."""
    from prima_core.commands import serve as commands

    _start(settings)
    commands.serve(model, settings)


@cli.command()
@click.argument("head", metavar="HOST:PORT")
@options("model_file", "models", *NODE, "listen", "advertise", "token_file", "name", "log_level")
@click.option("--until-stdin-closes", is_flag=True, hidden=True, help="Leave when standard input ends.")
def join(head: str, until_stdin_closes: bool, **settings: Any) -> None:
    """Let this machine compute for the head at HOST:PORT."""
    from prima_core.commands import serve as commands

    _start(settings)
    commands.join(head, until_stdin_closes, settings)


@cli.command()
@model_argument
@click.option("-p", "--prompt", required=True, help="What to ask; - reads standard input.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@options("max_tokens", *SAMPLING, *NODE, *RING, *CONTEXT, "log_level")
@as_json
def run(model: str | None, prompt: str, raw: bool, as_json: bool, **settings: Any) -> None:
    """Answer one prompt."""
    from prima_core.commands import generate

    _start(settings)
    generate.run(model, sys.stdin.read() if prompt == "-" else prompt, raw, as_json, settings)


@cli.command()
@model_argument
@options("max_tokens", *SAMPLING, *NODE, *RING, *CONTEXT, "log_level")
def chat(model: str | None, **settings: Any) -> None:
    """Talk to MODEL in the terminal."""
    from prima_core.commands import generate

    _start(settings)
    generate.chat(model, settings)


@cli.command()
@model_argument
@click.option("--prompt", "n_prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--gen", "n_gen", type=click.IntRange(min=2), default=64, show_default=True, help="Generated tokens.")
@options(*NODE, *RING, "context", "chunk", "log_level")
@as_json
def bench(model: str | None, n_prompt: int, n_gen: int, as_json: bool, **settings: Any) -> None:
    """Measure the speed of prefill and decode on this machine."""
    from prima_core.commands import generate

    _start(settings)
    generate.bench(model, n_prompt, n_gen, as_json, settings)


@cli.command()
@model_argument
@click.option("--problem", type=click.Path(dir_okay=False), help="Solve this problem file instead.")
@options("backend", "threads", "kernels", "memory", "nodes", "plan", "solver", "transport", *CONTEXT, "log_level")
@as_json
def plan(model: str | None, problem: str | None, as_json: bool, **settings: Any) -> None:
    """Show which node would compute which layers."""
    from prima_core.commands import tools

    _start(settings)
    tools.plan(model, problem, as_json, settings)


@cli.command()
@click.argument("model")
@click.argument("text", required=False)
@click.option("--special", is_flag=True, help="Read special tokens in TEXT, and add those that begin and end a text.")
@as_json
def tokenize(model: str, text: str | None, special: bool, as_json: bool) -> None:
    """Show the token ids of TEXT (standard input without it). Works for vocabulary-only files too."""
    from prima_core.commands import tools

    tools.tokenize(model, text, special, as_json)


@cli.command()
@as_json
def plugins(as_json: bool) -> None:
    """List the plugins that were found, and what is wrong with them."""
    from prima_core.commands import tools

    logging.disable()  # the table tells the faults
    tools.plugins(as_json)


@cli.command()
@as_json
def doctor(as_json: bool) -> None:
    """Tell what works on this machine, what is missing, and how to get it."""
    from prima_core.commands import tools

    logging.disable()
    tools.doctor(as_json)


def _start(settings: dict[str, Any]) -> None:
    from prima_core.commands.setup import set_logging

    set_logging(settings["log_level"])


def main() -> None:
    """The program: errors of ours become one line and exit code 1, Ctrl-C exit code 130."""
    from prima_core.plugins import Registry

    try:
        Registry.load(os.environ).add_commands(cli)
        cli(prog_name="prima")
    except PrimaError as error:
        click.echo(f"prima: {error.message}", err=True)
        if error.hint:
            click.echo(f"  hint: {error.hint}", err=True)
        sys.exit(1)
