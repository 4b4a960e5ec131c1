"""The operations that model families are written against, one by one against plain numpy's: for backends that offer
`ops(device)`, so that an author sees which one is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from prima_core.arch.fused import FusedOps, Gating, Unfused
from prima_core.arch.ops import AttentionRule, Ops, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.errors import ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step, Weight
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_core.testing.backends.subject import FloatArray, Subject, close_to_exact
from prima_core.testing.examples import example
from prima_core.testing.reference import exact_ops
from prima_core.testing.report import Figures, NotOffered, expect
from prima_core.testing.tinymodel import MatrixType

AnyOps = Ops[Any, Any, Any]  # Any: arrays, matrices and passes of a backend are opaque to all but itself
Call = Callable[[AnyOps], FloatArray]
WIDTH = 256


@dataclass(frozen=True, slots=True)
class Pair:
    """The same operations twice: the backend's, and plain numpy's."""

    ops: AnyOps
    exact: AnyOps
    subject: Subject

    @classmethod
    def of(cls, subject: Subject) -> Pair:
        """Raises NotOffered where the backend has no `ops`: it is no part of the Protocol."""
        offer = getattr(subject.backend, "ops", None)
        if offer is None:
            raise NotOffered("the backend has no ops(device): families are not written against it")
        return cls(cast(AnyOps, offer(subject.device.id)), exact_ops(), subject)

    def close(self, what: str, call: Call, type: MatrixType = "F32") -> float:
        """How far both are apart."""
        limit = self.subject.tolerance.of_type(type)
        return close_to_exact(call(self.ops), call(self.exact), limit, what)

    def equal(self, what: str, call: Call) -> None:
        same = np.array_equal(call(self.ops), call(self.exact))
        expect(same, f"{what} to be the same bits", "other values")


def random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def f32(values: FloatArray) -> Weight:
    return Weight("a weight", GGUFType.F32, values.shape, np.frombuffer(values.tobytes(), np.uint8))


def host(ops: AnyOps, x: object) -> FloatArray:
    return ops.to_host(x)


# ---------------------------------------------------------------- at the border and at load


def check_border(pair: Pair) -> None:
    """What goes in comes out, from any address; what came out stays, and so does what went in."""
    ops, x = pair.ops, random(3, WIDTH)
    expect(isinstance(ops.copies, bool), "copies to be True or False", repr(ops.copies))
    message = b"odd" + x.tobytes()
    unaligned = np.frombuffer(message, np.float32, offset=3).reshape(x.shape)
    there = ops.from_host(unaligned)
    back = ops.to_host(there)
    expect(np.array_equal(back, x), "to_host(from_host(x)) to be x", "other values")
    ops.to_host(ops.add(there, ops.from_host(random(3, WIDTH, seed=1))))
    expect(np.array_equal(back, x), "what to_host gave to stay as it is", "other values after another operation")
    expect(message == b"odd" + x.tobytes(), "from_host to leave its input", "other values")


def check_vector(pair: Pair) -> None:
    pair.equal("a vector", lambda ops: host(ops, ops.vector(f32(random(WIDTH)))))


def check_matrix(pair: Pair, type: MatrixType) -> Figures:
    """`matrix` in the type, by `embedding` and `linear` with 1, 2, 7 and 64 rows, and with a bias."""
    tiny = example("mixtral", type)
    store = pair.subject.models.open(tiny).store()
    layer, shared = store.acquire(0), store.shared()
    table, bias = shared["token_embd.weight"], f32(random(layer["attn_q.weight"].shape[0], seed=3))
    ids = (5, 0, tiny.vocab_size - 1, 5)
    try:
        pair.ops.matrix(table)
    except ModelError as error:
        raise NotOffered(str(error)) from error
    errors = [pair.close("embedding", lambda ops: host(ops, ops.embedding(ops.matrix(table), ids)), type)]
    for name, weight, added in (("q", layer["attn_q.weight"], bias), ("output", shared["output.weight"], None)):
        for n in (1, 2, 7, 64):
            x = random(n, weight.shape[1], seed=n)
            call = _linear(weight, added, x)
            errors.append(pair.close(f"linear of {n} rows by {type} {name} {list(weight.shape)}", call, type))
    return {"error": max(errors)}


def _linear(weight: Weight, bias: Weight | None, x: FloatArray) -> Call:
    return lambda ops: host(ops, ops.linear(ops.from_host(x.copy()), ops.matrix(weight, bias)))


def check_linears(pair: Pair) -> Figures:
    """One x by three matrices of several heights, one with a bias."""
    weights = [f32(random(rows, WIDTH, seed=rows)) for rows in (96, 32, 40)]
    bias = f32(random(32, seed=9))

    def call(ops: AnyOps) -> FloatArray:
        matrices = [ops.matrix(weight, bias if weight.shape[0] == 32 else None) for weight in weights]
        answers = ops.linears(ops.from_host(random(5, WIDTH)), matrices)
        return np.concatenate([host(ops, answer) for answer in answers], axis=1)

    return {"error": pair.close("linears", call)}


# ---------------------------------------------------------------- row by row


def check_rms_norm(pair: Pair) -> Figures:
    """Of whole rows and of heads; tiny rows show where eps stands."""
    x = random(7, WIDTH) * np.float32(10.0) ** np.arange(-4, 3, dtype=np.float32)[:, None]
    errors = [
        pair.close(f"rms_norm by a gain of {n}", _rms_norm(x, random(n, seed=n), eps), "F32")
        for n in (WIDTH, 32)
        for eps in (1e-5, 1e-2)
    ]
    return {"error": max(errors)}


def _rms_norm(x: FloatArray, gain: FloatArray, eps: float) -> Call:
    return lambda ops: host(ops, ops.rms_norm(ops.from_host(x.copy()), ops.vector(f32(gain)), eps))


def check_rope(pair: Pair) -> Figures:
    """Pairs of neighbours and of halves, all of a head and a part of it; with an amplitude."""
    errors = []
    for kind in RopeKind:
        for n_pairs in (16, 12):
            angles = random(6, n_pairs, seed=n_pairs) * 100
            amplitude = np.float32(1.25)
            cos, sin = np.cos(angles) * amplitude, np.sin(angles) * amplitude
            errors.append(pair.close(f"rope {kind} of {2 * n_pairs} of 32 elements", _rope(kind, cos, sin)))
    return {"error": max(errors)}


def _rope(kind: RopeKind, cos: FloatArray, sin: FloatArray) -> Call:
    def call(ops: AnyOps) -> FloatArray:
        rope = Rope(kind, 32, ops.from_host(cos.copy()), ops.from_host(sin.copy()))
        return host(ops, ops.rope(ops.from_host(random(len(cos), 4 * 32)), rope))

    return call


GATES = np.array([[0, 1, -1, 5, -5, 30, -30, 200, -200, 1e4, -1e4, 0.1]], np.float32)


def check_swiglu(pair: Pair) -> Figures:
    return _check_gated(pair, "swiglu", lambda ops, gate, up: ops.swiglu(gate, up))


def check_geglu(pair: Pair) -> Figures:
    return _check_gated(pair, "geglu", lambda ops, gate, up: ops.geglu(gate, up))


def _check_gated(pair: Pair, what: str, gated: Callable[[AnyOps, Any, Any], Any]) -> Figures:
    """Also of gates so large that e^x is infinite."""

    def call(gate: FloatArray) -> Call:
        up = random(*gate.shape, seed=1)
        return lambda ops: host(ops, gated(ops, ops.from_host(gate.copy()), ops.from_host(up)))

    large = pair.close(f"{what} of large gates", call(GATES))
    each = max(pair.close(f"{what} of {gate}", call(np.full((1, 1), gate, np.float32))) for gate in (-3.0, -0.2, 4.0))
    return {"error": max(large, each, pair.close(what, call(random(7, WIDTH))))}


def check_add(pair: Pair) -> Figures:
    """The first argument is a residual that is used again: it stays."""
    x, y = random(7, WIDTH), random(7, WIDTH, seed=1)
    left = pair.ops.from_host(x.copy())
    total = host(pair.ops, pair.ops.add(left, pair.ops.from_host(y.copy())))
    expect(np.array_equal(host(pair.ops, left), x), "add to leave x as it is", "other values", "only y may be reused")
    return {"error": close_to_exact(total, x + y, pair.subject.tolerance.logits, "add")}


# ---------------------------------------------------------------- attention

RULES = (AttentionRule(32**-0.5), AttentionRule(0.3, softcap=1.5), AttentionRule(0.2, window=35))


def check_attention(pair: Pair, rule: AttentionRule) -> Figures:
    """Two sequences that grow by turns, in chunks and one by one; 6 heads read 2 of K and V."""
    return {"error": pair.close(f"attention with {rule}", lambda ops: _attend(ops, rule))}


def _attend(ops: AnyOps, rule: AttentionRule) -> FloatArray:
    layers = Layers(4, 5)
    cache = ops.kv_cache(Slice((layers,), kv_type=KvType.F32), 2, 32)
    opening = tuple(KvOp(KvKind.OPEN, sequence, capacity=80) for sequence in (0, 1))
    steps: Sequence[tuple[Chunk, ...]] = (
        (Chunk(0, 0, 40), Chunk(1, 0, 3)),
        (Chunk(1, 3, 30), Chunk(0, 40, 1)),
        (Chunk(0, 41, 1), Chunk(1, 33, 1)),
        (Chunk(0, 10, 2),),
        (Chunk(0, 12, 30),),
    )
    rows = []
    for index, chunks in enumerate(steps):
        step = Step(chunks, opening if index == 0 else ())
        q, k, v = (random(step.n_tokens, heads * 32, seed=7 * index + heads + i) for i, heads in enumerate((6, 2, 2)))
        at = cache.begin(layers, step)
        rows.append(host(ops, ops.attention(ops.from_host(q), ops.from_host(k), ops.from_host(v), 4, at, rule)))
    cache.close()
    return np.concatenate(rows)


# ---------------------------------------------------------------- experts

ROUTINGS = (RoutingRule(2), RoutingRule(3, normalize=False, scale=2.5), RoutingRule(1))
N_EXPERTS, D_FF = 6, 96


def check_mixture(pair: Pair, rule: RoutingRule) -> Figures:
    """Of 1 and of many rows."""
    stacks = [f32(values) for values in _stacks()]
    errors = [pair.close(f"mixture of {n} rows", _mixture(stacks, n, rule)) for n in (1, 3, 40)]
    return {"error": max(errors)}


def check_mixture_ties(pair: Pair) -> None:
    """Of equal scores the lower index is chosen; an expert that is not chosen has no part, not even 0 times NaN."""
    stacks = _stacks()
    for stack in stacks:
        stack[2:] = np.nan
    call = _mixture([f32(stack) for stack in stacks], 3, RoutingRule(2), scores=np.ones((3, N_EXPERTS), np.float32))
    pair.close("mixture of equal scores, experts from 2 on are NaN", call)


def _stacks() -> list[FloatArray]:
    shapes = (D_FF, WIDTH), (D_FF, WIDTH), (WIDTH, D_FF)
    return [random(N_EXPERTS, *shape, seed=seed) / np.float32(shape[1] ** 0.5) for seed, shape in enumerate(shapes)]


def _mixture(stacks: list[Weight], n: int, rule: RoutingRule, scores: FloatArray | None = None) -> Call:
    x = random(n, WIDTH, seed=n)
    scored = random(n, N_EXPERTS, seed=n + 1) if scores is None else scores

    def call(ops: AnyOps) -> FloatArray:
        gate, up, down = (ops.matrix(stack) for stack in stacks)
        return host(ops, ops.mixture(ops.from_host(x.copy()), ops.from_host(scored.copy()), gate, up, down, rule))

    return call


# ---------------------------------------------------------------- several operations in one call

AnyFused = FusedOps[Any, Any, Any]
FusedCall = Callable[[AnyFused], Sequence[Any]]
FUSED = ("normed_linears", "gated", "rotated_attention", "added_linear")


def check_fused(pair: Pair) -> None:
    """A backend's own give the bits of its other operations, of 1 and of many rows; it has all or none."""
    ops = pair.ops
    lacking = [name for name in FUSED if not hasattr(ops, name)]
    if len(lacking) == len(FUSED):
        raise NotOffered("they are made of the other operations")
    expect(not lacking, f"all of {', '.join(FUSED)}, or none", f"no {', '.join(lacking)}")
    gain, bias = ops.vector(f32(random(WIDTH, seed=2))), f32(random(64, seed=3))
    one, two = (ops.matrix(f32(random(64, WIDTH, seed=seed)), added) for seed, added in ((4, bias), (5, None)))
    square = ops.matrix(f32(random(WIDTH, WIDTH, seed=6)))
    for n in (1, 5, 40):
        x, to = random(n, WIDTH, seed=n), random(n, WIDTH, seed=n + 1)
        residual = ops.from_host(to.copy())

        def normed(own: AnyFused, x: FloatArray = x) -> Sequence[Any]:
            return own.normed_linears(ops.from_host(x.copy()), gain, 1e-5, [one, two])

        def gated(gating: Gating, own: AnyFused, x: FloatArray = x) -> Sequence[Any]:
            return [own.gated(ops.from_host(x.copy()), gain, 1e-5, two, one, gating)]

        def added(own: AnyFused, x: FloatArray = x, residual: Any = residual) -> Sequence[Any]:
            return [own.added_linear(ops.from_host(x.copy()), square, residual)]

        _same(ops, f"normed_linears of {n}", normed)
        for gating in Gating:
            _same(ops, f"gated by {gating} of {n}", partial(gated, gating))
        _same(ops, f"added_linear of {n}", added)
        expect(np.array_equal(host(ops, residual), to), "added_linear to leave `to` as it is", "other values")
    for rule in RULES:
        _same(ops, f"rotated_attention with {rule}", partial(_rotated, ops, rule))


