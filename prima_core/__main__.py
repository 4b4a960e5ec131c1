"""`python -m prima_core` is `prima`."""

from prima_core.cli import main

main()
