"""A solver in a process of its own: `python -m prima_core.testing.fresh MODULE NAME`, problems in, plans out, as JSON;
with one word only, the solver that is installed under this name.

What it prints goes to standard error.

Once it has answered the first problem (by then it has imported what it needs) it can open no socket, start no process
and write no file.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import cast

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, plan_to_json
from prima_core.plan.problem import Problem, problem_from_json
from prima_core.plugins import Registry

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    solve = _find(*sys.argv[1:])
    answers: list[str] = []
    for text in json.load(sys.stdin):
        answers.append(_answer(solve, problem_from_json(text.encode())))
        if len(answers) == 1:
            sys.addaudithook(_refuse)
    with out:
        json.dump(answers, out)


def _find(module: str, name: str = "") -> Callable[[Problem], Plan]:
    if not name:
        return Registry.load(os.environ).solver(module).solve
    found: object = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return cast("Callable[[Problem], Plan]", found)  # whatever it is


def _answer(solve: Callable[[Problem], Plan], problem: Problem) -> str:
    """The plan, or the name of the error; also of one that is a fault: it is compared with what came before."""
    try:
        return plan_to_json(solve(problem)).decode()
    except PlanError:
        return PlanError.__name__
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the border to a stranger's code: what it raises is the answer
        return f"{type(error).__name__}: {error}"


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
    if writes or event.startswith(_FORBIDDEN):
        raise RuntimeError(f"a solver is pure, and this one wanted to {event}")


if __name__ == "__main__":
    main()
