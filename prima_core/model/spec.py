"""What a model is: the numbers that every node must agree on, read once from the file's metadata and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from prima_core.errors import ModelError
from prima_core.model.facts import Facts, Scalar, show
from prima_core.model.header import StringArray, TensorInfo, Value, printable
from prima_core.model.names import OUTPUT, TOKEN_EMBD
from prima_core.model.rope import RopeSpec, read_local_rope, read_rope


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of `count` experts of hidden width `d_ff` in each layer, `n_used` of which see a token."""

    count: int
    n_used: int
    d_ff: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts of a decoder-only transformer. Counts are in elements, not bytes.

    What a model lacks is 0, None or empty. `windows`: for each layer how many positions back it sees, its own included
    (0: all). `local_rope`: of the layers with a window, where they have their own. Softcaps as in `AttentionRule`.
    """

    arch: str
    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    tied_output: bool
    windows: tuple[int, ...] = ()
    local_rope: RopeSpec | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    experts: Experts | None = None

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, TensorInfo],
        defaults: Mapping[str, Scalar] = MappingProxyType({}),
    ) -> ModelSpec:
        """Read and check the numbers of a model.

        `defaults` are the keys that its family has beyond those of all, with what an absent one means. Raises
        ModelError, with the key as `field`, for a missing or senseless number, and for a number that asks for something
        that the family does not compute.
        """
        arch = read_arch(metadata)
        facts = Facts(metadata, arch, defaults)
        _refuse_variants(facts)
        d_model, n_layers = facts.count("embedding_length", 1 << 20), facts.count("block_count", 1024)
        n_heads, n_kv_heads = _head_counts(facts)
        head_dim = _head_dim(facts, d_model, n_heads)
        context_length = facts.count("context_length", 1 << 28)
        rope = read_rope(facts, head_dim, context_length, tensors)
        d_ff = facts.count("feed_forward_length", 1 << 22)
        windows = _windows(facts, n_layers)
        return cls(
            arch=arch,
            name=_name(metadata, arch),
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=d_ff,
            vocab_size=_vocab_size(facts, tensors),
            context_length=context_length,
            norm_eps=facts.number("attention.layer_norm_rms_epsilon", 0.0, 0.1),
            rope=rope,
            tied_output=OUTPUT not in tensors,
            windows=windows,
            local_rope=read_local_rope(facts, rope) if windows else None,
            attention_softcap=facts.amount("attn_logit_softcapping", 1e6),
            logit_softcap=facts.amount("final_logit_softcapping", 1e6),
            experts=_experts(facts, d_ff),
        )

    def window(self, layer: int) -> int:
        """How many positions the layer sees back, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> RopeSpec:
        """The layer's own rope."""
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope


def read_arch(metadata: Mapping[str, Value]) -> str:
    """The model's family. Raises ModelError where the file does not say it."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelError("is missing or no text", field="general.architecture")
    return arch


_VARIANTS: Mapping[str, tuple[Scalar, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.key_length_swa": (),
        "attention.max_alibi_bias": (0.0,),
        "attention.scale": (0.0,),
        "attention.sliding_window": (0,),
        "attention.temperature_scale": (0.0,),
        "attn_logit_softcapping": (0.0,),
        "embedding_scale": (0.0, 1.0),
        "expert_count": (0,),
        "expert_gating_func": (0, 1),  # 1: softmax
        "expert_group_count": (0, 1),
        "expert_shared_count": (0,),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0.0, 1.0),
        "final_logit_softcapping": (0.0,),
        "leading_dense_block_count": (0,),
        "logit_scale": (0.0, 1.0),
        "nextn_predict_layers": (0,),
        "residual_scale": (0.0, 1.0),
        "rope.dimension_count_swa": (),
        "rope.dimension_sections": (),
        "rope.scaling.alpha": (0.0,),
        "rope.scaling.yarn_ext_factor": (1.0, -1.0),
        "use_parallel_residual": (False,),
    }
)
"""Keys that change the mathematics, with values that do not. A family that computes one names it in its defaults."""


def _refuse_variants(facts: Facts) -> None:
    for key, neutral in _VARIANTS.items():
        if key in facts.defaults or f"{facts.arch}.{key}" not in facts.metadata:
            continue
        value = facts.get(key)
        if value not in neutral:
            raise facts.error(key, f"is {show(value)}: this variant of {facts.arch} is not supported")


def _name(metadata: Mapping[str, Value], arch: str) -> str:
    name = metadata.get("general.name")
    return printable(name.strip()) or arch if isinstance(name, str) else arch


def _head_counts(facts: Facts) -> tuple[int, int]:
    n_heads = facts.count("attention.head_count", 1 << 16)
    n_kv_heads = facts.count("attention.head_count_kv", n_heads, default=n_heads)
    if n_heads % n_kv_heads:
        raise facts.error("attention.head_count_kv", f"{n_heads} heads cannot share {n_kv_heads}")
    return n_heads, n_kv_heads


def _head_dim(facts: Facts, d_model: int, n_heads: int) -> int:
    if facts.get("attention.key_length") is None and d_model % n_heads:
        raise facts.error("attention.head_count", f"{n_heads} heads do not divide an embedding of {d_model}")
    head_dim = facts.count("attention.key_length", 1 << 12, default=d_model // n_heads)
    value_length = facts.count("attention.value_length", 1 << 12, default=head_dim)
    if value_length != head_dim:
        raise facts.error("attention.value_length", f"is {value_length}, but keys have {head_dim}: not supported")
    if head_dim % 2:
        raise facts.error(
            "attention.key_length", f"heads of {head_dim} cannot rotate in pairs: the number must be even"
        )
    return head_dim


def _windows(facts: Facts, n_layers: int) -> tuple[int, ...]:
    """In a pattern of n, every n-th layer sees all positions; 0: none does. Or the file has a truth value per layer."""
    window = facts.count("attention.sliding_window", 1 << 28, default=0, least=0)
    if not window:
        return ()
    key = "attention.sliding_window_pattern"
    local = facts.flags(key, n_layers)
    if local is None:
        period = facts.count(key, 1024, default=0, least=0)
        local = tuple(not period or layer % period < period - 1 for layer in range(n_layers))
    return tuple(window if is_local else 0 for is_local in local)


def _experts(facts: Facts, d_ff: int) -> Experts | None:
    count = facts.count("expert_count", 1 << 14, default=0, least=0)
    if not count:
        return None
    n_used = facts.count("expert_used_count", count)
    return Experts(count, n_used, facts.count("expert_feed_forward_length", 1 << 22, default=d_ff))


def _vocab_size(facts: Facts, tensors: Mapping[str, TensorInfo]) -> int:
    """The embedding's rows where there are weights, else the tokenizer's tokens, else what the metadata say."""
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, StringArray) else 0
    if TOKEN_EMBD not in tensors:
        return n_tokens or facts.count("vocab_size", 1 << 24)
    n_rows = tensors[TOKEN_EMBD].shape[0]
    if n_tokens and n_tokens != n_rows:
        raise ModelError(f"has {n_rows} rows for a vocabulary of {n_tokens} tokens", field=TOKEN_EMBD)
    if n_rows > 1 << 24:
        raise ModelError(f"has {n_rows} rows; sane values are up to {1 << 24}", field=TOKEN_EMBD)
    return n_rows
