"""The hot loops in plain numpy: what they compute, without how they are made fast. The tests hold the kernels to these.

Each takes what the function of the same name in `dpq_rec.kernels` or `dpq_rec.kernels.lookup` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.codes import CodeLayout, unpack_codes
from dpq_rec.kernels import NO_ROWS, Best, Coded, Vectors
from dpq_rec.kernels.lookup import JsonTexts


def decode(
    stored: Vectors, rows_N: NDArray[np.int64], *, dtype: DTypeLike = np.float32, num_threads: int = 1
) -> NDArray[Any]:
    """Vectors [N, E], from the tier that each row is in; its first row is the one behind the last of those before."""
    del num_threads  # as many do the same
    present_N = rows_N >= 0
    vectors_NE = np.zeros((len(rows_N), _embedding_dim(stored)), np.float32)
    if not isinstance(stored, Coded):
        vectors_NE[present_N] = stored[rows_N[present_N]]
        return vectors_NE.astype(dtype)
    first = 0
    for layout, packed_VW in zip(stored.layouts, stored.packed, strict=True):
        here_N = present_N & (rows_N >= first) & (rows_N < first + len(packed_VW))
        vectors_NE[here_N] = _decode_tier(stored, layout, packed_VW[rows_N[here_N] - first])
        first += len(packed_VW)
    return vectors_NE.astype(dtype)


def _embedding_dim(stored: Vectors) -> int:
    return stored.embedding_dim if isinstance(stored, Coded) else int(stored.shape[1])


def _decode_tier(stored: Coded, layout: CodeLayout, packed_NW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Group j is the sum over the tier's levels l of values[l*D + j, code(row, l*D + j)], added in order."""
    values_MKS, codes_NM = stored.values_MKS, unpack_codes(packed_NW, layout)
    group_values = values_MKS.repeat(layout.num_subspaces, axis=0) if stored.shared else values_MKS
    chosen_NMS = np.stack([group_values[m][codes_NM[:, m]] for m in range(layout.codes_per_row)], axis=1)
    levels_NLE = chosen_NMS.reshape(len(packed_NW), layout.num_levels, stored.embedding_dim)
    vectors_NE: NDArray[np.float32] = levels_NLE[:, 0]
    for level in range(1, layout.num_levels):
        vectors_NE = vectors_NE + levels_NLE[:, level]
    return vectors_NE


def decode_bags(
    stored: Vectors,
    rows_N: NDArray[np.int64],
    bag_lengths_B: NDArray[np.int64],
    *,
    mean: bool = False,
    weights_N: NDArray[np.float32] | None = None,
    dtype: DTypeLike = np.float32,
    num_threads: int = 1,
) -> NDArray[Any]:
    """Pooled [B, E]: not by np.add.reduceat, which adds pairwise and gives an empty bag the next one's first vector."""
    del num_threads
    present_N = rows_N >= 0
    bags_P = np.repeat(np.arange(len(bag_lengths_B)), bag_lengths_B)[present_N]
    vectors_PE = decode(stored, rows_N[present_N])
    if weights_N is not None:
        vectors_PE = vectors_PE * weights_N[present_N, None]
    pooled_BE = np.zeros((len(bag_lengths_B), vectors_PE.shape[1]), np.float32)
    np.add.at(pooled_BE, bags_P, vectors_PE)
    if mean:
        counts_B = np.bincount(bags_P, minlength=len(bag_lengths_B))
        pooled_BE /= np.maximum(counts_B, 1).astype(np.float32)[:, None]
    return pooled_BE.astype(dtype)


def decode_to_json(
    stored: Coded, texts: JsonTexts, rows_N: NDArray[np.int64], *, before: bytes = b"", after: bytes = b""
) -> bytes:
    """Vectors, from the texts of their groups; the last one's comma gives way to the bracket."""
    layout, ends = stored.layout, texts.ends_G.tolist()
    groups = [texts.groups[begin:end] for begin, end in itertools.pairwise([0, *ends])]
    first_M = 0 if stored.shared else layout.num_codes * np.arange(layout.codes_per_row)
    packed_VW = np.concatenate(stored.packed)
    chosen = iter((first_M + unpack_codes(packed_VW[rows_N[rows_N >= 0]], layout)).tolist())
    vectors = [
        texts.zeros[:-1] if row < 0 else b"[%b]" % b"".join(groups[g] for g in next(chosen))[:-1]
        for row in rows_N.tolist()
    ]
    return before + b",".join(vectors) + after


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


