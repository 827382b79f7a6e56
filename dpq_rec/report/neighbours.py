"""Which rows are nearest to which. In: a table and rows of it. Out: the nearest others, by cosine of decoded vectors.

The search is exact: every row of the table is decoded, a block at a time, whatever the table's kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.table import Table

_BLOCK_NUMBERS = 1 << 22  # fp32 numbers decoded at a time
_DECIMALS = 6  # of a cosine: what a matrix product leaves below them depends on the block a row stands in


class Nearest(NamedTuple):
    """Of each of Q rows, the T nearest others: rows_QT (int64) and cosines_QT (float32), which fall."""

    rows_QT: NDArray[np.int64]
    cosines_QT: NDArray[np.float32]


def nearest_rows(
    table: Table,
    rows_Q: NDArray[np.int64],
    most: int,
    progress: Callable[[int], object] = lambda num_rows: None,
) -> Nearest:
    """The nearest other rows of each row; the lower row comes first where cosines tie.

    A vector without a direction, because it is zero or not finite, has a cosine of 0 with every other.

    Args:
        table: of any kind.
        rows_Q: rows of the table (int64).
        most: how many to find of each; fewer where the table has no more.
        progress: called with the number of rows of each block.

    Raises:
        DamagedArtifactError: an impossible code.
    """
    num_rows, width = table.manifest.num_embeddings, max(1, _BLOCK_NUMBERS // table.manifest.embedding_dim)
    queries_QE = directions(table.decode(rows_Q))
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in rows_Q]
    for start in range(0, num_rows, width):
        block_N = np.arange(start, min(start + width, num_rows))
        cosines_QN = np.round(queries_QE @ directions(table.decode(block_N)).T, _DECIMALS)
        for q, row in enumerate(rows_Q.tolist()):
            cosines_N = cosines_QN[q]
            worst = best[q][1][-1] if len(best[q][1]) == most else -np.inf
            better_N = np.flatnonzero((cosines_N > worst) & (block_N != row))
            rows_T, cosines_T = best[q]
            candidates_N = np.concatenate([rows_T, block_N[better_N]])
            best[q] = _first(most, candidates_N, np.concatenate([cosines_T, cosines_N[better_N]]))
        progress(len(block_N))
    num_found = min(most, num_rows - 1) if num_rows else 0
    return Nearest(
        np.array([rows_T for rows_T, _ in best], np.int64).reshape(len(rows_Q), num_found),
        np.array([cosines_T for _, cosines_T in best], np.float32).reshape(len(rows_Q), num_found),
    )


def _first(
    most: int, rows_N: NDArray[np.int64], cosines_N: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Those with the highest cosines; rows ascend, and a stable sort keeps that order where cosines tie."""
    order_T = np.argsort(-cosines_N, kind="stable")[:most]
    return rows_N[order_T], cosines_N[order_T]


def directions(vectors_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of length 1 (float32); zeros where one is zero or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares_N = np.einsum("ne,ne->n", vectors_NE, vectors_NE, dtype=np.float64)
        sound_N = np.isfinite(squares_N) & (squares_N > 0)
        scale_N = 1 / np.sqrt(np.where(sound_N, squares_N, 1))
        return np.where(sound_N[:, None], vectors_NE * scale_N[:, None], 0).astype(np.float32)


def telling_rows(table: Table, candidates_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Some of the candidates, in their order, passing over those nearer to a chosen one than candidates usually are.

    Rows that say the same twice are left out: the median cosine of two candidates is the limit.
    """
    directions_NE = directions(table.decode(candidates_N))
    cosines_NN = directions_NE @ directions_NE.T
    usual = float(np.median(cosines_NN[np.triu_indices(len(candidates_N), 1)])) if len(candidates_N) > 1 else 0.0
    chosen: list[int] = []
    for n in range(len(candidates_N)):
        if len(chosen) < most and all(cosines_NN[n, other] <= usual for other in chosen):
            chosen.append(n)
    return candidates_N[chosen]
