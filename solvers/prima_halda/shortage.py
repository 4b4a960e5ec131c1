"""Problems of which no plan is of any use. What helps where room is lacking is `prima_core.plan.cures`."""

from __future__ import annotations

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional

_MOST_S = 3600.0


def shared_out(problem: Problem) -> Plan:
    """As `even` has it, with the output part on the head or, where that cannot be, on the first node where it can.
    Raises PlanError where it can be nowhere."""
    errors = list[PlanError]()
    for name in problem.outputs:
        try:
            plan = proportional(problem.with_output(name))
            complete(plan, problem)
        except PlanError as error:
            errors.append(error)
        else:
            return plan
    elsewhere = "; with the output part on another node it does not fit either" if len(errors) > 1 else ""
    raise PlanError(f"{errors[0].message}{elsewhere}", hint=errors[0].hint) from errors[0]


def check_layers(problem: Problem) -> None:
    """Raises PlanError for a model without layers."""
    if not problem.model.n_layers:
        raise PlanError(f"{problem.model.name} has no layers", hint="layer_bytes is to have a size for each of them")


def check_use(forecast: Forecast) -> None:
    """Raises PlanError where the best plan that was found is foretold to take longer than anybody waits for a token."""
    if forecast.token_s <= _MOST_S:
        return
    raise PlanError(
        f"no plan is of any use: the best takes {forecast.token_s / 3600:,.1f} hours per token, most of it"
        f" {forecast.limit}",
        hint=f"that would have to be {forecast.token_s:,.0f} times faster for a token in a second: see that its rate is"
        " what the problem says",
    )
