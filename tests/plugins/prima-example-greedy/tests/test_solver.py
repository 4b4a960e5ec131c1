from prima_core.testing.checks import check_solver
from prima_example_greedy.plugin import prima_solvers


def test_it_does_what_prima_asks_of_a_solver() -> None:
    [plugin] = prima_solvers()
    print(check_solver(plugin))
