"""What a tiny model is: its numbers, and the tensors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prima_core.errors import ConfigError
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.tinyvocab import TinyVocab, tiny_vocab

Arch = Literal["llama", "mistral", "mistral3", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"]
MatrixType = Literal[
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip
Types = Literal[MatrixType, "Q4_K_M"]
RopeScaling = Literal["linear", "llama3", "yarn", "longrope"]

_LLAMAS = ("llama", "mistral", "mistral3", "mixtral")


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What to make. Equal values make equal files.

    `types` is the type of every matrix; norms and biases are F32. "Q4_K_M" is llama.cpp's mix: Q4_K, but Q6_K for
    the output and for attn_v and ffn_down of some layers. K and IQ types need rows of a multiple of 256 weights,
    the others that are quantised of 32. Where there is nothing that quantises to a type, codes are random too.
    `rope_scaling="llama3"` is told to a reader by `rope_freqs.weight` alone, "longrope" (phi3) by two tensors, as
    llama.cpp's converter does it. Softcaps are gemma2's, windows gemma's and phi3's, `rope_local_theta` is gemma3's.
    """

    arch: Arch = "llama"
    n_layers: int = 2
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None
    d_ff: int = 512
    vocab_size: int = 512
    context_length: int = 512
    norm_eps: float = 1e-5
    tied_output: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_factor: float = 4.0
    rope_original_context: int = 64
    types: Types = "F32"
    seed: int = 0
    n_experts: int = 0
    n_experts_used: int = 0
    window: int = 0
    attention_softcap: float = 50.0
    logit_softcap: float = 30.0
    rope_local_theta: float = 10000.0
    rope_attention_factor: float | None = None
    rotated: float = 1.0

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads or self.rope_dim % 2:
            raise ConfigError(
                f"{self.n_heads} heads of {self.dim_of_head} cannot share {self.n_kv_heads} key/value heads",
                hint="n_heads must be a multiple of n_kv_heads, and head_dim even",
            )
        row = BLOCKS[GGUFType["Q4_K" if self.types == "Q4_K_M" else self.types]].n_weights
        if self.d_model % row or self.d_ff % row or self.n_heads * self.dim_of_head % row:
            raise ConfigError(
                f"rows of {self.d_model}, {self.d_ff} and {self.n_heads * self.dim_of_head} weights do not all fit "
                f"{self.types}",
                hint=f"d_model, d_ff and n_heads * head_dim must be multiples of {row}",
            )
        if self.rope_scaling == "llama3" and not self.is_llama:
            raise ConfigError(
                f"llama3 rope scaling does not exist for {self.arch!r}", hint='use arch="llama" or "linear"'
            )

    @property
    def dim_of_head(self) -> int:
        """head_dim, or d_model / n_heads where it is not given."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rope_dim(self) -> int:
        """How many elements of each head rotate."""
        return int(self.dim_of_head * self.rotated)

    @property
    def is_llama(self) -> bool:
        """Whether it is laid out as a llama is."""
        return self.arch in _LLAMAS

    @property
    def gguf_arch(self) -> str:
        """`general.architecture`."""
        return "llama" if self.arch in ("mistral", "mixtral") else self.arch

    @property
    def is_gemma(self) -> bool:
        return self.arch in ("gemma2", "gemma3")

    @property
    def vocabulary(self) -> TinyVocab:
        return tiny_vocab("qwen2" if self.arch.startswith("qwen") else "llama", self.vocab_size)


@dataclass(frozen=True, slots=True)
class TinyTensor:
    """One tensor to be: its names here and in `transformers`, and where its random values lie.

    `n_rotated_heads` > 0: rows of that many heads stand in the file in the order of adjacent rotation pairs. `shift` is
    what the file's values are more than those of `transformers`. Tensors that share an `hf_name` are there one, joined
    along the rows.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    type: MatrixType
    std: float
    mean: float = 0.0
    n_rotated_heads: int = 0
    shift: float = 0.0
