"""Steps through shards by hand, as plugin authors get it."""

from prima_core.testing.driving import (
    FloatArray,
    Visit,
    chunked,
    joined,
    logits_of_all,
    opened,
    pass_through,
    step_of,
)

__all__ = ["FloatArray", "Visit", "chunked", "joined", "logits_of_all", "opened", "pass_through", "step_of"]
