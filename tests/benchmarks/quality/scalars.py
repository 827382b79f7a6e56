"""A trained table compressed without codebooks, by SVD or FBGEMM. In: vectors_VE. Out: Stored."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.quality.sizes import FLOAT_BYTES
from tests.benchmarks.quality.stored import Stored


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The best approximation of a rank (Eckart and Young): two factors in fp16, [V, r] and [r, E]."""

    rank: int

    @classmethod
    def largest(cls, num_embeddings: int, embedding_dim: int, num_bytes: int) -> LowRank | None:
        """See `sizes.Largest`."""
        rank = min(num_bytes // (FLOAT_BYTES * (num_embeddings + embedding_dim)), num_embeddings, embedding_dim)
        return cls(rank) if rank else None

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Two factors in fp16."""
        return FLOAT_BYTES * self.rank * (num_embeddings + embedding_dim)

    def fit(self, vectors_VE: NDArray[np.float32]) -> Stored:
        """Singular values go to both factors by halves, so that fp16 rounds them alike."""
        left_VR, singular_R, right_RE = np.linalg.svd(vectors_VE.astype(np.float64), full_matrices=False)
        roots_R = np.sqrt(singular_R[: self.rank])
        tensors = {
            "rows": (left_VR[:, : self.rank] * roots_R).astype(np.float16),
            "projection": (roots_R[:, None] * right_RE[: self.rank]).astype(np.float16),
        }
        decoded_VE = tensors["rows"].astype(np.float32) @ tensors["projection"].astype(np.float32)
        return Stored(tensors=tensors, vectors_VE=decoded_VE)


@dataclasses.dataclass(frozen=True)
class Scalar:
    """FBGEMM's row-wise scalar quantization: each number of a row between the row's least and largest.

    With 8 bits a row has an fp32 scale and offset beside it, with 4 and 2 bits fp16 ones. It has one size only.
    """

    bits: int

    SCALE_BYTES: ClassVar = {8: 8, 4: 4, 2: 4}

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Rows of E numbers, then scale and offset, in one uint8 tensor."""
        return num_embeddings * (-(-embedding_dim * self.bits // 8) + self.SCALE_BYTES[self.bits])

    def fit(self, vectors_VE: NDArray[np.float32]) -> Stored:
        """See `Scalar`."""
        ops, rows_VE = torch.ops.fbgemm, torch.from_numpy(np.ascontiguousarray(vectors_VE))
        if self.bits == 8:
            fused = ops.FloatToFused8BitRowwiseQuantized(rows_VE)
            decoded_VE = ops.Fused8BitRowwiseQuantizedToFloat(fused)
        else:
            fused = ops.FloatToFusedNBitRowwiseQuantizedSBHalf(rows_VE, self.bits)
            decoded_VE = ops.FusedNBitRowwiseQuantizedSBHalfToFloat(fused, self.bits)
        return Stored(tensors={"fused_rows": fused.numpy()}, vectors_VE=decoded_VE.numpy())
