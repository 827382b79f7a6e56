"""Queries to the rows nearest to them, exactly. In: a table, queries, k. Out: Neighbours(ids, scores).

A row's inner product with a query is the sum of those of its values: a table of scores, one for each code of each
group, is made of the query once, and a row takes M additions. No vector is decoded, but once for the lengths that
cosines want.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.ids import plain_array
from dpq_rec.kernels import NO_ROWS, Best

if TYPE_CHECKING:
    from dpq_rec.table import Table

Similarity = Literal["dot", "cosine"]
_BLOCK_NUMBERS = 1 << 20  # fp32 numbers of a table at a time: 4 MB
_BLOCK_ROWS = 1 << 24  # of codes at a time: some 20 ms
_LEAST_LENGTH = 1e-30  # of a vector that has a direction; one over less is more than fp32 holds


class Neighbours(NamedTuple):
    """Of each of Q queries the T best ids, the best first.

    Attributes:
        ids: int64 [Q, T], or Q lists of T strings. A row that several ids share has its lowest one.
        scores: float32 [Q, T].
    """

    ids: Any
    scores: NDArray[np.float32]


class IdsByRow:
    """The lowest id of each row.

    Args:
        ids: of all rows, row by row.
        rows_N: the row of each id, ascending.
        num_rows: V.
    """

    def __init__(self, ids: Any, rows_N: NDArray[np.int64], num_rows: int) -> None:
        (first_P,) = (np.diff(rows_N, prepend=-1) > 0).nonzero()
        self.ids, self.num_nameless = ids, num_rows - len(first_P)
        self.positions_V = np.full(num_rows, -1)  # where among the ids a row's lowest one is; -1 where it has none
        self.positions_V[rows_N[first_P]] = first_P

    def of(self, rows_QT: NDArray[np.int64]) -> Any:
        """Ids as `Neighbours` has them."""
        distinct_P, inverse = np.unique(self.positions_V[rows_QT], return_inverse=True)
        found, at_QT = self.ids[distinct_P], inverse.reshape(rows_QT.shape)
        return found[at_QT] if isinstance(found, np.ndarray) else [[found[at] for at in at_T] for at_T in at_QT]


def search_table(table: Table, queries: Any, k: int, similarity: Similarity, check: Callable[[], None]) -> Neighbours:
    """See `EmbeddingStore.search`."""
    if similarity not in ("dot", "cosine"):
        raise ConfigError(f"similarity: got {similarity!r}, want dot or cosine")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k: got {k!r}, want 1 or more")
    queries_QE = _checked(queries, table.manifest.embedding_dim)
    if similarity == "cosine":
        queries_QE = _of_length_one(queries_QE)
    # A row that no id leads to cannot be an answer: as many more are found, and those left out.
    ids = table.row_ids
    num_found = min(int(k), table.manifest.num_embeddings - ids.num_nameless)
    scales_V = table.inverse_lengths if similarity == "cosine" else None
    best = _best_by_codes if table.manifest.has_codes else _best_of_vectors
    rows_QT = np.empty((len(queries_QE), num_found), np.int64)
    scores_QT = np.empty((len(queries_QE), num_found), np.float32)
    for q, query_E in enumerate(queries_QE):
        rows_T, scores_T = best(table, query_E, num_found + ids.num_nameless, scales_V, check)
        (named_T,) = (ids.positions_V[rows_T] >= 0).nonzero()
        rows_QT[q], scores_QT[q] = rows_T[named_T[:num_found]], scores_T[named_T[:num_found]]
    return Neighbours(ids.of(rows_QT), scores_QT)


def _checked(queries: Any, dim: int) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # what is then infinite is refused below
            queries_QE = np.ascontiguousarray(plain_array(queries), np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        got = "something else than numbers, or rows of several widths"
        raise ConfigError(f"queries: got {got}; want [Q, {dim}]") from error
    if queries_QE.ndim != 2 or queries_QE.shape[1] != dim:
        raise ConfigError(f"queries: got shape {queries_QE.shape}, want [Q, {dim}]")
    if not np.isfinite(queries_QE).all():
        raise ConfigError("queries: got NaN or infinity, want finite numbers")
    return queries_QE


def _best_by_codes(
    table: Table,
    query_E: NDArray[np.float32],
    most: int,
    scales_V: NDArray[np.float32] | None,
    check: Callable[[], None],
) -> Best:
    scores_MK, best = _score_table(table, query_E), NO_ROWS
    for tier, of_tier_VW in zip(table.tiers, table.packed, strict=True):
        for start in range(0, tier.num_rows, _BLOCK_ROWS):
            check()
            packed_VW, first = of_tier_VW[start : start + _BLOCK_ROWS], tier.first_row + start
            best = kernels.scan_top(
                packed_VW,
                scores_MK[: tier.layout.codes_per_row],
                tier.layout,
                most,
                scales_V=None if scales_V is None else scales_V[first : first + len(packed_VW)],
                first_row=first,
                before=best,
            )
    return best


def _score_table(table: Table, query_E: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inner product of each value with its part of the query [M, K]."""
    layout, values_MKS = table.manifest.layout, table.values_fp32
    values_LDKS = values_MKS.reshape(layout.num_levels, -1, *values_MKS.shape[1:])  # D is 1 where they are shared
    parts_DS1 = query_E.reshape(layout.num_subspaces, -1, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        scores_LDK1: NDArray[np.float32] = np.matmul(values_LDKS, parts_DS1)
    scores_MK = scores_LDK1.reshape(layout.codes_per_row, layout.num_codes)
    # No sum of a row is larger.
    _check_scores(table.name, np.abs(scores_MK).max(1).sum(dtype=np.float64), "values", values_MKS)
    return scores_MK


def _best_of_vectors(
    table: Table,
    query_E: NDArray[np.float32],
    most: int,
    scales_V: NDArray[np.float32] | None,
    check: Callable[[], None],
) -> Best:
    """A dense table is read in pieces; those of its rows that are good enough are sorted."""
    best, vectors_VE = NO_ROWS, table.tensors["vectors"]
    for rows_N in _blocks(*vectors_VE.shape):
        check()
        here = slice(rows_N[0], rows_N[-1] + 1)
        with np.errstate(over="ignore", invalid="ignore"):
            scores_N = vectors_VE[here] @ query_E
            if scales_V is not None:
                scores_N = scores_N * scales_V[here]
        _check_scores(table.name, np.abs(scores_N).max(), "vectors", vectors_VE[here], int(rows_N[0]))
        rows_N, scores_N = np.concatenate([best[0], rows_N]), np.concatenate([best[1], scores_N])
        if len(rows_N) > most:  # all that are as good as the worst of the best, so that lower rows win a tie
            enough_N = scores_N >= np.partition(scores_N, len(scores_N) - most)[len(scores_N) - most]
            rows_N, scores_N = rows_N[enough_N], scores_N[enough_N]
        order_T = np.lexsort((rows_N, -scores_N))[:most]
        best = rows_N[order_T], scores_N[order_T]
    return best


def _check_scores(
    table: str, largest: np.floating[Any], what: str, numbers: NDArray[np.float32], first: int = 0
) -> None:
    """Whether fp32 holds the scores, of which the largest has this absolute value.

    Args:
        table: its name.
        largest: see above.
        what: they are made of, beside the queries.
        numbers: these, from the first row on.
        first: that row.

    Raises:
        DamagedArtifactError: it does not, as a number of the table is NaN or infinite.
        ConfigError: it does not, as queries and table are too large together.
    """
    if largest <= np.finfo(np.float32).max:
        return
    at = find_not_finite(numbers)
    if at is not None:
        place = f"{what}{[first + at[0], *at[1:]]}"
        raise DamagedArtifactError(f"table {table!r}: {place} is {numbers[at]}: it has no scores")
    raise ConfigError("queries: their scores are more than 32 bits hold; want smaller numbers")


def find_not_finite(numbers: NDArray[Any]) -> tuple[int, ...] | None:
    """Where the first NaN or infinity among numbers stands; None where there is none."""
    finite = np.isfinite(numbers)
    return None if finite.all() else tuple(int(at) for at in np.unravel_index(finite.argmin(), numbers.shape))


def inverse_lengths_of_rows(table: Table) -> NDArray[np.float32]:
    """1 / length [V] of each row's vector; 0 of one that has none, whose cosine with every other is 0."""
    inverse_V = np.empty(table.manifest.num_embeddings, np.float32)
    for rows_N in _blocks(table.manifest.num_embeddings, table.manifest.embedding_dim):
        vectors_NE = table.decode(rows_N)
        lengths_N: NDArray[np.float64] = np.sqrt(np.einsum("ne,ne->n", vectors_NE, vectors_NE, dtype=np.float64))
        inverse_V[rows_N] = np.divide(1, lengths_N, out=np.zeros_like(lengths_N), where=lengths_N > _LEAST_LENGTH)
    return inverse_V


def _blocks(num_rows: int, dim: int) -> list[NDArray[np.int64]]:
    """The rows of a table [V, E], in pieces."""
    width = max(1, _BLOCK_NUMBERS // dim)
    return [np.arange(start, min(start + width, num_rows)) for start in range(0, num_rows, width)]


def _of_length_one(queries_QE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries cut to length one; one of zeros stays so."""
    queries_QE64 = queries_QE.astype(np.float64)
    lengths_Q1 = np.linalg.norm(queries_QE64, axis=1, keepdims=True)
    return (queries_QE64 / np.where(lengths_Q1 > 0, lengths_Q1, 1)).astype(np.float32)
