"""The same tiny model in `transformers`: built from its weights, or read by `transformers` from the GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import PreTrainedModel

from prima_core.testing.tinymodel import TinyModel, hf_weights
from prima_core.testing.tinyvocab import tiny_vocab

_FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def build_hf(model: TinyModel) -> PreTrainedModel:
    """A float32 model with the weights that `write_tiny_model` would store, never having seen a GGUF file."""
    hf: PreTrainedModel = _FAMILIES[model.arch][1](hf_config(model))
    state = {name: torch.from_numpy(values) for name, values in hf_weights(model).items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    if unexpected or set(missing) != ({"lm_head.weight"} if model.tied_output else set()):
        raise ValueError(f"names of weights disagree: missing {missing}, unexpected {unexpected}")
    return hf


def read_hf(path: Path, model: TinyModel) -> PreTrainedModel:
    """What `transformers` makes of the GGUF file at `path`, in float32.

    Its importer knows nothing of rope scaling, nor of a head_dim of its own in qwen2: there, and only there, the
    configuration is ours and the weights are its own reading.
    """
    blind = model.rope_scaling is not None or (model.arch == "qwen2" and model.head_dim is not None)
    known = {"config": hf_config(model)} if blind else {}
    hf: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager", **known
    )
    return hf


def hf_config(model: TinyModel) -> LlamaConfig | Qwen2Config:
    """The model's numbers in the words of `transformers`."""
    vocab = tiny_vocab(model.arch, model.vocab_size)
    own_head_dim = {"head_dim": model.dim_of_head} if model.arch == "llama" or model.head_dim else {}
    config: LlamaConfig | Qwen2Config = _FAMILIES[model.arch][0](
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
        bos_token_id=vocab.bos_id,
        eos_token_id=vocab.eos_id,
        pad_token_id=vocab.pad_id,
        attn_implementation="eager",
        **own_head_dim,
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
def _rope_parameters(model: TinyModel) -> dict[str, Any]:
    plain = {"rope_type": model.rope_scaling or "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is None:
        return plain
    if model.rope_scaling == "linear":
        return plain | {"factor": model.rope_factor}
    return plain | {
        "factor": model.rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": model.rope_original_context,
    }
