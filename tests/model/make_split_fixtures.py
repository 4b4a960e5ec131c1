"""Make the fixture of test_pretokenizers.py with llama.cpp. Tests do not need it; run this by hand:

pip install llama-cpp-python==0.3.36 gguf
python -m tests.model.make_split_fixtures ../shared/data/tokenizers/ggml-vocab-gpt-2.gguf.inp
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import llama_cpp  # type: ignore[import-not-found,unused-ignore]  # not in the test environment

from prima_core.model.pretokenizers import PRE_TOKENIZERS
from tests.model import splits

MADE_WITH = f"llama-cpp-python {llama_cpp.__version__}: python -m tests.model.make_split_fixtures"


def main() -> None:
    vectors = Path(sys.argv[1]).read_bytes().decode().split("\n__ggml_vocab_test__\n")
    texts = splits.texts([text for text in vectors if text])
    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    vocabularies = {False: splits.byte_level(texts), True: splits.raw(texts)}
    variants: list[list[str]] = [[] for _ in texts]
    found: dict[str, dict[str, Any]] = {}
    for pre in PRE_TOKENIZERS:
        add_bos, lengths = _tokenized(pre, vocabularies[pre in splits.RAW], texts)
        for known, new in zip(variants, lengths, strict=True):
            if new not in known:
                known.append(new)
        which = [known.index(new) for known, new in zip(variants, lengths, strict=True)]
        key = json.dumps([add_bos, which])
        found.setdefault(key, {"names": [], "add_bos": add_bos, "which": which})["names"].append(pre)
    _save({"made_with": MADE_WITH, "texts": texts, "lengths": variants, "splits": list(found.values())})


def _save(fixture: dict[str, Any]) -> None:
    def lines(items: Sequence[Any]) -> str:
        return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) + "\n]"

    entries = (
        f"{json.dumps(key)}: {lines(value) if isinstance(value, list) else json.dumps(value)}"
        for key, value in fixture.items()
    )
    splits.FIXTURE.parent.mkdir(exist_ok=True)
    splits.FIXTURE.write_text("{\n" + ",\n".join(entries) + "\n}\n", "utf-8")


def _tokenized(pre: str, vocabulary: splits.SplitVocabulary, texts: Sequence[str]) -> tuple[bool, list[str]]:
    with TemporaryDirectory() as folder:
        path = _written(Path(folder) / "vocabulary.gguf", vocabulary.metadata(pre))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        vocab = llama_cpp.llama_model_get_vocab(model)
        ids = [_ids(vocab, text.encode()) for text in texts]
        add_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        llama_cpp.llama_model_free(model)
    return add_bos, [vocabulary.lengths(some) for some in ids]


def _written(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _ids(vocab: Any, text: bytes) -> list[int]:
    room = (llama_cpp.llama_token * (len(text) + 8))()
    n_tokens = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), False, False)
    if n_tokens < 0:
        raise SystemExit(f"{text!r} has more tokens than bytes")
    return list(room[:n_tokens])


if __name__ == "__main__":
    main()
