"""Queries to the rows nearest to them, exactly. In: a table, queries, k. Out: Neighbours(ids, scores).

A row's inner product with a query is the sum of those of its values: a table of scores, one for each code of each
group, is made of the query once, and a row takes M additions. No vector is decoded, but once for the lengths that
cosines want.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Table
from dpq_rec.contents import find_not_finite
from dpq_rec.decode import decode_rows
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.ids import plain_array
from dpq_rec.kernels import Best

Similarity = Literal["dot", "cosine"]
Check = Callable[[], None] | None
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


class _Names(NamedTuple):
    """The ids of rows.

    Attributes:
        ids: of all rows, row by row.
        positions_V: where among them the lowest id of a row is (int64); -1 where a row has none.
        num_nameless: rows that have none.
    """

    ids: Any
    positions_V: NDArray[np.int64]
    num_nameless: int

    @classmethod
    def of_table(cls, table: Table) -> _Names:
        ids, rows_N = table.vocabulary.ids_of_rows(0, table.manifest.num_embeddings)
        (first_P,) = (np.diff(rows_N, prepend=-1) > 0).nonzero()
        positions_V = np.full(table.manifest.num_embeddings, -1)
        positions_V[rows_N[first_P]] = first_P
        return cls(ids, positions_V, len(positions_V) - len(first_P))

    def of(self, rows_QT: NDArray[np.int64]) -> Any:
        """Ids as `Neighbours` has them."""
        distinct_P, inverse = np.unique(self.positions_V[rows_QT], return_inverse=True)
        found, at_QT = self.ids[distinct_P], inverse.reshape(rows_QT.shape)
        return found[at_QT] if isinstance(found, np.ndarray) else [[found[at] for at in at_T] for at_T in at_QT]


class TableSearch:
    """A table, ready to be searched.

    What takes time or memory that grows with the table is made when it is first asked for: where the ids of rows are
    (16 bytes a row), and for cosines the lengths of vectors (4 bytes a row).
    """

    def __init__(self, table: Table) -> None:
        self.table = table

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made when it is asked for."""
        return {"table": self.table}

    def __call__(self, queries: Any, k: int, similarity: Similarity, check: Check = None) -> Neighbours:
        """See `EmbeddingStore.search`."""
        if similarity not in ("dot", "cosine"):
            raise ConfigError(f"similarity: got {similarity!r}, want dot or cosine")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k: got {k!r}, want 1 or more")
        queries_QE = self._checked(queries)
        if similarity == "cosine":
            queries_QE = _of_length_one(queries_QE)
        # A row that no id leads to cannot be an answer: as many more are found, and those left out.
        num_nameless = self._names.num_nameless
        num_found = min(int(k), self.table.manifest.num_embeddings - num_nameless)
        scales_V = self._inverse_lengths_of_rows if similarity == "cosine" else None
        rows_QT = np.empty((len(queries_QE), num_found), np.int64)
        scores_QT = np.empty((len(queries_QE), num_found), np.float32)
        for q, query_E in enumerate(queries_QE):
            rows_T, scores_T = self._best(query_E, num_found + num_nameless, scales_V, check or _go_on)
            (named_T,) = (self._names.positions_V[rows_T] >= 0).nonzero()
            rows_QT[q], scores_QT[q] = rows_T[named_T[:num_found]], scores_T[named_T[:num_found]]
        return Neighbours(self._names.of(rows_QT), scores_QT)

    def _checked(self, queries: Any) -> NDArray[np.float32]:
        dim = self.table.manifest.embedding_dim
        try:
            with np.errstate(over="ignore"):  # what is then infinite is refused below
                queries_QE = np.ascontiguousarray(plain_array(queries), np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"queries: got something else than numbers, or rows of several widths; want [Q, {dim}]"
            ) from error
        if queries_QE.ndim != 2 or queries_QE.shape[1] != dim:
            raise ConfigError(f"queries: got shape {queries_QE.shape}, want [Q, {dim}]")
        if not np.isfinite(queries_QE).all():
            raise ConfigError("queries: got numbers that are infinite or none, want finite ones")
        return queries_QE

    def _best(
        self, query_E: NDArray[np.float32], most: int, scales_V: NDArray[np.float32] | None, check: Callable[[], None]
    ) -> Best:
        if not self.table.manifest.has_codes:
            return self._best_of_vectors(query_E, most, scales_V, check)
        scores_MK, best = self._score_table(query_E), Best.none()
        for tier in self.table.tiers:
            for start in range(0, len(tier.packed_VW), _BLOCK_ROWS):
                check()
                packed_VW, first = tier.packed_VW[start : start + _BLOCK_ROWS], tier.first_row + start
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

    def _score_table(self, query_E: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inner product of each value with its part of the query [M, K]."""
        layout, values_MKS = self.table.manifest.layout, self.table.tensors["values_fp32"]
        values_LDKS = values_MKS.reshape(layout.num_levels, -1, *values_MKS.shape[1:])  # D is 1 where they are shared
        parts_DS1 = query_E.reshape(layout.num_subspaces, -1, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            scores_LDK1: NDArray[np.float32] = np.matmul(values_LDKS, parts_DS1)
        scores_MK = scores_LDK1.reshape(layout.codes_per_row, layout.num_codes)
        # No sum of a row is larger.
        self._check_scores(np.abs(scores_MK).max(1).sum(dtype=np.float64), "values", values_MKS)
        return scores_MK

    def _best_of_vectors(
        self, query_E: NDArray[np.float32], most: int, scales_V: NDArray[np.float32] | None, check: Callable[[], None]
    ) -> Best:
        """A dense table is read in pieces; those of its rows that are good enough are sorted."""
        best, vectors_VE = Best.none(), self.table.tensors["vectors"]
        for rows_N in _blocks(vectors_VE.shape):
            check()
            here = slice(rows_N[0], rows_N[-1] + 1)
            with np.errstate(over="ignore", invalid="ignore"):
                scores_N = vectors_VE[here] @ query_E
                if scales_V is not None:
                    scores_N = scores_N * scales_V[here]
            self._check_scores(np.abs(scores_N).max(), "vectors", vectors_VE[here], int(rows_N[0]))
            rows_N, scores_N = np.concatenate([best.rows_T, rows_N]), np.concatenate([best.scores_T, scores_N])
            if len(rows_N) > most:  # all that are as good as the worst of the best, so that lower rows win a tie
                enough_N = scores_N >= np.partition(scores_N, len(scores_N) - most)[len(scores_N) - most]
                rows_N, scores_N = rows_N[enough_N], scores_N[enough_N]
            order_T = np.lexsort((rows_N, -scores_N))[:most]
            best = Best(rows_N[order_T], scores_N[order_T])
        return best

    def _check_scores(self, largest: np.floating[Any], what: str, numbers: NDArray[np.float32], first: int = 0) -> None:
        """Whether fp32 holds the scores.

        Args:
            largest: of them, without its sign.
            what: they are made of, beside the queries.
            numbers: these, or those from `first` on.
            first: see there.

        Raises:
            DamagedArtifactError: it does not, as a number of the table is NaN or infinite.
            ConfigError: it does not, as queries and table are too large together.
        """
        if largest <= np.finfo(np.float32).max:
            return
        at = find_not_finite(numbers)
        if at is not None:
            place = f"{what}{[first + at[0], *at[1:]]}"
            raise DamagedArtifactError(f"table {self.table.name!r}: {place} is {numbers[at]}: it has no scores")
        raise ConfigError("queries: their scores are more than 32 bits hold; want smaller numbers")

    @functools.cached_property
    def _names(self) -> _Names:
        return _Names.of_table(self.table)

    @functools.cached_property
    def _inverse_lengths_of_rows(self) -> NDArray[np.float32]:
        """What makes an inner product with a row's vector one with a vector of length 1."""
        manifest = self.table.manifest
        scales_V = np.empty(manifest.num_embeddings, np.float32)
        for rows_N in _blocks((manifest.num_embeddings, manifest.embedding_dim)):
            scales_V[rows_N[0] : rows_N[-1] + 1] = _inverse_lengths(decode_rows(self.table, rows_N))
        return scales_V


def _go_on() -> None:
    """Nothing ends a search early."""


def _blocks(shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """The rows of a table [V, E], in pieces."""
    width = max(1, _BLOCK_NUMBERS // shape[1])
    return [np.arange(start, min(start + width, shape[0])) for start in range(0, shape[0], width)]


def _inverse_lengths(vectors_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / length of each vector; 0 of one that has none, whose cosine with every other is 0."""
    lengths_N: NDArray[np.float64] = np.sqrt(np.einsum("ne,ne->n", vectors_NE, vectors_NE, dtype=np.float64))
    inverse_N = np.divide(1, lengths_N, out=np.zeros_like(lengths_N), where=lengths_N > _LEAST_LENGTH)
    return inverse_N.astype(np.float32)


def _of_length_one(queries_QE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries cut to length one; one of zeros stays so."""
    queries_QE64 = queries_QE.astype(np.float64)
    lengths_Q1 = np.linalg.norm(queries_QE64, axis=1, keepdims=True)
    return (queries_QE64 / np.where(lengths_Q1 > 0, lengths_Q1, 1)).astype(np.float32)
