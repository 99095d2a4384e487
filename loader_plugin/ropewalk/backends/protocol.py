"""What a backend does: the operations of a decoder layer, on tensors whose layout is fixed here.

There is one model definition (model/layers.py), and it calls nothing but these operations. A backend owns the packed
layout of the weights and the layout of the keys and values; everything else that crosses this line is a plain torch
tensor on `Backend.device`.

Letters: T rows (new tokens), S cached keys, K input features, N output features of one part, Hq and Hkv query and
key/value heads, D head size, R rotated dims of a head, C hidden size, I intermediate size, V vocabulary.

Who checks what: weights/check.py checks shapes and dtypes of weights, model/model.py checks requests, each once. An
operation checks what would otherwise be read out of bounds. Results are new tensors; a name that ends in `_` writes
in place.

Reproducibility: row t of every result depends on row t of the inputs alone, bit for bit: it is the same for any T, any
number of threads, and any split of a prompt into chunks. `reference` is exempt (a matrix product of torch changes its
order of summation with T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ropewalk.gptq.linear import DenseLinear, GptqLinear


class PackedLinear(Protocol):
    """One or several linear layers over the same input, in the layout of the backend that packed them."""

    @property
    def in_features(self) -> int:
        """K, the number of input features."""

    @property
    def out_features(self) -> int:
        """The number of output features of all parts together."""

    @property
    def num_bytes(self) -> int:
        """Memory held: codes, scales, zeros, dense weights, permutations, biases; a tensor used as given counts too."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPart:
    """The change of one linear: W += B A. a: [r, K], b: [N, r], float32, with all factors in b. r = 0: no change."""

    a: torch.Tensor
    b: torch.Tensor


class PackedLowRank(Protocol):
    """The low-rank change of linears over the same input, in the layout of the backend that packed it."""

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices as the backend holds them."""


class KvStore(Protocol):
    """Keys and values of one layer instance for positions 0..capacity; the layout is the backend's own.

    It holds the positions 0..n without gaps. Appending at an earlier position than n forgets what followed it.
    """

    @property
    def capacity(self) -> int:
        """The number of positions that it has room for."""

    @property
    def num_bytes(self) -> int:
        """Memory set aside for keys and values of `capacity` positions."""


class Backend(Protocol):
    """The operations that one model runs on. One instance per model: it owns its threads and its choice of kernels."""

    @property
    def name(self) -> str:
        """The name that `load_model` knows it by: "reference" or "cpu"."""

    @property
    def compute(self) -> str:
        """ "exact" (float32 activations) or "int8" (activations of quantised layers quantised on the fly)."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors that go in and come out."""

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> PackedLinear:
        """Lay out linear layers that read the same input; their outputs are concatenated in the given order.

        parts: at least one, all with the same number of input features K; quantised and dense ones may be mixed, and
        each may have its own permutation or none. A packed layer keeps no reference to the given tensors except to
        those it uses as they are (dense weights).

        Raises:
            ShapeError: no parts, or parts that disagree about K.
        """

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> PackedLowRank:
        """Lay out the change of linears that were packed together, one part for each, in their order.

        parts: at least one has a rank above 0. In "int8" the matrices may be held in 8 bits.
        """

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: PackedLowRank) -> None:
        """y += (x A^T) B^T in place: float32 activations and accumulation in both modes.

        x: [T, K] float32, contiguous, in the original order of features. y: [T, N_0 + N_1 + ...] float32, contiguous.
        """

    def linear(self, x: torch.Tensor, weight: PackedLinear, change: PackedLowRank | None = None) -> torch.Tensor:
        """y = x W + bias, and the low-rank change of these linears, as `add_low_rank_` adds it.

        x: [T, K] float32, contiguous, in the original order of features: the backend takes care of act-order.
        Returns [T, N_0 + N_1 + ...] float32, contiguous.

        Numerics. Dense weights: float32 activations and accumulation in both modes. Quantised weights in "exact":
        float32 activations times scale * (code - zero), float32 accumulation. In "int8": the input features, in the
        sorted order of the groups, are cut into blocks of 32 that never straddle a group (the last block of a group
        may be shorter). Per block and row of x: s = max|x| / 127, q = round-half-even(x / s); then y is the sum over
        blocks of s * scale * (sum of q * code - zero * sum of q), the inner sums in integers.
        """

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table.

        table: [V, C] float16, bfloat16 or float32. token_ids: [T] int64, each in 0..V.
        Returns [T, C] float32, contiguous.
        """

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y in place: the residual stream takes in what a block computed.

        x, y: [T, C] float32, contiguous.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

        x: [..., C] float32, any strides as long as the last dimension is contiguous. weight: [C] float32.
        Returns [..., C] float32, contiguous.
        """

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the pairs (i, i + R/2) of every head in place by the angles of its row; dims from R on stay.

            x_i  <-  x_i cos_i - x_{i+R/2} sin_i        x_{i+R/2}  <-  x_{i+R/2} cos_i + x_i sin_i

        (Su et al. 2021, arXiv:2104.09864, in the pairing of Hugging Face checkpoints.)

        x: [T, H, D] float32; a head is contiguous, heads follow each other, the stride of a row is free (a view of a
        fused projection). cos, sin: [T, R/2] float32, contiguous.
        """

    def new_kv(self, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> KvStore:
        """Room for keys and values of `capacity` positions of one layer instance, in torch.float16 or torch.float32.

        Memory is set aside at once but need not be touched (the system hands out pages as they are first written).
        """

    def append_(self, kv: KvStore, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Write keys (already rotated) and values to positions start..start+T, rounded to the dtype of the store.

        k, v: [T, Hkv, D] float32; a head is contiguous, heads follow each other, the stride of a row is free.

        Raises:
            ShapeError: positions beyond the capacity, a gap after the positions it holds, or heads of another shape.
        """

    def attend(self, q: torch.Tensor, kv: KvStore, start: int, window: int | None) -> torch.Tensor:
        """Causal attention of T queries at positions start..start+T over the keys 0..start+T, which the store holds.

            out_i = sum_j softmax_j(q_i k_j / sqrt(D)) v_j      over j <= i, and j > i - window if there is one

        q: [T, Hq, D] float32, rotated; a head is contiguous, heads follow each other, the stride of a row is free.
        Query head h reads key/value head h // (Hq / Hkv). Returns [T, Hq * D] float32, contiguous.
        Scratch memory does not grow with T times the number of keys.

        Raises:
            ShapeError: positions that the store does not hold, heads of another shape, or Hq not a multiple of Hkv.
        """

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up with silu(x) = x / (1 + exp(-x)).

        gate_up: [T, 2 * I] float32, contiguous: gate in the first half of a row, up in the second.
        Returns [T, I] float32, contiguous.
        """
