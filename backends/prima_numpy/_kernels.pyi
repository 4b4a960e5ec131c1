"""The native module, built from `native/`. `kernels.py` documents the methods and is what the backend uses."""

import numpy as np
from numpy.typing import NDArray

_Float32s = NDArray[np.float32]
_Int64s = NDArray[np.int64]
_KvCache = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.uint8]
_Span = tuple[_KvCache, _KvCache, int, int]
_Stack = tuple[int, NDArray[np.uint8], int, int, int, _Float32s]

def cpu_features() -> list[tuple[str, bool]]: ...
def variants() -> list[str]: ...
def build_info() -> str: ...

class Engine:
    def __init__(self, threads: int, variant: str) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def variant(self) -> str: ...
    def linear(
        self,
        matrices: tuple[Matrix, ...],
        x: _Float32s,
        outs: tuple[_Float32s, ...],
        gain: _Float32s | None,
        eps: float,
    ) -> None: ...
    def added_linear(self, matrix: Matrix, x: _Float32s, added: _Float32s, out: _Float32s) -> None: ...
    def gated_linear(
        self,
        gate: Matrix,
        up: Matrix,
        is_gelu: bool,
        x: _Float32s,
        gain: _Float32s | None,
        eps: float,
        out: _Float32s,
        up_out: _Float32s,
    ) -> None: ...
    def linear_experts(self, stacks: tuple[_Stack, ...], x: _Float32s, experts: _Int64s, starts: _Int64s) -> None: ...
    def rows(self, matrix: Matrix, ids: _Int64s, out: _Float32s) -> None: ...
    def rms_norm(self, x: _Float32s, gain: _Float32s, eps: float, out: _Float32s) -> None: ...
    def rope(self, x: _Float32s, cos: _Float32s, sin: _Float32s, neox: bool) -> None: ...
    def swiglu(self, gate: _Float32s, up: _Float32s, out: _Float32s) -> None: ...
    def geglu(self, gate: _Float32s, up: _Float32s, out: _Float32s) -> None: ...
    def add(self, x: _Float32s, y: _Float32s, out: _Float32s) -> None: ...
    def attention(
        self, q: _Float32s, spans: tuple[_Span, ...], scale: float, softcap: float, window: int, out: _Float32s
    ) -> None: ...
    def rotated_attention(
        self,
        q: _Float32s,
        k: _Float32s,
        v: _Float32s,
        cos: _Float32s,
        sin: _Float32s,
        neox: bool,
        spans: tuple[_Span, ...],
        scale: float,
        softcap: float,
        window: int,
        out: _Float32s,
    ) -> None: ...
    def kv_write(self, k: _Float32s, v: _Float32s, spans: tuple[_Span, ...]) -> None: ...
    def read(self, data: NDArray[np.uint8]) -> int: ...

class Matrix:
    def __init__(
        self, engine: Engine, type: int, data: NDArray[np.uint8], rows: int, cols: int, bias: _Float32s | None
    ) -> None: ...
