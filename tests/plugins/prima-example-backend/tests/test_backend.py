from prima_core.testing.checks import check_backend
from prima_example_backend.plugin import prima_backends


def test_it_does_what_prima_asks_of_a_backend() -> None:
    [plugin] = prima_backends()
    print(check_backend(plugin, types=["F32", "F16", "Q8_0", "Q4_K"]))  # the last to see it refused
