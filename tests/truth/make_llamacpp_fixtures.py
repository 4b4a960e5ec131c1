"""Make the fixtures of this folder with llama.cpp and its converter. Tests need neither; run this by hand:

    pip install llama-cpp-python==0.3.36 transformers torch gguf sentencepiece
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    python -m tests.truth.make_llamacpp_fixtures llama_cpp_python-0.3.36/vendor/llama.cpp [NAME...]

llama.cpp runs on the CPU with one thread, float32 KV, no flash attention and no repacked weights. For each model the
prompt is searched whose 24 greedy tokens are the clearest: the least margin of all steps is the largest. Windows and
original contexts are shorter than prompt and answer together. llama.cpp computes phi3 without its window, so its models
here have none.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import llama_cpp  # type: ignore[import-not-found,unused-ignore]  # not in the test environment
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.truth import golden
from tests.truth.hf import build_hf, hf_logits

MADE_WITH = f"llama-cpp-python {llama_cpp.__version__}: python -m tests.truth.make_llamacpp_fixtures vendor/llama.cpp"
N_PROMPTS, N_COMPARED, N_PROMPT_IDS, N_GREEDY = 1500, 40, 12, 24
MIN_MARGIN = 0.01  # of the largest logit; the exact twin is held to 1e-4

_LLAMA = TinyModel(d_model=128, d_ff=256, vocab_size=384, context_length=128)  # rows too short for K types
_QWEN2 = replace(_LLAMA, arch="qwen2")
_QWEN3 = replace(_LLAMA, arch="qwen3", n_layers=3, norm_eps=1e-6)
_MIXTURE = replace(_LLAMA, n_layers=3, n_experts=8, n_experts_used=2)
_GEMMA = replace(_LLAMA, n_layers=4, head_dim=48, window=6, tied_output=True, norm_eps=1e-6)
_YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_original_context": 16, "rope_theta": 1000.0}
GREEDY: dict[str, TinyModel] = {
    "llama-mha-f32": replace(_LLAMA, n_heads=4, n_kv_heads=4, n_layers=3, seed=1),
    "llama-gqa-f16": replace(_LLAMA, n_heads=8, n_kv_heads=2, types="F16", seed=2),
    "llama-llama3rope-f32": replace(_LLAMA, rope_scaling="llama3", rope_theta=500000.0, seed=3),
    "llama-linear-f32": replace(_LLAMA, rope_scaling="linear", seed=4),
    "llama-tied-headdim-f32": replace(_LLAMA, tied_output=True, head_dim=64, n_kv_heads=1, seed=5),
    "qwen2-gqa-f32": replace(_QWEN2, n_heads=8, n_kv_heads=2, norm_eps=1e-6, seed=6),
    "qwen2-tied-f16": replace(_QWEN2, tied_output=True, rope_theta=1e6, types="F16", seed=7),
    "llama-gqa-q8_0": TinyModel(types="Q8_0", seed=8),
    "llama-gqa-q4_k": TinyModel(types="Q4_K", seed=9),
    "qwen2-gqa-q6_k": TinyModel(arch="qwen2", types="Q6_K", seed=10),
    "llama-tied-q4_k_m": TinyModel(types="Q4_K_M", tied_output=True, rope_scaling="llama3", n_layers=4, seed=11),
    "mistral-f32": replace(_LLAMA, arch="mistral", n_heads=8, n_kv_heads=2, seed=12),
    "mixtral-f32": replace(_MIXTURE, arch="mixtral", seed=13),
    "qwen3-headdim-f32": replace(_QWEN3, head_dim=48, seed=15),
    "qwen3moe-f32": replace(_MIXTURE, arch="qwen3moe", n_experts=6, n_experts_used=3, seed=16),
    "gemma2-f32": replace(_GEMMA, arch="gemma2", attention_softcap=2.0, logit_softcap=30.0, seed=17),
    "gemma3-linear-f32": replace(_GEMMA, arch="gemma3", n_layers=8, rope_theta=1e6, rope_scaling="linear", seed=18),
    "gemma3-untied-f32": replace(_GEMMA, arch="gemma3", n_layers=6, rope_local_theta=100.0, tied_output=False, seed=19),
    "phi3-f32": replace(_LLAMA, arch="phi3", n_layers=3, seed=20),
    "phi3-short-rope-f32": replace(
        _LLAMA, arch="phi3", rope_scaling="longrope", context_length=512, rope_original_context=512, seed=21
    ),
    "phi3-long-rope-partial-f32": replace(
        _LLAMA, arch="phi3", rope_scaling="longrope", rope_original_context=16, rotated=0.75, seed=22
    ),
    "llama-yarn-f32": replace(_LLAMA, **_YARN, seed=23),
    "mistral3-yarn-f32": replace(_LLAMA, arch="mistral3", n_heads=8, n_kv_heads=2, **_YARN, seed=25),
    "qwen3-yarn-f32": replace(_QWEN3, **_YARN, seed=24),
}
CONVERTED: dict[str, TinyModel] = {
    "llama": replace(_LLAMA, rope_scaling="llama3", rope_theta=500000.0, seed=21),
    "qwen2": replace(_QWEN2, tied_output=True, seed=22),
    "mistral": replace(_LLAMA, arch="mistral", seed=23),
    "mixtral": replace(_MIXTURE, arch="mixtral", seed=24),
    "qwen3-yarn": replace(_QWEN3, **_YARN, rope_attention_factor=1.25, seed=25),
    "qwen3moe": replace(_MIXTURE, arch="qwen3moe", seed=26),
    "gemma2": replace(_GEMMA, arch="gemma2", seed=27),
    "gemma3": replace(_GEMMA, arch="gemma3", rope_scaling="linear", rope_local_theta=5000.0, seed=28),
    "phi3-longrope": replace(_LLAMA, arch="phi3", rope_scaling="longrope", rotated=0.75, window=24, seed=29),
}


def main() -> None:
    llama_cpp_folder, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:]
    for name, model in CONVERTED.items():
        if wanted and f"converted-{name}" not in wanted:
            continue
        with TemporaryDirectory() as folder:
            _save(f"converted-{name}", _converted(model, Path(folder), llama_cpp_folder))
    for name, model in GREEDY.items():
        if wanted and f"greedy-{name}" not in wanted:
            continue
        with TemporaryDirectory() as folder:
            _save(f"greedy-{name}", _greedy(model, write_tiny_model(Path(folder) / "tiny.gguf", model)))


def _save(name: str, fixture: dict[str, Any]) -> None:
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items())
    (golden.FIXTURES / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _greedy(model: TinyModel, path: Path) -> dict[str, Any]:
    prompts = np.random.default_rng(model.seed).integers(0, model.vocab_size - 4, (N_PROMPTS, N_PROMPT_IDS)).tolist()
    with _llama_context(path) as context:
        runs = [(prompt, *_decode_greedily(context, model, prompt)) for prompt in prompts]
    usable = [run for run in runs if len(set(run[1])) > N_GREEDY // 2 and max(run[1]) < model.vocab_size - 4]
    clearest = sorted(usable, key=lambda run: -_margin(run[2]))[:N_COMPARED]
    hf = build_hf(model)
    truths = [hf_logits(hf, prompt + ids[:-1])[N_PROMPT_IDS - 1 :] for prompt, ids, _ in clearest]
    agreeing = [
        (min(_margin(logits), _margin(truth)), prompt, ids, _noise(logits, truth))
        for (prompt, ids, logits), truth in zip(clearest, truths, strict=True)
        if truth.argmax(axis=1).tolist() == ids
    ]
    margin, prompt, ids, noise = max(agreeing)
    print(f"{model.arch} {model.types}: margin {margin:.4f}, noise {noise:.2g}, {len(set(ids))} different tokens")
    if margin < MIN_MARGIN:
        raise SystemExit(f"no prompt is clear enough for {model}")
    return {
        "made_with": MADE_WITH,
        "system": llama_cpp.llama_print_system_info().decode(),
        "model": asdict(model),
        "tensors_sha256": golden.tensors_sha256(path),
        "prompt_ids": prompt,
        "greedy_ids": ids,
        "margin": round(margin, 5),
        "noise": float(f"{noise:.2g}"),
    }


def _margin(logits: NDArray[np.float32]) -> float:
    """Least distance of the best two logits of a row, over the row's largest."""
    best_two = np.partition(logits, -2, axis=1)[:, -2:]
    return float(((best_two[:, 1] - best_two[:, 0]) / np.abs(logits).max(axis=1)).min())


