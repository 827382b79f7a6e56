"""Rows to vectors, whatever the table's kind. In: a table and rows. Out: vectors_NE."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Table


def decode_rows(
    table: Table, rows_N: NDArray[np.int64], *, dtype: DTypeLike = np.float32, num_threads: int = 1
) -> NDArray[Any]:
    """Vectors [N, E] of rows; MISSING_ROW gives zeros.

    Args:
        table: of any kind.
        rows_N: rows (int64).
        dtype: float32 or float16.
        num_threads: that the work is shared among.

    Raises:
        DamagedArtifactError: a row outside the table, or an impossible code.
    """
    return kernels.decode(table.stored, rows_N, dtype=dtype, num_threads=num_threads)
