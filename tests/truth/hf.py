"""The same tiny model in `transformers`: built from its weights, or read by `transformers` from the GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from prima_core.testing.tinyfamilies import longrope_factors
from prima_core.testing.tinymodel import TinyModel, hf_weights

_NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mistral3": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3Moe",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi3": "Phi3",
}


def build_hf(model: TinyModel) -> PreTrainedModel:
    """A float32 model with the weights that `write_tiny_model` would store, never having seen a GGUF file."""
    hf: PreTrainedModel = getattr(transformers, f"{_NAMES[model.arch]}ForCausalLM")(hf_config(model))
    state = {name: torch.from_numpy(values) for name, values in hf_weights(model).items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    if unexpected or set(missing) != ({"lm_head.weight"} if model.tied_output else set()):
        raise ValueError(f"names of weights disagree: missing {missing}, unexpected {unexpected}")
    return hf


def read_hf(path: Path, model: TinyModel) -> PreTrainedModel:
    """What `transformers` makes of the GGUF file at `path`, in float32.

    Its importer knows nothing of rope scaling, nor of a head_dim of its own in qwen2, nor of most of what the
    later families have: there, and only there, the configuration is ours and the weights are its own reading.
    It cannot read mixtral.
    """
    is_known = model.arch in ("llama", "mistral") or (model.arch == "qwen2" and model.head_dim is None)
    blind = not is_known or model.rope_scaling is not None
    known = {"config": hf_config(model)} if blind else {}
    hf: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager", **known
    )
    return hf


def hf_config(model: TinyModel) -> PretrainedConfig:
    """The model's numbers in the words of `transformers`."""
    text = "Text" if model.arch == "gemma3" else ""
    config: PretrainedConfig = getattr(transformers, f"{_NAMES[model.arch]}{text}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied_output,
        rope_parameters=_rope_parameters(model),
        bos_token_id=model.vocabulary.bos_id,
        eos_token_id=model.vocabulary.eos_id,
        pad_token_id=model.vocabulary.pad_id,
        attn_implementation="eager",
        **_own_parameters(model),
    )
    return config


def hf_logits(hf: PreTrainedModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n_tokens, vocab] f32 after each of `ids`, all in one pass."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = hf(torch.tensor([list(ids)])).logits[0].numpy()
    return logits


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Largest difference over largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# Any: `transformers` takes numbers and strings in one dictionary.
def _own_parameters(model: TinyModel) -> dict[str, Any]:
    """Those that not all families have."""
    own: dict[str, Any] = {}
    if model.head_dim or model.arch not in ("qwen2", "phi3"):
        own["head_dim"] = model.dim_of_head
    if model.arch in ("mistral", "mistral3", "mixtral", "phi3") or model.is_gemma:
        own["sliding_window"] = model.window or None
    if model.arch == "phi3":
        own["original_max_position_embeddings"] = model.rope_original_context
    if model.is_gemma:
        is_27b = model.n_layers == (46 if model.arch == "gemma2" else 62)
        own["query_pre_attn_scalar"] = model.d_model // model.n_heads if is_27b else model.dim_of_head
    if model.arch == "gemma2":
        own["attn_logit_softcapping"] = model.attention_softcap
        own["final_logit_softcapping"] = model.logit_softcap
    if model.arch == "mixtral":
        own |= {"num_local_experts": model.n_experts, "num_experts_per_tok": model.n_experts_used}
    if model.arch == "qwen3moe":
        own |= {"num_experts": model.n_experts, "num_experts_per_tok": model.n_experts_used}
        own |= {"moe_intermediate_size": model.d_ff, "norm_topk_prob": True}
    return own


def _rope_parameters(model: TinyModel) -> dict[str, Any]:
    scaled = _scaled_rope(model)
    if model.arch != "gemma3":
        return scaled
    return {
        "full_attention": scaled,
        "sliding_attention": {"rope_type": "default", "rope_theta": model.rope_local_theta},
    }


def _scaled_rope(model: TinyModel) -> dict[str, Any]:
    plain = {"rope_type": model.rope_scaling or "default", "rope_theta": model.rope_theta}
    if model.rotated != 1:
        plain["partial_rotary_factor"] = model.rotated
    original = {"original_max_position_embeddings": model.rope_original_context}
    if model.rope_scaling == "linear":
        return plain | {"factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        return plain | original | {"factor": model.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if model.rope_scaling == "yarn":
        stated = {"attention_factor": model.rope_attention_factor} if model.rope_attention_factor is not None else {}
        return plain | original | {"factor": model.rope_factor} | stated
    if model.rope_scaling == "longrope":
        long, short = longrope_factors(model)
        return plain | original | {"long_factor": long.tolist(), "short_factor": short.tolist()}
    return plain