def _noise(logits: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Largest difference in a row, over the row's largest logit."""
    return float((np.abs(logits - truth).max(axis=1) / np.abs(truth).max(axis=1)).max())


def _decode_greedily(context: Any, model: TinyModel, prompt: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
    """N_GREEDY ids and the logits [N_GREEDY, vocab] that chose them. An end token would not end it."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    new_ids, ids, rows = list(prompt), list[int](), []
    while len(ids) < N_GREEDY:
        tokens = (llama_cpp.llama_token * len(new_ids))(*new_ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(new_ids))):
            raise SystemExit("llama_decode failed")
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (model.vocab_size,)).copy()
        new_ids = [int(row.argmax())]
        ids += new_ids
        rows.append(row)
    return ids, np.stack(rows)


@contextmanager
def _llama_context(path: Path) -> Iterator[Any]:
    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = N_PROMPT_IDS + N_GREEDY
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = gguf.GGMLQuantizationType.F32.value
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _converted(model: TinyModel, folder: Path, llama_cpp_folder: Path) -> dict[str, Any]:
    build_hf(model).save_pretrained(folder)
    _hf_tokenizer(model).save_pretrained(folder)
    path = folder / "converted.gguf"
    _run_converter(llama_cpp_folder, model.vocabulary.pre, folder, path)
    digests = golden.tensor_digests(path)
    rope_freqs = [t.data.tolist() for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    return {
        "made_with": MADE_WITH,
        "model": asdict(model),
        "metadata": golden.metadata(path),
        "rope_freqs": rope_freqs[0] if rope_freqs else [],
        "tensors": {name: digest for name, digest in digests.items() if name != "rope_freqs.weight"},
    }


def _run_converter(llama_cpp_folder: Path, pre: str, source: Path, target: Path) -> None:
    # The converter knows pre-tokenizers by a hash of ids that only the real vocabularies give.
    script = (
        f"import sys, runpy; sys.path.insert(0, {str(llama_cpp_folder)!r})\n"
        f"sys.path.insert(0, {str(llama_cpp_folder / 'gguf-py')!r})\n"
        f"from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}\n"
        "from conversion import gemma, phi  # whose real vocabularies are SentencePiece's\n"
        "gemma.Gemma2Model.set_vocab = phi.Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2\n"
        f"sys.argv = ['convert_hf_to_gguf.py', {str(source)!r}, '--outtype', 'f32', '--outfile', {str(target)!r}]\n"
        f"runpy.run_path({str(llama_cpp_folder / 'convert_hf_to_gguf.py')!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _hf_tokenizer(model: TinyModel) -> PreTrainedTokenizerFast:
    vocab = model.vocabulary
    normal, specials = vocab.tokens[: -vocab.n_specials], vocab.tokens[-vocab.n_specials :]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in vocab.merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(normal)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    bos = {} if vocab.bos_id is None else {"bos_token": vocab.tokens[vocab.bos_id]}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        eos_token=vocab.tokens[vocab.eos_id],
        pad_token=vocab.tokens[vocab.pad_id],
        chat_template=vocab.chat_template,
        add_bos_token=vocab.bos_id is not None,
        **bos,
    )


if __name__ == "__main__":
    main()
