"""Which files are models, and which of them a name means."""

from __future__ import annotations

import time

import pytest

from prima_core.errors import LibraryError
from prima_core.library.candidates import Candidate, HubName, candidates, choose, is_harmless, read_hub_name

TYPES = ("Q4_K_M", "Q4_K_S", "Q8_0", "IQ4_XS", "BF16", "F16")
FILES = {f"Model-{type}.gguf": 1000 + n for n, type in enumerate(TYPES)}


def chosen(wanted: str | None, *names: str) -> str:
    sizes = dict.fromkeys(names, 10) if names else FILES
    return choose(candidates(sizes), wanted, "maker/repo").name


def refusal(wanted: str | None, *names: str) -> LibraryError:
    with pytest.raises(LibraryError) as caught:
        chosen(wanted, *names)
    return caught.value


# ---------------------------------------------------------------- which files are models


def test_parts_are_one_model_with_their_bytes_together() -> None:
    sizes = {f"d/M-0000{n}-of-00003.gguf": n for n in (3, 1, 2)}
    assert candidates({**sizes, "README.md": 5, "a.gguf": 7}) == [
        Candidate(("a.gguf",), 7),
        Candidate(("d/M-00001-of-00003.gguf", "d/M-00002-of-00003.gguf", "d/M-00003-of-00003.gguf"), 6),
    ]
    assert [model.name for model in candidates(sizes)] == ["d/M"]


def test_a_model_that_lacks_a_part_is_none() -> None:
    assert candidates({"M-00001-of-00002.gguf": 1, "N-00002-of-00002.gguf": 1}) == []


@pytest.mark.parametrize("path", ["a.gguf", "Q8_0/a b.gguf", "\u00fc.gguf", "a..b.gguf", "#1%.gguf"])
def test_ordinary_paths_are_harmless(path: str) -> None:
    assert is_harmless(path)


@pytest.mark.parametrize(
    "path",
    ["", "/a", "../a", "a/..", "a//b", "a/./b", ".a", "a/.b", "a\\b", "c:a", "a\nb", "a\0", "a/b.", "a /b", "x" * 256],
)
def test_paths_that_lead_elsewhere_or_that_a_system_cannot_have_are_not(path: str) -> None:
    assert not is_harmless(path)


# ---------------------------------------------------------------- which is meant


@pytest.mark.parametrize("type", TYPES)
def test_a_type_is_a_word_in_the_name(type: str) -> None:
    assert chosen(type) == f"Model-{type}"
    assert chosen(type.lower()) == f"Model-{type}"


def test_without_a_type_it_is_q4_k_m_or_the_only_one() -> None:
    assert chosen(None) == "Model-Q4_K_M"
    assert chosen(None, "Model-Q8_0.gguf") == "Model-Q8_0"


def test_what_is_no_model_of_its_own_is_left_out_unless_it_is_named() -> None:
    assert chosen(None, "Model-Q8_0.gguf", "mmproj-Model-F16.gguf", "imatrix_x.gguf") == "Model-Q8_0"
    assert chosen("mmproj-Model-F16.gguf", "Model-Q8_0.gguf", "mmproj-Model-F16.gguf") == "mmproj-Model-F16"


@pytest.mark.parametrize("wanted", ["d/M", "M", "d/M-00002-of-00002.gguf", "M-00001-of-00002.gguf"])
def test_a_model_is_named_by_any_of_its_files(wanted: str) -> None:
    assert chosen(wanted, "d/M-00001-of-00002.gguf", "d/M-00002-of-00002.gguf", "d/MN.gguf") == "d/M"


def test_where_several_fit_they_are_listed_with_sizes() -> None:
    error = refusal("Q8_0", "a/M-Q8_0.gguf", "b/M-Q8_0.gguf", "M-F16.gguf")
    assert error.message == "maker/repo has 2 models for 'Q8_0'; it has:\n     0.0 MB  a/M-Q8_0\n     0.0 MB  b/M-Q8_0"
    assert "hf:OWNER/REPO:FILE" in error.hint


def test_where_none_fits_all_are_listed() -> None:
    error = refusal("Q3_K")
    assert "has no model for 'Q3_K'" in error.message
    assert all(f"Model-{type}" in error.message for type in TYPES)
    assert "has no model for Q4_K_M, the default" in refusal(None, "M-F16.gguf", "M-Q8_0.gguf").message


def test_nothing_to_choose_from_is_told() -> None:
    assert "there is no GGUF file in maker/repo" in refusal(None, "model.safetensors").message


# ---------------------------------------------------------------- names


def test_names_of_hubs_are_read() -> None:
    assert read_hub_name("hf:maker/Model-1.5-GGUF") == HubName("maker/Model-1.5-GGUF", None)
    assert read_hub_name("hf:maker/M:Q8_0") == HubName("maker/M", "Q8_0")
    assert read_hub_name("hf:maker/M:d/f.gguf") == HubName("maker/M", "d/f.gguf")
    assert str(read_hub_name("hf:maker/M:Q8_0")) == "hf:maker/M:Q8_0"


@pytest.mark.parametrize(
    "text",
    ["", "hf:", "maker/M", "hf:maker", "hf:maker/", "hf:/M", "hf:../M", "hf:a/..", "hf:a/b/c", "hf:a b/c", "hf:a\\b/c"],
)
def test_what_is_no_name_of_a_hub_is_refused(text: str) -> None:
    with pytest.raises(LibraryError, match="names no model on a hub") as caught:
        read_hub_name(text)
    assert "hf:OWNER/REPO" in caught.value.hint


def test_names_that_tell_of_very_many_parts_cost_no_more_than_others() -> None:
    sizes = {f"M{n}-00001-of-99999.gguf": 1 for n in range(3000)}
    begin = time.perf_counter()
    assert candidates(sizes) == []
    assert time.perf_counter() - begin < 20  # three hundred million names would take minutes