def softmax_gradients(
    queries_NDX: NDArray[np.float32],
    keys_DKX: NDArray[np.float32],
    values_DKS: NDArray[np.float32],
    affine: tuple[NDArray[np.float32], NDArray[np.float32]],
    gradients_NDS: NDArray[np.float32],
    *,
    euclidean: bool,
) -> tuple[NDArray[np.float32], ...]:
    """Gradients of the mixture of values by the softmax of the scores."""
    scale_K, shift_K = affine
    differences_NDKX = keys_DKX - queries_NDX[:, :, None]
    scores_NDK = np.einsum("ndx,dkx->ndk", queries_NDX, keys_DKX)
    if euclidean:
        scores_NDK = -(differences_NDKX**2).sum(-1)
    logits_NDK = scores_NDK * scale_K + shift_K
    weights_NDK = np.exp(logits_NDK - logits_NDK.max(-1, keepdims=True))
    weights_NDK /= weights_NDK.sum(-1, keepdims=True)
    pulls_NDK = np.einsum("nds,dks->ndk", gradients_NDS, values_DKS)
    of_logits_NDK = weights_NDK * (pulls_NDK - (weights_NDK * pulls_NDK).sum(-1, keepdims=True))
    of_scores_NDK = of_logits_NDK * scale_K
    by_keys_NDKX = 2 * differences_NDKX if euclidean else np.broadcast_to(keys_DKX, differences_NDKX.shape)
    by_queries_NDKX = (
        -2 * differences_NDKX if euclidean else np.broadcast_to(queries_NDX[:, :, None], differences_NDKX.shape)
    )
    return (
        np.einsum("ndk,ndkx->ndx", of_scores_NDK, by_keys_NDKX),
        np.einsum("ndk,ndkx->dkx", of_scores_NDK, by_queries_NDKX),
        np.einsum("ndk,nds->dks", weights_NDK, gradients_NDS),
        (of_logits_NDK * scores_NDK).sum((0, 1)),
        of_logits_NDK.sum((0, 1)),
    )


