"""The command line: names, help and settings of every command. What they do is in `commands/`, imported when run."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.shell_completion import CompletionItem

from prima_core.config import options
from prima_core.errors import PrimaError
from prima_core.model.visible import visible

if TYPE_CHECKING:
    from prima_core.plugins import Registry

CTRL_C = 130
OWNER = "prima-owner-"  # how threads that compute are named, see `ring.worker`

NODE = ("backend", "threads", "kernels", "memory")
RING = ("nodes", "plan", "solver", "goal", "rounds", "transport", "wire")
CONTEXT = ("context", "kv_type", "chunk")
SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
JOINING = ("listen", "advertise", "token_file")

HTTP_PANEL = "HTTP"
CONTEXT_PANEL = "Context"
SAMPLING_PANEL = "Sampling"
NODE_PANEL = "Computing"
RING_PANEL = "Ring"

general = click.option_panel("Options")  # first in the help
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: names of models; files where none begins so."""
    from prima_core.library.folder import entries, models_folder, shown_names

    names = shown_names(entries(models_folder(context.params.get("models")))).values()
    fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *fitting]


model_argument = click.argument("model", required=False, metavar="[MODEL]", shell_complete=_complete)


class Program(click.RichGroup):
    """Ctrl-C ends a command in order, with the exit code that shells know, and without click's "Aborted!"."""

    def invoke(self, ctx: click.Context) -> Any:  # Any: as click's own
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(CTRL_C)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="prima-llm", prog_name="prima")
def cli() -> None:
    """prima makes one LLM server out of the computers of a home.

    MODEL is the path of a GGUF file, or the name of a model that `prima pull` has fetched; without it the small
    built-in demonstration model is used.
    """


@cli.command()
@general
@model_argument
@options("models", "chat_template", "log_level")
@options("host", "port", "api_key", "queue", panel=HTTP_PANEL)
@options(*CONTEXT, "context_shift", "parallel", panel=CONTEXT_PANEL)
@options(*SAMPLING, panel=SAMPLING_PANEL)
@options(*NODE, panel=NODE_PANEL)
@options(*RING, "wait", *JOINING, "name", panel=RING_PANEL)
@click.pass_obj
def serve(registry: Registry, /, model: str | None, **settings: Any) -> None:  # Any: the values of config.TABLE
    """Serve MODEL with an OpenAI-compatible API."""
    from prima_core.commands import serve as commands

    _start(settings)
    commands.serve(model, settings, registry)


@cli.command()
@general
@click.argument("head", metavar="HOST:PORT")
@options("model_file", "models", "log_level")
@options(*NODE, panel=NODE_PANEL)
@options(*JOINING, "name", panel=RING_PANEL)
@click.option("--until-stdin-closes", is_flag=True, hidden=True, help="Leave when standard input ends.")
@click.pass_obj
def join(registry: Registry, /, head: str, until_stdin_closes: bool, **settings: Any) -> None:
    """Let this machine compute for the head at HOST:PORT."""
    from prima_core.commands import serve as commands

    _start(settings)
    commands.join(head, until_stdin_closes, settings, registry)


