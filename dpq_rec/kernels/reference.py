"""The hot loops in plain numpy: what they compute, without how they are made fast. The tests hold the kernels to these.

Each takes what the function of the same name in `dpq_rec.kernels` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout, unpack_codes


def decode(
    packed_VW: NDArray[np.uint8],
    values_MKS: NDArray[np.float32],
    rows_N: NDArray[np.int64],
    layout: CodeLayout,
) -> NDArray[np.float32]:
    """Vectors [N, E]: group j is the sum over levels l of values[l*D + j, code(row, l*D + j)], added in order."""
    present_N = rows_N >= 0
    codes_NM = unpack_codes(packed_VW[np.where(present_N, rows_N, 0)], layout)
    shared = len(values_MKS) == layout.num_levels != layout.codes_per_row
    group_values = values_MKS.repeat(layout.num_subspaces, axis=0) if shared else values_MKS
    chosen_NMS = np.stack([values_KS[codes_NM[:, m]] for m, values_KS in enumerate(group_values)], axis=1)
    levels_NLE = chosen_NMS.reshape(len(rows_N), layout.num_levels, layout.num_subspaces * values_MKS.shape[2])
    vectors_NE = levels_NLE[:, 0]
    for level in range(1, layout.num_levels):
        vectors_NE = vectors_NE + levels_NLE[:, level]
    vectors_NE[~present_N] = 0
    return vectors_NE


def encode(
    queries_NDS: NDArray[np.float32],
    keys_DKS: NDArray[np.float32],
    scale_K: NDArray[np.float32],
    shift_K: NDArray[np.float32],
    *,
    euclidean: bool,
) -> NDArray[np.uint16]:
    """Codes [N, D]: the lowest k with the highest scale[k] * score[k] + shift[k], every step rounded to fp32."""
    scores_NDK: NDArray[np.float32] = np.zeros((*queries_NDS.shape[:2], keys_DKS.shape[1]), np.float32)
    for s in range(queries_NDS.shape[2]):
        query_ND1, key_1DK = queries_NDS[:, :, s, None], keys_DKS[None, :, :, s]
        scores_NDK = scores_NDK - (key_1DK - query_ND1) ** 2 if euclidean else scores_NDK + key_1DK * query_ND1
    codes_ND: NDArray[np.intp] = (scores_NDK * scale_K + shift_K).argmax(axis=-1)
    return codes_ND.astype(np.uint16)


def find_rows(
    ids: Sequence[str], id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64], rows_U: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Rows [N] of strings; -1 where one is not in the list."""
    row_of_id = dict(zip(_texts(id_bytes_T, id_offsets_U1), rows_U.tolist(), strict=True))
    return np.array([row_of_id.get(text.encode(), -1) for text in ids], np.int64)


def find_disorder(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> int | None:
    """The first id that is not above the one before it; offsets lie within the bytes here."""
    pairs = itertools.pairwise(_texts(id_bytes_T, id_offsets_U1))
    return next((at for at, (before, text) in enumerate(pairs, 1) if before >= text), None)


def _texts(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> list[bytes]:
    return [id_bytes_T[begin:end].tobytes() for begin, end in itertools.pairwise(id_offsets_U1.tolist())]
