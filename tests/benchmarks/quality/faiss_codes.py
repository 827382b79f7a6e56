"""A trained table compressed by faiss's quantizers. In: vectors_VE. Out: Stored, codes packed as in contract 3.

`pq` product quantization (Jegou et al., 2011); `opq` behind a learned rotation (Ge et al., 2013); `rq` residual
quantization with a beam search (Chen et al., 2010) and `aq` additive quantization by local search (LSQ++, Martinez et
al., 2018), both of each subspace by itself. Values and rotation are stored in fp16.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout, pack_codes, unpack_codes
from tests.benchmarks.quality.sizes import FLOAT_BYTES
from tests.benchmarks.quality.stored import Stored

Kind = Literal["pq", "opq", "rq", "aq"]
_MOST_LEVELS = 32
_BEAM = 16  # of encoding by `rq`; 5 in training, as faiss has it


@dataclasses.dataclass(frozen=True)
class FaissCodes:
    """Codes of one of faiss's quantizers.

    Attributes:
        kind: which.
        layout: D, K (a power of two) and L; L is 1 for `pq` and `opq`.
        seed: of the clustering.
    """

    kind: Kind
    layout: CodeLayout
    seed: int = 0

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Packed codes, centroids, and the rotation of `opq`."""
        rotation = embedding_dim**2 if self.kind == "opq" else 0
        return self.layout.table_bytes((num_embeddings, embedding_dim), FLOAT_BYTES) + FLOAT_BYTES * rotation

    def fit(self, vectors_VE: NDArray[np.float32]) -> Stored:
        """See `FaissCodes`."""
        vectors_VE = np.ascontiguousarray(vectors_VE, np.float32)
        rotation_EE = self._rotation(vectors_VE) if self.kind == "opq" else None
        turned_VE = vectors_VE if rotation_EE is None else vectors_VE @ rotation_EE.astype(np.float32).T
        groups = np.split(turned_VE, self.layout.num_subspaces, 1)
        parts = [self._subspace(np.ascontiguousarray(group_VS), d) for d, group_VS in enumerate(groups)]
        codes_VM = np.stack([codes_VL for codes_VL, _ in parts], 2).reshape(len(vectors_VE), -1)
        values_LDKS = np.stack([values_LKS for _, values_LKS in parts], 1)
        values_MKS = values_LDKS.reshape(-1, *values_LDKS.shape[2:]).astype(np.float16)
        tensors: dict[str, NDArray[Any]] = {"packed_codes": pack_codes(codes_VM, self.layout), "values": values_MKS}
        decoded_VE = decode(tensors, self.layout)
        if rotation_EE is None:
            return Stored(tensors=tensors, vectors_VE=decoded_VE, layout=self.layout)
        back_VE = decoded_VE @ rotation_EE.astype(np.float32)
        return Stored(tensors={**tensors, "rotation": rotation_EE}, vectors_VE=back_VE)

    def _rotation(self, vectors_VE: NDArray[np.float32]) -> NDArray[np.float16]:
        dim = vectors_VE.shape[1]
        found = faiss.OPQMatrix(dim, self.layout.num_subspaces)
        quantizer = faiss.ProductQuantizer(dim, self.layout.num_subspaces, self.layout.code_bits)
        quantizer.cp.seed = self.seed
        found.pq = quantizer
        found.train(vectors_VE)
        return faiss.vector_to_array(found.A).reshape(dim, dim).astype(np.float16)

    def _subspace(self, group_VS: NDArray[np.float32], number: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Codes [V, L] and values [L, K, S] of one subspace."""
        width, num_levels, bits = group_VS.shape[1], self.layout.num_levels, self.layout.code_bits
        quantizer: Any
        if self.kind in ("pq", "opq"):
            quantizer = faiss.ProductQuantizer(width, 1, bits)
        elif self.kind == "rq":
            quantizer = faiss.ResidualQuantizer(width, num_levels, bits)
            if len(group_VS) < width:  # faiss begins with principal components, of which there are too few
                quantizer.train_type = faiss.ResidualQuantizer.Train_default
        else:
            quantizer = faiss.LocalSearchQuantizer(width, num_levels, bits)
            quantizer.random_seed = self.seed + number
        if self.kind != "aq":
            quantizer.cp.seed = self.seed + number
        quantizer.train(group_VS)
        if self.kind == "rq":
            quantizer.max_beam_size = _BEAM
        codes_VL = faiss.unpack_bitstrings(quantizer.compute_codes(group_VS), num_levels, bits)
        flat = faiss.vector_to_array(quantizer.centroids if self.kind in ("pq", "opq") else quantizer.codebooks)
        return codes_VL, flat.reshape(num_levels, self.layout.num_codes, width)


def decode(tensors: dict[str, NDArray[Any]], layout: CodeLayout) -> NDArray[np.float32]:
    """Vectors [V, E] of packed codes and values, shared by subspaces or not, level after level as contract 3 adds."""
    codes_VM = unpack_codes(tensors["packed_codes"], layout)
    values_MKS = tensors["values"].astype(np.float32)
    values_MKS = np.repeat(values_MKS, layout.codes_per_row // len(values_MKS), 0)
    chosen_VMS = values_MKS[np.arange(layout.codes_per_row), codes_VM]
    levels_VLE = chosen_VMS.reshape(len(codes_VM), layout.num_levels, -1)
    total_VE = levels_VLE[:, 0].copy()
    for number in range(1, layout.num_levels):
        total_VE += levels_VLE[:, number]
    return total_VE


@dataclasses.dataclass(frozen=True)
class FaissSizes:
    """The sizes of a kind: of `pq` and `opq` the number of subspaces, of `rq` and `aq` the number of levels.

    Attributes:
        kind: see `FaissCodes`.
        num_codes: K.
        num_subspaces: D, of `rq` and `aq`.
    """

    kind: Kind
    num_codes: int
    num_subspaces: int = 1

    def largest(self, num_embeddings: int, embedding_dim: int, num_bytes: int) -> FaissCodes | None:
        """See `sizes.Largest`; none where there are fewer rows than codes."""
        if num_embeddings < self.num_codes or embedding_dim % self.num_subspaces:
            return None
        if self.kind in ("pq", "opq"):
            layouts = [
                CodeLayout(num_subspaces=d, num_codes=self.num_codes)
                for d in range(1, embedding_dim + 1)
                if embedding_dim % d == 0
            ]
        else:
            layouts = [
                CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes, num_levels=num_levels)
                for num_levels in range(1, _MOST_LEVELS + 1)
            ]
        sizes = [FaissCodes(self.kind, layout) for layout in layouts]
        fitting = [size for size in sizes if size.num_bytes(num_embeddings, embedding_dim) <= num_bytes]
        return fitting[-1] if fitting else None
