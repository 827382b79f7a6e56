"""How many directions a table's vectors take up. In: a table. Out: singular values, and how many are not noise.

The DPQ paper's theorem 1: a table that is decoded from codes can have full rank, unlike one of low-rank factors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.table import Table

_SAMPLE_NUMBERS = 1 << 23  # fp64 numbers of the rows that are decomposed: 64 MiB
_LEAST_ROWS_PER_COLUMN = 2


class Spectrum(NamedTuple):
    """What a singular value decomposition of the decoded rows shows.

    Attributes:
        singular_values_R: falling (float64), as many as the smaller of rows and columns.
        num_rows: rows that were decomposed.
        tolerance: singular values above this share of the largest count.
        rank: how many do.
    """

    singular_values_R: NDArray[np.float64]
    num_rows: int
    tolerance: float
    rank: int

    def directions_of(self, share: float) -> int:
        """How many leading directions hold a share of the vectors' squared length."""
        squares_R = np.square(self.singular_values_R)
        return int(np.searchsorted(np.cumsum(squares_R), share * squares_R.sum())) + 1


def spectrum(table: Table) -> Spectrum | None:
    """The spectrum of a table, or of an even sample of its rows where it is large; None where a number is not finite.

    The tolerance is E times the precision of fp32: rounding to fp32 leaves noise of no more than that, however many
    rows there are. (numpy's matrix_rank multiplies by the number of rows too, and would call directions noise that
    training put there: at a million rows all below a tenth of the largest.)
    """
    rows_N = spread_rows(table.manifest.num_embeddings, most_rows(table.manifest.embedding_dim))
    vectors_NE = table.decode(rows_N).astype(np.float64)
    if not np.isfinite(vectors_NE).all():
        return None
    singular_values_R: NDArray[np.float64] = np.linalg.svd(vectors_NE, compute_uv=False).astype(np.float64)
    tolerance = table.manifest.embedding_dim * float(np.finfo(np.float32).eps)
    largest = singular_values_R.max(initial=0.0)
    rank = int((singular_values_R > tolerance * largest).sum())
    return Spectrum(singular_values_R, len(rows_N), tolerance, rank)


def most_rows(embedding_dim: int) -> int:
    """Rows of a table that are decomposed at most."""
    return max(_SAMPLE_NUMBERS // embedding_dim, _LEAST_ROWS_PER_COLUMN * embedding_dim)


def spread_rows(num_embeddings: int, most: int) -> NDArray[np.int64]:
    """All rows, or `most` of them: one, at random, of each of as many ranges of equal length. The same every time."""
    if num_embeddings <= most:
        return np.arange(num_embeddings)
    starts_N = np.arange(most + 1) * num_embeddings // most
    return np.random.default_rng(0).integers(starts_N[:-1], starts_N[1:])