def _same(ops: AnyOps, what: str, call: FusedCall) -> None:
    own, unfused = ([host(ops, x) for x in call(of)] for of in (cast(AnyFused, ops), Unfused(ops)))
    same = all(np.array_equal(x, y) for x, y in zip(own, unfused, strict=True))
    expect(same, f"{what} to have the bits of the operations that it stands for", "other values")


def _rotated(ops: AnyOps, rule: AttentionRule, own: AnyFused) -> Sequence[Any]:
    """Two sequences: a prompt each, then a token each."""
    cache = ops.kv_cache(Slice((Layers(4, 5),), kv_type=KvType.F32), 2, 32)
    opening = tuple(KvOp(KvKind.OPEN, sequence, capacity=80) for sequence in (0, 1))
    results = []
    for step in (
        Step((Chunk(0, 0, 40), Chunk(1, 0, 3)), opening),
        Step((Chunk(1, 3, 1), Chunk(0, 40, 1))),
    ):
        n = step.n_tokens
        q, k, v = (ops.from_host(random(n, heads * 32, seed=n + heads + i)) for i, heads in enumerate((6, 2, 2)))
        angles = random(n, 16, seed=n)
        rope = Rope(RopeKind.NEOX, 32, ops.from_host(np.cos(angles)), ops.from_host(np.sin(angles)))
        attended = own.rotated_attention(q, k, v, rope, 4, cache.begin(Layers(4, 5), step), rule)
        results.append(ops.from_host(host(ops, attended).copy()))
    cache.close()
    return results


CHECKS: Mapping[str, Callable[[Pair], Figures | None]] = {
    "from_host and to_host": check_border,
    "vector": check_vector,
    "linears": check_linears,
    "rms_norm": check_rms_norm,
    "rope": check_rope,
    "attention": lambda pair: check_attention(pair, RULES[0]),
    "attention with a softcap": lambda pair: check_attention(pair, RULES[1]),
    "attention with a window": lambda pair: check_attention(pair, RULES[2]),
    "swiglu": check_swiglu,
    "geglu": check_geglu,
    "mixture": lambda pair: check_mixture(pair, ROUTINGS[0]),
    "mixture, not normalised": lambda pair: check_mixture(pair, ROUTINGS[1]),
    "mixture of one": lambda pair: check_mixture(pair, ROUTINGS[2]),
    "mixture of ties": check_mixture_ties,
    "add": check_add,
    "fused operations": check_fused,
}