def central_moments(
    queries_NDS: NDArray[np.float32], mean_DS: NDArray[np.float32], weights_N: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weighted sums over queries of c c^T, r c, r and r^2, with c = query - mean and r = c.c."""
    centred_NDS = queries_NDS - mean_DS
    squared_ND = (centred_NDS**2).sum(-1)
    parts = [
        np.einsum("n,nds,ndt->dst", weights_N, centred_NDS, centred_NDS).reshape(len(mean_DS), -1),
        np.einsum("n,nd,nds->ds", weights_N, squared_ND, centred_NDS),
        np.stack([weights_N @ squared_ND, weights_N @ squared_ND**2], 1),
    ]
    moments: NDArray[np.float32] = np.concatenate(parts, 1)
    return moments


def central_moments_gradient(
    queries_NDS: NDArray[np.float32],
    mean_DS: NDArray[np.float32],
    weights_N: NDArray[np.float32],
    gradients: NDArray[np.float32],
) -> NDArray[np.float32]:
    """By the queries: the sum over the moments of each one's gradient times its derivative."""
    centred_NDS, dim = queries_NDS - mean_DS, queries_NDS.shape[2]
    squared_ND1 = (centred_NDS**2).sum(-1, keepdims=True)
    by_covariance, by_third, by_norms = np.split(gradients, [dim * dim, dim * dim + dim], axis=1)
    by_covariance = by_covariance.reshape(-1, dim, dim)
    out_NDS = np.einsum("dst,ndt->nds", by_covariance + by_covariance.transpose(0, 2, 1), centred_NDS)
    out_NDS = out_NDS + 2 * (centred_NDS * by_third).sum(-1, keepdims=True) * centred_NDS + squared_ND1 * by_third
    out_NDS = out_NDS + (2 * by_norms[:, :1] + 4 * by_norms[:, 1:] * squared_ND1) * centred_NDS
    weighted_NDS: NDArray[np.float32] = weights_N[:, None, None] * out_NDS
    return weighted_NDS


def scan_top(
    packed_VW: NDArray[np.uint8],
    scores_MK: NDArray[np.float32],
    layout: CodeLayout,
    most: int,
    *,
    scales_V: NDArray[np.float32] | None = None,
    first_row: int = 0,
    before: Best = NO_ROWS,
) -> Best:
    """Sorted by falling score, then by row."""
    codes_VM = unpack_codes(packed_VW, layout)
    scores_V = scores_MK[0, codes_VM[:, 0]]
    for m in range(1, layout.codes_per_row):
        scores_V = scores_V + scores_MK[m, codes_VM[:, m]]
    if scales_V is not None:
        scores_V = scores_V * scales_V
    rows = np.concatenate([before[0], first_row + np.arange(len(packed_VW))])
    scores = np.concatenate([before[1], scores_V])
    order_T = np.lexsort((rows, -scores))[:most]
    return rows[order_T], scores[order_T]


def find_integer_rows(
    ids_N: NDArray[np.int64], known_U: NDArray[np.int64], rows_U: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Rows [N] of integers; -1 where one is not in the list."""
    if not len(known_U):
        return np.full(len(ids_N), -1, np.int64)
    at_N = np.minimum(np.searchsorted(known_U, ids_N), len(known_U) - 1)
    return np.where(known_U[at_N] == ids_N, rows_U[at_N].astype(np.int64), -1)


def copy_codes(stored: Coded, rows_N: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Packed codes [N, W] of rows, zeros where one is missing or short, and the tier [N] of each."""
    width = stored.layout.row_bytes
    packed_NW, tiers_N = np.zeros((len(rows_N), width), np.uint8), np.zeros(len(rows_N), np.uint8)
    for n, row in enumerate(rows_N):
        for at, packed_VW in enumerate(stored.packed):
            if 0 <= row < len(packed_VW):
                packed_NW[n, : packed_VW.shape[1]], tiers_N[n] = packed_VW[row], at
                break
            row -= len(packed_VW)  # a missing one stays negative
    return packed_NW, tiers_N


def find_string_rows(
    ids: Sequence[str], id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64], rows_U: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Rows [N] of strings; -1 where one is not in the list."""
    row_of_id = dict(zip(_texts(id_bytes_T, id_offsets_U1), rows_U.tolist(), strict=True))
    return np.array([row_of_id.get(text.encode(), -1) for text in ids], np.int64)


def fill_slots(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64], num_slots: int) -> NDArray[np.uint32]:
    """A hash table [H] of strings, as `dpq_rec.kernels.ids` lays it down."""
    slots, texts = [0] * num_slots, _texts(id_bytes_T, id_offsets_U1)
    for entry, text in enumerate(texts):
        hashed = _hash(text)
        at = hashed * num_slots >> 64
        while slots[at]:
            at = (at + 1) % num_slots
        slots[at] = ((hashed << len(texts).bit_length()) + entry + 1) % 2**32
    return np.array(slots, np.uint32)


def _hash(text: bytes) -> int:
    by_word, by_size = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
    words = [text[at : at + 8] for at in range(0, len(text) - 8, 8)] + [text[-8:]]
    hashed = len(text) * by_size % 2**64
    for word in words:
        hashed = _fold((hashed ^ int.from_bytes(word, "little")) * by_word)
    return _fold(hashed * by_size)


def _fold(product: int) -> int:
    return product >> 64 ^ product % 2**64


def find_disorder(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> int | None:
    """The first id that is not above the one before it; offsets lie within the bytes here."""
    pairs = itertools.pairwise(_texts(id_bytes_T, id_offsets_U1))
    return next((at for at, (before, text) in enumerate(pairs, 1) if before >= text), None)


def _texts(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> list[bytes]:
    return [id_bytes_T[begin:end].tobytes() for begin, end in itertools.pairwise(id_offsets_U1.tolist())]
