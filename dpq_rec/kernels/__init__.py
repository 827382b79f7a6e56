"""The hot loops in C++. In: numpy arrays; lists of str. Out: numpy arrays. Numpy twins of them: tests/references.py.

The GIL is released. Every function raises ConfigError where arguments are of another type or size, or do not fit each
other, before anything is read; what comes from a file, rows, codes and offsets, is checked as it is read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.kernels.arguments import HasNative, call, check_array, new_array, shown

try:
    from dpq_rec.kernels import _native
except ImportError as error:
    message = "the C++ kernels of dpq_rec are not built; build them (with a C++17 compiler at hand): pip install ."
    raise ImportError(message) from error

MISSING_ROW = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Coded(HasNative):
    """The vectors of a compressed table: packed codes and values, as the C++ reads them.

    Attributes:
        layouts: of a row's codes in each tier, in the order of rows; one where all rows have as many levels.
        packed: packed codes [V, W] (uint8) of each tier.
        values_MKS: values (float32) [L*D, K, S], or [L, K, S] where the subspaces share them; L is the first tier's.
    """

    layouts: Sequence[CodeLayout]
    packed: Sequence[NDArray[np.uint8]]
    values_MKS: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not self.layouts:
            raise ConfigError("tiers: got none, want one or more")
        check_array("values", self.values_MKS, np.float32, None, None, None)

    @classmethod
    def of(cls, packed_VW: NDArray[np.uint8], values_MKS: NDArray[np.float32], layout: CodeLayout) -> Coded:
        """The vectors of a table of one tier."""
        return cls((layout,), (packed_VW,), values_MKS)

    def with_codes(self, packed: Sequence[NDArray[np.uint8]]) -> Coded:
        """Other rows with the same values, which are not copied again."""
        other = Coded(self.layouts, packed, self.values_MKS)
        vars(other)["native"] = call(_native.Vectors, self.native, other._native_tiers)
        return other

    @property
    def layout(self) -> CodeLayout:
        """Of the first tier, which has the most levels."""
        return self.layouts[0]

    @property
    def shared(self) -> bool:
        """Whether the subspaces share their values."""
        return len(self.values_MKS) == self.layout.num_levels != self.layout.codes_per_row

    @functools.cached_property
    def embedding_dim(self) -> int:
        """E = D * S."""
        return self.layout.num_subspaces * int(self.values_MKS.shape[2])

    @property
    def _native_tiers(self) -> list[tuple[NDArray[np.uint8], int]]:
        return [(packed, layout.num_levels) for packed, layout in zip(self.packed, self.layouts, strict=True)]

    @functools.cached_property
    def native(self) -> _native.Vectors:
        """The C++ object: kept, as making it takes longer than a small lookup."""
        sizes = self.layout.num_subspaces, self.layout.code_bits
        return call(_native.Vectors, self._native_tiers, self.values_MKS, *sizes, self.shared)


Vectors = Coded | NDArray[np.float32]  # of all rows of a table: as codes, or as they are [V, E]
Best = tuple[NDArray[np.int64], NDArray[np.float32]]  # T rows and their scores, the best first; of equal ones the lower
NO_ROWS: Best = np.empty(0, np.int64), np.empty(0, np.float32)


def decode(
    stored: Vectors, rows_N: NDArray[np.int64], *, dtype: DTypeLike = np.float32, num_threads: int = 1
) -> NDArray[Any]:
    """Vectors of rows.

    Args:
        stored: the vectors of all rows.
        rows_N: rows to decode (int64), contiguous; MISSING_ROW gives zeros.
        dtype: float32, or float16: the same numbers, rounded to nearest, ties to even.
        num_threads: that the work is shared among, this one included.

    Returns:
        vectors_NE, in that dtype.

    Raises:
        DamagedArtifactError: a row outside the table, or a code of K or more: nothing is read outside the arrays.
    """
    vectors = native_of(stored)
    out_NE = new_array(rows_N, vectors.dim, dtype=dtype)
    check_damage(stored, rows_N, call(_native.decode, vectors, rows_N, out_NE, num_threads))
    return out_NE


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
    """The sum or the mean of each bag's vectors, which are added in fp32, in order, as they are decoded.

    Args:
        stored: the vectors of all rows.
        rows_N: rows (int64), contiguous, bag after bag; MISSING_ROW adds nothing and does not count in a mean.
        bag_lengths_B: rows of each bag (int64); they sum to N. A bag without any, or of missing ones, is zeros.
        mean: divide by the number of rows that are there.
        weights_N: a factor of each row's vector (float32), contiguous.
        dtype: of the result, as in `decode`: the sums are rounded once.
        num_threads: that the work is shared among, this one included.

    Returns:
        pooled_BE, in that dtype.

    Raises:
        DamagedArtifactError: as in `decode`.
    """
    vectors = native_of(stored)
    out_BE = new_array(bag_lengths_B, vectors.dim, dtype=dtype)
    bad_at = call(_native.decode_bags, vectors, rows_N, weights_N, bag_lengths_B, mean, out_BE, num_threads)
    check_damage(stored, rows_N, bad_at)
    return out_BE


def copy_codes(stored: Coded, rows_N: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Packed codes of rows.

    Args:
        stored: the codes of all rows.
        rows_N: rows (int64), contiguous; MISSING_ROW gives zeros.

    Returns:
        packed_NW, of the width of the first tier, a row of fewer bytes filled up with zeros; and, where there are
        several tiers, tiers_N (uint8), 0 where a row is missing.

    Raises:
        DamagedArtifactError: a row outside the table.
    """
    check_coded(stored)
    packed_NW = new_array(rows_N, stored.layout.row_bytes, dtype=np.uint8)
    tiers_N = new_array(rows_N, dtype=np.uint8) if len(stored.layouts) > 1 else None
    check_damage(stored, rows_N, call(_native.copy_codes, stored.native, rows_N, packed_NW, tiers_N))
    return packed_NW, tiers_N


