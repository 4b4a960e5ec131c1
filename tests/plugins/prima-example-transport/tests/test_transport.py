from prima_core.testing.checks import check_transport
from prima_example_transport.plugin import prima_transports


def test_it_does_what_prima_asks_of_a_transport() -> None:
    [plugin] = prima_transports()
    print(check_transport(plugin, wrong_credentials=None))
