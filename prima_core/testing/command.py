"""`python -m prima_core.testing.checks`: the kits for an installed plugin, by its name.

python -m prima_core.testing.checks backend torch --device torch:cpu --blocks 0.01
python -m prima_core.testing.checks transport tcp --address tcp://127.0.0.1:0
python -m prima_core.testing.checks solver even --json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout

import rich_click as click

from prima_core.errors import PrimaError
from prima_core.interfaces import BackendOptions
from prima_core.plugins import Registry
from prima_core.testing.backends.check import check_backend
from prima_core.testing.backends.subject import Tolerance
from prima_core.testing.examples import ARCHS, TYPES
from prima_core.testing.report import CheckFailed, Report
from prima_core.testing.solvers import check_solver
from prima_core.testing.transports import STRANGERS, check_transport

STANDARD = Tolerance()

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def checks() -> None:
    """Check whether a plugin does what prima asks of it; exit code 1: it does not, 2: nobody can tell."""


@checks.command()
@click.argument("name")
@click.option("--device", help="The device to check.  [default: the backend's first]")
@click.option("--kernels", default="auto", help="As prima's --kernels.")
@click.option("-t", "--threads", default=0, help="As prima's --threads.")
@click.option("--type", "types", type=click.Choice(TYPES), multiple=True, help="Only this type; may be repeated.")
@click.option("--family", "families", type=click.Choice(ARCHS), multiple=True, help="As --type, a family.")
@click.option("--logits", default=STANDARD.logits, show_default=True, help="Largest relative error of logits.")
@click.option("--blocks", type=float, help="The same with quantised matrices.  [default: that of --logits]")
@click.option("--batch", default=STANDARD.batch, show_default=True, help="The same between a row alone and in company.")
@as_json
def backend(
    name: str,
    device: str | None,
    kernels: str,
    threads: int,
    types: tuple[str, ...],
    families: tuple[str, ...],
    logits: float,
    blocks: float | None,
    batch: float,
    as_json: bool,
) -> None:
    """Check a backend, e.g. `torch`."""
    options = BackendOptions(threads, kernels)

    def check(registry: Registry) -> Report:
        return check_backend(
            registry.backend(name),
            device=device,
            options=options,
            tolerance=Tolerance(logits, blocks, batch=batch),
            types=[type for type in TYPES if not types or type in types],
            families=[arch for arch in ARCHS if not families or arch in families],
        )

    _tell(check, as_json)


@checks.command()
@click.argument("scheme")
@click.option("--address", default="", help="Where to listen, such that a free place is found.  [default: SCHEME://]")
@click.option("--trusting", is_flag=True, help="It asks for no credentials: only friends can reach it.")
@click.option("--one-process", is_flag=True, help="Its links reach no other process.")
@as_json
def transport(scheme: str, address: str, trusting: bool, one_process: bool, as_json: bool) -> None:
    """Check a transport by its scheme, e.g. `tcp --address tcp://127.0.0.1:0`."""
    strangers = None if trusting else STRANGERS

    def check(registry: Registry) -> Report:
        registry.transport(f"{scheme}://")  # of an unknown one every check would fail
        return check_transport(scheme, address=address, wrong_credentials=strangers, crosses_processes=not one_process)

    _tell(check, as_json)


@checks.command()
@click.argument("name")
@as_json
def solver(name: str, as_json: bool) -> None:
    """Check a solver, e.g. `even`."""
    _tell(lambda registry: check_solver(name), as_json)


def _tell(check: Callable[[Registry], Report], as_json: bool) -> None:
    """Print the report; leave with exit code 1 where something failed."""
    try:
        with _prints_to_stderr(), closing(Registry.load(os.environ)) as registry:
            report = check(registry)
    except CheckFailed as failed:
        report = failed.report
    except PrimaError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(report.to_json() if as_json else str(report))
    if report.failures:
        click.echo(str(CheckFailed(report)), err=True)
        sys.exit(1)


@contextmanager
def _prints_to_stderr() -> Iterator[None]:
    """Standard output is for the report alone: plugins print too, from native code and from other processes as well."""
    with os.fdopen(os.dup(1), "w") as kept, redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 1)