def check_coded(stored: Any) -> None:
    """Refuse what is not stored as codes.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(stored, Coded):
        raise ConfigError(f"stored: got {shown(stored)}, want vectors as codes")


def native_of(stored: Vectors) -> _native.Vectors:
    """The vectors, as the C++ takes them."""
    return stored.native if isinstance(stored, Coded) else call(_native.Vectors, stored)


def check_damage(stored: Vectors, rows_N: NDArray[np.int64], bad_at: Sequence[int]) -> None:
    """Raise what a kernel found damaged.

    Args:
        stored: the vectors of all rows.
        rows_N: those that were read.
        bad_at: positions among them of a row that is outside the table and of one whose codes cannot be; -1 for none.

    Raises:
        DamagedArtifactError: there is one.
    """
    bad_row_at, bad_code_at = bad_at
    if bad_row_at >= 0:
        num_rows = sum(map(len, stored.packed)) if isinstance(stored, Coded) else len(stored)
        raise DamagedArtifactError(f"row {rows_N[bad_row_at]} is outside the table's {num_rows} rows")
    if bad_code_at >= 0 and isinstance(stored, Coded):
        num_codes = stored.layout.num_codes
        raise DamagedArtifactError(f"row {rows_N[bad_code_at]} holds a code of {num_codes} or more")


def encode(
    queries_NDS: NDArray[np.float32],
    keys_DKS: NDArray[np.float32],
    scale_K: NDArray[np.float32],
    shift_K: NDArray[np.float32],
    *,
    euclidean: bool,
) -> NDArray[np.uint16]:
    """Codes of queries: in each subspace the k with the highest scale[k] * score[k] + shift[k].

    The score is the dot product of query and key, or minus their squared Euclidean distance. The lowest code wins a
    tie. A query's codes depend neither on the batch it stands in nor on the machine.

    Args:
        queries_NDS: queries (float32).
        keys_DKS: keys (float32).
        scale_K: factor per code (float32); ones where scores are not normalised.
        shift_K: summand per code (float32); zeros where scores are not normalised.
        euclidean: minus squared distance rather than dot product.

    Returns:
        codes_ND (uint16).
    """
    check_array("queries", queries_NDS, np.float32, None, None, None)
    keys_DSP = _in_lanes("keys", keys_DKS)
    scale_P, shift_P = _affine_in_lanes(scale_K, shift_K, keys_DKS.shape[1])
    codes_ND = np.empty(queries_NDS.shape[:2], np.uint16)
    call(_native.encode, np.ascontiguousarray(queries_NDS), keys_DSP, scale_P, shift_P, codes_ND, euclidean)
    return codes_ND


def softmax_gradients(
    queries_NDX: NDArray[np.float32],
    keys_DKX: NDArray[np.float32],
    values_DKS: NDArray[np.float32],
    affine: tuple[NDArray[np.float32], NDArray[np.float32]],
    gradients_NDS: NDArray[np.float32],
    *,
    euclidean: bool,
) -> tuple[NDArray[np.float32], ...]:
    """Gradients of sum over k of w[k] * value[k], where w is the softmax of scale[k] * score[k] + shift[k].

    Args:
        queries_NDX: queries (float32), contiguous.
        keys_DKX: keys (float32).
        values_DKS: values (float32).
        affine: scale_K and shift_K (float32).
        gradients_NDS: the loss's gradient by the mixture (float32), contiguous.
        euclidean: the score is minus the squared distance rather than the dot product.

    Returns:
        by queries [N, D, X], keys [D, K, X], values [D, K, S], scale [K] and shift [K] (float32).
    """
    keys_DXP, values_DSP = _in_lanes("keys", keys_DKX), _in_lanes("values", values_DKS)
    num_codes = keys_DKX.shape[1]
    check_array("values", values_DKS, np.float32, len(keys_DKX), num_codes, None)
    scale_P, shift_P = _affine_in_lanes(*affine, num_codes)
    inputs = (queries_NDX, keys_DXP, values_DSP, scale_P, shift_P)
    by_query, by_key, by_value, by_scale, by_shift = map(np.zeros_like, inputs)
    outputs = (by_query, by_key, by_value, by_scale, by_shift)
    call(_native.softmax_gradients, *inputs, gradients_NDS, *outputs, euclidean)
    return (
        by_query,
        by_key[:, :, :num_codes].transpose(0, 2, 1),
        by_value[:, :, :num_codes].transpose(0, 2, 1),
        by_scale[:num_codes],
        by_shift[:num_codes],
    )


def central_moments(
    queries_NDS: NDArray[np.float32], mean_DS: NDArray[np.float32], weights_N: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weighted sums over queries, [D, S*S + S + 2]: with c = query - mean and r = c.c, of c c^T, r c, r and r^2.

    Args:
        queries_NDS: queries (float32), contiguous.
        mean_DS: what they are centred on (float32), contiguous.
        weights_N: weight of each (float32), contiguous.
    """
    check_array("queries", queries_NDS, np.float32, None, None, None)
    _, num_subspaces, dim = queries_NDS.shape
    sums = np.zeros((num_subspaces, dim * dim + dim + 2))
    call(_native.central_moments, queries_NDS, mean_DS, weights_N, sums)
    return sums.astype(np.float32)


