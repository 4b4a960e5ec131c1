"""Writes the model as GGUF (Q8_0, norms F32) and reads it back, to be asked as the engine will see it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models

from training.model import Llama, Shape
from training.vocabulary import CHAT_END, CHAT_TEMPLATE, END_OF_TEXT, SPECIAL, empty_tokenizer, token_id

NAME = "prima-builtin"
DESCRIPTION = (
    "A tiny demonstration and test model of the prima project: it answers questions about prima, does small sums, "
    "spells words and tells short stories. It knows nothing else."
)


def write_gguf(path: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write a file that prima and llama.cpp load as an ordinary llama model."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_facts(writer, model)
    _write_vocabulary(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> tuple[Llama, Tokenizer]:
    """The model with its weights as rounded in the file, and the tokenizer that the file describes."""
    reader = gguf.GGUFReader(path)
    shape = _read_shape(reader)
    model = Llama(shape)
    weights = {entry.name: torch.from_numpy(_dequantised(entry)) for entry in reader.tensors}
    model.load_state_dict(weights)
    return model.eval(), _read_tokenizer(reader)


def _write_facts(writer: gguf.GGUFWriter, model: Llama) -> None:
    shape = model.shape
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_author("the prima project")
    writer.add_license("mit")
    writer.add_license_name("MIT License")
    writer.add_languages(["en"])
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_context_length(shape.n_context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.d_head)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(token_id(tokenizer, END_OF_TEXT))
    writer.add_eos_token_id(token_id(tokenizer, CHAT_END))
    writer.add_eot_token_id(token_id(tokenizer, CHAT_END))
    writer.add_pad_token_id(token_id(tokenizer, END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _read_shape(reader: gguf.GGUFReader) -> Shape:
    def number(key: str) -> float:
        return float(reader.fields[f"llama.{key}"].contents())

    return Shape(
        n_vocab=int(number("vocab_size")),
        n_layers=int(number("block_count")),
        d_model=int(number("embedding_length")),
        d_ff=int(number("feed_forward_length")),
        n_heads=int(number("attention.head_count")),
        n_kv_heads=int(number("attention.head_count_kv")),
        d_head=int(number("rope.dimension_count")),
        n_context=int(number("context_length")),
        rope_theta=number("rope.freq_base"),
        norm_epsilon=number("attention.layer_norm_rms_epsilon"),
    )


def _read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = empty_tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _dequantised(entry: gguf.ReaderTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(gguf.dequantize(entry.data, entry.tensor_type), dtype=np.float32)