@cli.command()
@general
@model_argument
@click.option("-p", "--prompt", required=True, help="What to ask; - reads standard input.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@options("models", "max_tokens", "chat_template", "log_level")
@options(*SAMPLING, "seed", panel=SAMPLING_PANEL)
@options(*CONTEXT, "context_shift", panel=CONTEXT_PANEL)
@options(*NODE, panel=NODE_PANEL)
@options(*RING, panel=RING_PANEL)
@as_json
@click.pass_obj
def run(registry: Registry, /, model: str | None, prompt: str, raw: bool, as_json: bool, **settings: Any) -> None:
    """Answer one prompt."""
    from prima_core.commands import generate

    _start(settings)
    generate.run(model, sys.stdin.read() if prompt == "-" else prompt, raw, as_json, settings, registry)


@cli.command()
@general
@model_argument
@options("models", "max_tokens", "chat_template", "log_level")
@options(*SAMPLING, "seed", panel=SAMPLING_PANEL)
@options(*CONTEXT, "context_shift", panel=CONTEXT_PANEL)
@options(*NODE, panel=NODE_PANEL)
@options(*RING, panel=RING_PANEL)
@click.pass_obj
def chat(registry: Registry, /, model: str | None, **settings: Any) -> None:
    """Talk to MODEL in the terminal."""
    from prima_core.commands import generate

    _start(settings)
    generate.chat(model, settings, registry)


@cli.command()
@general
@model_argument
@click.option("--prompt", "n_prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--gen", "n_gen", type=click.IntRange(min=2), default=64, show_default=True, help="Generated tokens.")
@click.option("--cluster", help="Measure an emulated cluster: four-equal, paper or a TOML file. Linux, as root.")
@options("models", "log_level")
@options(*CONTEXT, panel=CONTEXT_PANEL)
@options(*NODE, panel=NODE_PANEL)
@options(*RING, panel=RING_PANEL)
@as_json
@click.pass_obj
def bench(
    registry: Registry,
    /,
    model: str | None,
    n_prompt: int,
    n_gen: int,
    cluster: str | None,
    as_json: bool,
    **settings: Any,  # Any: the values of config.TABLE
) -> None:
    """Measure the speed of prefill and decode on this machine."""
    _start(settings)
    if cluster is not None:
        from prima_core.cage.limits import Workload
        from prima_core.commands import bench_cluster

        bench_cluster.bench(cluster, model, Workload(n_prompt, n_gen), as_json, settings)
        return
    from prima_core.commands import generate

    generate.bench(model, n_prompt, n_gen, as_json, settings, registry)


@cli.command()
@model_argument
@click.option("--problem", type=click.Path(dir_okay=False), help="Solve this problem file instead.")
@options(
    "models",
    "backend",
    "kernels",
    "memory",
    "nodes",
    "plan",
    "solver",
    "goal",
    "rounds",
    "context",
    "kv_type",
    "parallel",
    "log_level",
)
@click.option("--explain", "explains", is_flag=True, help="Tell it in words and bars, and what would make it faster.")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Draw what happens for a token.")
@as_json
@click.pass_context
def plan(
    context: click.Context,
    /,
    model: str | None,
    problem: str | None,
    explains: bool,
    svg: str | None,
    as_json: bool,
    **settings: Any,  # Any: the values of config.TABLE
) -> None:
    """Show which node would compute which layers."""
    from prima_core.commands import plan as commands
    from prima_core.commands.asked import Given

    _start(settings)
    given = Given({name: context.get_parameter_source(name) for name in settings})
    commands.plan(model, problem, commands.Shown(as_json, explains, svg), settings, given, context.obj)


@cli.command()
@model_argument
@options("models", "backend", "threads", "kernels", "log_level")
@as_json
@click.pass_obj
def profile(registry: Registry, /, model: str | None, as_json: bool, **settings: Any) -> None:
    """Measure how fast this machine computes with MODEL and reads it, anew."""
    from prima_core.commands import profile as commands

    _start(settings)
    commands.profile(model, as_json, settings, registry)


@cli.command()
@options("host", "port", "api_key")
@click.option("--watch", is_flag=True, help="Show it again every second, with what each node does meanwhile.")
@as_json
def ps(watch: bool, as_json: bool, **settings: Any) -> None:
    """Show the nodes of a running server: layers, memory, and where their time goes."""
    from prima_core.commands import ps as commands

    commands.ps(as_json, watch, settings)


@cli.command()
@click.argument("model", shell_complete=_complete)
@click.argument("text", required=False)
@click.option("--special", is_flag=True, help="Read special tokens in TEXT, and add those that begin and end a text.")
@options("models")
@as_json
def tokenize(model: str, text: str | None, special: bool, as_json: bool, models: str | None) -> None:
    """Show the token ids of TEXT (standard input without it). Works for vocabulary-only files too."""
    from prima_core.commands import tokenize as commands

    commands.tokenize(model, text, special, as_json, models)


@cli.command()
@click.argument("source", metavar="hf:OWNER/REPO[:FILE]")
@options("models")
def pull(source: str, **settings: Any) -> None:
    """Fetch a model from a Hugging Face hub; going on where it was interrupted.

    FILE is a file of the repository, or a type like Q8_0. Without it the only model is taken, or the one in Q4_K_M.
    """
    from prima_core.commands import library as commands

    commands.pull(source, settings)


@cli.command()
@options("models")
@as_json
def ls(as_json: bool, **settings: Any) -> None:
    """List the models in the models folder."""
    from prima_core.commands import library as commands

    commands.ls(as_json, settings)


@cli.command()
@click.argument("model", metavar="NAME", shell_complete=_complete)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@options("models")
def rm(model: str, yes: bool, **settings: Any) -> None:
    """Delete a model from the models folder."""
    from prima_core.commands import library as commands

    commands.rm(model, yes, settings)


@cli.command()
@as_json
@click.pass_obj
def plugins(registry: Registry, /, as_json: bool) -> None:
    """List the plugins that were found, and what is wrong with them."""
    from prima_core.commands import plugins as commands

    commands.plugins(as_json, registry)


@cli.command()
@as_json
@click.pass_obj
def doctor(registry: Registry, /, as_json: bool) -> None:
    """Tell what works on this machine, what is missing, and how to get it."""
    from prima_core.commands import doctor as commands

    commands.doctor(as_json, registry)


def _start(settings: dict[str, Any]) -> None:
    from prima_core.commands.setup import set_logging

    set_logging(settings["log_level"])


def main() -> None:
    """The program: errors of ours become one line and exit code 1, Ctrl-C exit code 130."""
    _prepare_process()
    before = threading.enumerate()
    try:
        _run()
    except SystemExit as end:
        if any(thread.name.startswith(OWNER) for thread in threading.enumerate() if thread not in before):
            _leave(end.code)
        raise


def _leave(code: str | int | None) -> None:
    """End now, without the interpreter's own end: that kills a thread which was left behind in a backend's native code,
    and C++ then aborts the process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed by who reads it, or here
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _run() -> None:
    from prima_core.plugins import Registry

    try:
        with closing(Registry.load(os.environ)) as registry:
            registry.add_commands(cli)
            cli(prog_name="prima", obj=registry)
    except PrimaError as error:
        click.echo(visible(f"prima: {error.message}"), err=True)
        if error.hint:
            click.echo(visible(f"  hint: {error.hint}"), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(CTRL_C)


def _prepare_process() -> None:
    """A kill and a closed terminal are as Ctrl-C; a character that a stream cannot carry is replaced."""
    for name in ("SIGTERM", "SIGHUP"):  # the second not on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
