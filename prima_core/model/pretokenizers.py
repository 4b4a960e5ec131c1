"""How a BPE vocabulary cuts text into words before it merges, by the file's `tokenizer.ggml.pre`.

Names, patterns and flags are those of llama.cpp's `src/llama-vocab.cpp` and `src/unicode.cpp`, even where they simplify
a model's own `tokenizer.json`: a letter outside ASCII has no case there. A name may be added here when texts are split
exactly as there (tests/model/test_pretokenizers.py). Left out is "whitespace", which one embedding model uses.
No pattern may take more than linear time for any text: it is a client who chooses the text.
Characters outside ASCII are written as escapes: an editor that normalises text would change the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Each pattern in turn cuts every piece that the ones before it left; what lies between matches is a piece too.

    `ignore_merges`: a piece that is a token is taken as it is. `add_bos`: what a file means that does not say.
    `is_raw`: tokens are spelled in plain UTF-8, with U+2581 for a space and <0x00> for a byte, not in GPT-2's letters.
    `whole_newlines`: a run of newlines that is a token is taken as it is. `always_bos`: whatever the file says.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    is_raw: bool = False
    whole_newlines: bool = False
    always_bos: bool = False


# ---------------------------------------------------------------- parts of patterns

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ASCII_SIGNS_THEN_LETTERS = r"[!-/:-@\[-`{-~][A-Za-z]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

# The letters that had an upper or lower case when deepseek-llm's vocabulary was made; \p{L} has more.
_DEEPSEEK_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)

# To llama.cpp, white space outside ASCII is in no class of characters but \s.
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&\\S]+"

# As llama.cpp's `unicode_cpt_is_han`.
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_ASIAN_SCRIPTS = (
    "\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff"
)


def _llama3(numbers: str, words: str = _WORDS, signs: str = _SIGNS, spaces: str = _SPACES) -> str:
    """The pattern of Llama 3, and of all that were made after it."""
    return f"{_CONTRACTIONS}|{words}|{numbers}|{signs}|{spaces}"


def _cased(letters: str, numbers: str, contractions: str) -> str:
    """Words as runs of capitals and then of small letters; a letter outside ASCII counts as either."""
    upper, lower = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _deepseek3(signs: str = r" ?[\p{P}\p{S}]+[\r\n]*", spaces: str = _SPACES) -> str:
    return rf"{_ASCII_SIGNS_THEN_LETTERS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|{signs}|{spaces}"


# Numbers in threes from the right. As in llama.cpp, what stands before a number stays with the first three or fewer.
_THREES_FROM_RIGHT = (
    r"\P{N}*+\p{N}+|\P{N}+",
    r"\A\P{N}*+\p{N}{1,3}(?=(?:\p{N}{3})*\z)|\p{N}{3}",
)
# Likewise, but only of ASCII's digits, and what stands between two numbers stays with the last three of the first.
# That is `(?=(\d{3})+(?!\d))` in llama.cpp, which takes quadratic time.
_FEWER = "[0-9]{1,2}(?=(?:[0-9]{3})*(?![0-9]))"
_BETWEEN = f"(?:[^0-9]++(?:{_FEWER})?)*"
_ASCII_THREES_FROM_RIGHT = rf"\A(?={_FEWER}|[^0-9])(?:{_FEWER})?{_BETWEEN}|[0-9]{{3}}{_BETWEEN}"

# ---------------------------------------------------------------- llama.cpp's kinds of pre-tokenizers

_GPT2 = PreTokenizer((_GPT2_WORDS,))
_STARCODER = PreTokenizer((r"\p{N}", _GPT2_WORDS))
_DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))
_FALCON = PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2_WORDS, "[0-9][0-9][0-9]"))
_DBRX = PreTokenizer((_llama3(r"\p{N}{1,3}"),))
_LLAMA3 = replace(_DBRX, ignore_merges=True, add_bos=True)
_GLM4 = replace(_DBRX, ignore_merges=True)
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_JAIS2 = PreTokenizer((_llama3(r"\p{N}{1,3}", spaces=rf"\s*[\r\n]+|{_JAIS2_SPACES}|\s"),))
_MINICPM5 = PreTokenizer((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignore_merges=True)
_QWEN2 = PreTokenizer((_llama3(r"\p{N}"),))
_QWEN35 = PreTokenizer((_llama3(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))
_LAGUNA = PreTokenizer((r"\n+", _llama3(r"\p{N}")))
_SEED_CODER = PreTokenizer((_llama3(r"\p{N}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),))
_BAILING = PreTokenizer((_llama3(r"\p{N}", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),))
_EXAONE_MOE = PreTokenizer(
    (
        _llama3(
            r"\p{N}",
            r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    )
)
_UFAKZEKA = PreTokenizer((rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}",))
_TEKKEN = PreTokenizer((_cased(r"\p{L}", r"\p{N}", ""),), ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer((_cased(r"\p{L}", r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_GRANITE_EMBEDDING = PreTokenizer((_cased(r"\p{L}\p{M}", r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),), ignore_merges=True)
_MARKED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTIONS}?"
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TINY_AYA = PreTokenizer((*_THREES_FROM_RIGHT, rf"{_MARKED_WORDS}|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASHES}|{_SPACES}"))
_YOUTU = PreTokenizer(
    (
        "[\uac00-\ud7a3\u3131-\u318e]+"
        "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        f"|[\u3105-\u312f]+|{_HAN_AND_KANA}",
        rf"{_MARKED_WORDS}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_SPACES}",
    ),
    ignore_merges=True,
)
_KIMI_K2 = PreTokenizer(
    (
        rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",
    )
)
_SUPERBPE = PreTokenizer((r"\p{N}+", _ASCII_THREES_FROM_RIGHT))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _deepseek3()))
_SPARK = PreTokenizer(
    (
        r"\p{N}{1,3}",
        _HAN_AND_KANA,
        _deepseek3(r" ?[\p{P}\p{S}]+", r"[\r\n]|\s+(?!\S)|\s+"),
        r"\p{N}",
    )
)
_AFMOE = PreTokenizer((*_THREES_FROM_RIGHT, f"[{_ASIAN_SCRIPTS}]+", _deepseek3()))
_DEEPSEEK_LLM = PreTokenizer(
    (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_CASED}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002&&\\S]+",
        r"\s+$",
        _DEEPSEEK_ASIAN,
        r"\p{N}+",
    )
)
_DEEPSEEK_CODER = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}"))
_BLOOM_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_BLOOM = PreTokenizer((_BLOOM_WORDS,))
_VIKING = PreTokenizer((_BLOOM_WORDS, r"\p{N}"))
_CHAMELEON = PreTokenizer(
    (
        "<sentinel:[0-9]+>",
        "IMGIMG[A-I]{1,4}Z",
        r"[\t\n]| {4}| {2}",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2_WORDS,
    ),
    add_bos=True,
)
_SARVAM = PreTokenizer((r"\n+",), is_raw=True)
_GEMMA4 = replace(_SARVAM, whole_newlines=True, add_bos=True, always_bos=True)

# ---------------------------------------------------------------- by name

_NAMES: tuple[tuple[PreTokenizer, str], ...] = (
    (_DEFAULT, "default"),
    (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_DBRX, "dbrx smaug-bpe chatglm-bpe"),
    (_GLM4, "glm4 glm5"),
    (_JAIS2, "jais-2"),
    (_MINICPM5, "minicpm5"),
    (_DEEPSEEK_LLM, "deepseek-llm"),
    (_DEEPSEEK_CODER, "deepseek-coder"),
    (_DEEPSEEK3, "deepseek-v3 hunyuan-dense hy_v4 joyai-llm"),
    (_SPARK, "spark2_5"),
    (_YOUTU, "youtu"),
    (_FALCON, "falcon"),
    (_STARCODER, "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (_GPT2, "gpt-2 mpt olmo jais trillion granite-docling phi-2 gigachat a.x-4.0 mellum exaone4 modern-bert"),
    (_GPT2, "jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe"),
    (_QWEN2, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (_QWEN35, "qwen35"),
    (_BLOOM, "poro-chat bloom gpt3-finnish"),
    (_VIKING, "viking"),
    (_TEKKEN, "tekken"),
    (_CHAMELEON, "chameleon"),
    (_GPT4O, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (_GRANITE_EMBEDDING, "granite-embed-multi-97m"),
    (_TINY_AYA, "tiny_aya cohere2moe"),
    (_KIMI_K2, "kimi-k2"),
    (_SUPERBPE, "superbpe"),
    (_BAILING, "bailingmoe bailingmoe2 llada-moe"),
    (_SEED_CODER, "seed-coder"),
    (_UFAKZEKA, "ufakzeka"),
    (_AFMOE, "afmoe"),
    (_LAGUNA, "laguna"),
    (_EXAONE_MOE, "exaone-moe"),
    (_SARVAM, "sarvam-moe"),
    (_GEMMA4, "gemma4 granite-embed-multi-311m"),
)


def _by_name() -> Iterator[tuple[str, PreTokenizer]]:
    for pre, names in _NAMES:
        for name in names.split():
            yield name, pre


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(dict(_by_name()))