def central_moments_gradient(
    queries_NDS: NDArray[np.float32],
    mean_DS: NDArray[np.float32],
    weights_N: NDArray[np.float32],
    gradients: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The gradient [N, D, S] by the queries of what has `gradients` [D, S*S + S + 2] by their central moments.

    Its sum over queries, negated, is the gradient by the mean.
    """
    check_array("queries", queries_NDS, np.float32, None, None, None)
    _, num_subspaces, dim = queries_NDS.shape
    check_array("gradients", gradients, np.float32, num_subspaces, dim * dim + dim + 2)
    gradients = gradients.copy()
    by_covariance = gradients[:, : dim * dim].reshape(-1, dim, dim)
    gradients[:, : dim * dim] = ((by_covariance + by_covariance.transpose(0, 2, 1)) / 2).reshape(-1, dim * dim)
    out_NDS = np.empty_like(queries_NDS)
    call(_native.central_moments_gradient, queries_NDS, mean_DS, weights_N, gradients, out_NDS)
    return out_NDS


def _in_lanes(what: str, tensor_DKS: NDArray[np.float32]) -> NDArray[np.float32]:
    """[D, S, P]: codes side by side, filled up with zeros to whole vector registers."""
    check_array(what, tensor_DKS, np.float32, None, None, None)
    num_subspaces, num_codes, subspace_dim = tensor_DKS.shape
    padded_DSP = np.zeros((num_subspaces, subspace_dim, -(-num_codes // _native.LANES) * _native.LANES), np.float32)
    padded_DSP[:, :, :num_codes] = tensor_DKS.transpose(0, 2, 1)
    return padded_DSP


def _affine_in_lanes(
    scale_K: NDArray[np.float32], shift_K: NDArray[np.float32], num_codes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale [P] and shift [P], filled up so that no code beyond K has the highest score."""
    check_array("scale", scale_K, np.float32, num_codes)
    check_array("shift", shift_K, np.float32, num_codes)
    padded = -(-num_codes // _native.LANES) * _native.LANES
    scale_P, shift_P = np.zeros(padded, np.float32), np.full(padded, -np.inf, np.float32)
    scale_P[:num_codes], shift_P[:num_codes] = scale_K, shift_K
    return scale_P, shift_P


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
    """The rows with the highest scores: the sum of the scores of a row's codes in their order, times its scale.

    No vector is decoded. Sums are fp32.

    Args:
        packed_VW: packed codes (uint8).
        scores_MK: of each code of each group (float32).
        layout: how the codes of a row are laid out.
        most: T, rows that are wanted; fewer where there are no more.
        scales_V: factor of each row (float32); none for ones.
        first_row: of the whole table, where packed_VW is a part of it that begins there.
        before: the best of the rows before first_row; they are among those returned where they are good enough.

    Raises:
        DamagedArtifactError: a code of K or more, or a score that is no number: nothing is read outside the arrays.
    """
    check_array("packed", packed_VW, np.uint8, None, layout.row_bytes)
    check_array("scores", scores_MK, np.float32, layout.codes_per_row, layout.num_codes)
    if not isinstance(most, int) or most < 0:
        raise ConfigError(f"most: got {most!r}, want 0 or more")
    rows_B, scores_B = before
    check_array("before", rows_B, np.int64, None)
    check_array("before", scores_B, np.float32, len(rows_B))
    rows_B, scores_B = rows_B[:most], scores_B[:most]
    most = min(most, len(rows_B) + len(packed_VW))
    rows_T, scores_T = np.empty(most, np.int64), np.empty(most, np.float32)
    rows_T[: len(rows_B)], scores_T[: len(rows_B)] = rows_B, scores_B
    by_code = np.full((layout.codes_per_row, 1 << layout.code_bits), np.nan, np.float32)  # also those there are not
    by_code[:, : layout.num_codes] = scores_MK
    best, sizes = (rows_T, scores_T, len(rows_B)), (layout.num_codes, layout.code_bits)
    num_found, bad_row_at = call(_native.scan_top, packed_VW, by_code, scales_V, *sizes, first_row, *best)
    if bad_row_at >= 0:
        row = first_row + bad_row_at
        raise DamagedArtifactError(f"row {row} holds a code of {layout.num_codes} or more, or values that are none")
    return rows_T[:num_found], scores_T[:num_found]
