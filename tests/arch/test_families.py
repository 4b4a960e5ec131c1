import numpy as np
import pytest

from prima_core.arch.families import family
from prima_core.arch.shard import OpsShard
from prima_core.errors import ModelError
from prima_core.interfaces import KvType, Layers, Shard, Slice
from prima_core.model.spec import ModelSpec
from prima_core.testing.driving import logits_of_all, opened, step_of
from prima_numpy.ops import ReferenceOps, exact_product
from tests.arch.small import SmallModel, logits_in_float64, small_model, small_spec

IDS = list(np.random.default_rng(1).integers(0, 50, 21))


def whole(model: SmallModel) -> Shard:
    layers = Layers(0, model.spec.n_layers)
    return OpsShard(
        ReferenceOps(exact_product, KvType.F32), model.spec, Slice((layers,), True, True), model.store()
    )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        small_spec("llama"),
        small_spec("llama", n_heads=3, n_kv_heads=3, tied_output=True),
        small_spec("llama", n_heads=6, n_kv_heads=1, head_dim=10, factor=4.0),
        small_spec("llama", rope_dim=4),
        small_spec("qwen2"),
        small_spec("qwen2", n_heads=3, n_kv_heads=1, head_dim=6, rope_dim=4, tied_output=True),
    ],
)
@pytest.mark.parametrize("rope_factors", [False, True])
def test_exact_twin_agrees_with_a_float64_model_without_cache(spec: ModelSpec, rope_factors: bool) -> None:
    model = small_model(spec, rope_factors=rope_factors)
    step = step_of(0, IDS, kv=[opened(0)])
    logits = logits_of_all([(whole(model), Layers(0, spec.n_layers))], step)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, logits_in_float64(model, IDS), rtol=0, atol=5e-5)


def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(ModelError, match=r"'mamba' is not supported .*llama, .*qwen2"):
        family("mamba")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_rope_factors_must_be_positive(bad: float) -> None:
    model = small_model(small_spec(), rope_factors=True)
    model.shared["rope_freqs.weight"][1] = bad
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        whole(model)
