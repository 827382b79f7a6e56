"""Ids to rows. In: the ids of a request. Out: rows_N (int64), MISSING_ROW where an id is not in the vocabulary.

Three kinds (contract 3): `identity` (ids are rows), `modulo` (row = id mod V) and `int64` (a sorted list of ids and the
row of each). `ids_of_rows` is the way back, for export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError, IdTypeError
from dpq_rec.kernels import MISSING_ROW

_SCAN_ROWS = 1 << 22  # ids looked through at a time by Int64Vocabulary.ids_of_rows


class RowIds(NamedTuple):
    """Ids [N] and the row of each [N] (int64), rows ascending."""

    ids_N: NDArray[Any]
    rows_N: NDArray[np.int64]


class Vocabulary(Protocol):
    """The map from ids to rows of one table."""

    kind: str

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """Rows [N] of ids [N]; MISSING_ROW for an id that is not in the vocabulary.

        Raises:
            IdTypeError: ids of another type than the vocabulary's.
        """

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """The ids that live in rows start to stop-1."""

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """What stands in the artifact beside the codes."""

    def check(self, num_embeddings: int) -> None:
        """Look at every entry.

        Raises:
            DamagedArtifactError: ids out of order, a row outside the table, or another number of rows.
        """


def int64_ids(ids: Any) -> NDArray[np.int64]:
    """Ids as int64 [N], without a copy where they are int64 already.

    Raises:
        IdTypeError: not a flat list of integers that fit 64 bits.
    """
    if isinstance(ids, (list, tuple)) and bool in set(map(type, ids)):  # numpy takes [True, 2] for integers
        raise IdTypeError("ids: got booleans, want a flat list of 64-bit integers")
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise IdTypeError(f"ids: got no flat list of 64-bit integers: {error}") from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise IdTypeError(f"ids: got {_describe(array)}, want a flat list of 64-bit integers")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise IdTypeError(f"ids: got {array.max()}, want at most {np.iinfo(np.int64).max}")
    return np.ascontiguousarray(array, np.int64)


def _describe(array: NDArray[Any]) -> str:
    if array.ndim != 1:
        return f"an array of shape {array.shape}"
    return "strings" if array.dtype.kind in "US" else f"values of type {array.dtype}"


class IdentityVocabulary:
    """Ids are rows."""

    kind = "identity"

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        ids_N = int64_ids(ids)
        return np.where((ids_N >= 0) & (ids_N < self.num_embeddings), ids_N, MISSING_ROW)

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """See `Vocabulary.ids_of_rows`."""
        rows_N = np.arange(start, stop)
        return RowIds(rows_N, rows_N)

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Nothing: the ids are the rows."""
        return {}

    def check(self, num_embeddings: int) -> None:
        """See `Vocabulary.check`."""
        if self.num_embeddings != num_embeddings:
            raise DamagedArtifactError(
                f"the {self.kind} vocabulary is one of {self.num_embeddings} rows, the table has {num_embeddings}"
            )


class ModuloVocabulary(IdentityVocabulary):
    """The hashing trick: row = id mod V. No id is missing; an export names a row by its lowest id, the row."""

    kind = "modulo"

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        return int64_ids(ids) % self.num_embeddings


class Int64Vocabulary:
    """A sorted list of ids, and the row of each.

    Args:
        ids_U: ids, strictly ascending (int64).
        rows_U: ids_U[i] lives in row rows_U[i] (uint32). Several ids may share a row.
    """

    kind = "int64"

    def __init__(self, ids_U: NDArray[np.int64], rows_U: NDArray[np.uint32]) -> None:
        if ids_U.ndim != 1 or ids_U.shape != rows_U.shape:
            raise ConfigError(f"vocabulary: got ids {ids_U.shape} and rows {rows_U.shape}, want two equal lengths")
        self.ids_U, self.rows_U = ids_U, rows_U

    @classmethod
    def from_ids(cls, ids_V: Sequence[int] | NDArray[np.int64]) -> Int64Vocabulary:
        """The vocabulary of a table whose row v holds ids_V[v].

        Raises:
            ConfigError: an id stands in two rows.
        """
        ids = int64_ids(ids_V)
        order_V = np.argsort(ids)
        sorted_V = ids[order_V]
        if (sorted_V[1:] == sorted_V[:-1]).any():
            raise ConfigError(f"vocabulary: id {sorted_V[:-1][sorted_V[1:] == sorted_V[:-1]][0]} stands in two rows")
        return cls(sorted_V, order_V.astype(np.uint32))

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        ids_N = int64_ids(ids)
        if not len(self.ids_U):
            return np.full(len(ids_N), MISSING_ROW, np.int64)
        at_N = np.minimum(np.searchsorted(self.ids_U, ids_N), len(self.ids_U) - 1)
        return np.where(self.ids_U[at_N] == ids_N, self.rows_U[at_N].astype(np.int64), MISSING_ROW)

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """See `Vocabulary.ids_of_rows`. Reads the whole list once, in pieces: the memory it takes does not grow."""
        ids, rows = [], []
        for begin in range(0, len(self.rows_U), _SCAN_ROWS):
            piece_N = self.rows_U[begin : begin + _SCAN_ROWS]
            inside_N = np.flatnonzero((piece_N >= start) & (piece_N < stop))
            ids.append(self.ids_U[begin + inside_N])
            rows.append(piece_N[inside_N].astype(np.int64))
        ids_N, rows_N = np.concatenate([*ids, self.ids_U[:0]]), np.concatenate([*rows, np.empty(0, np.int64)])
        order_N = np.argsort(rows_N, kind="stable")
        return RowIds(ids_N[order_N], rows_N[order_N])

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """The two lists."""
        return {"ids": self.ids_U, "rows": self.rows_U}

    def check(self, num_embeddings: int) -> None:
        """See `Vocabulary.check`."""
        for begin in range(0, len(self.ids_U), _SCAN_ROWS):
            ids_N = self.ids_U[begin : begin + _SCAN_ROWS + 1]
            if (ids_N[1:] <= ids_N[:-1]).any():
                raise DamagedArtifactError("the vocabulary's ids are not strictly ascending")
            if (self.rows_U[begin : begin + _SCAN_ROWS] >= num_embeddings).any():
                raise DamagedArtifactError(f"the vocabulary names a row outside the table's {num_embeddings}")


def load_vocabulary(kind: str, num_embeddings: int, tensors: Mapping[str, NDArray[Any]]) -> Vocabulary:
    """The vocabulary that a table's manifest entry and tensors describe.

    Raises:
        ArtifactError: a kind that this version does not know.
        DamagedArtifactError: its tensors are missing or of the wrong type.
    """
    if kind == "identity":
        return IdentityVocabulary(num_embeddings)
    if kind == "modulo":
        return ModuloVocabulary(num_embeddings)
    if kind != "int64":
        raise ArtifactError(f"vocabulary kind: got {kind!r}, this version reads identity, modulo and int64")
    ids_U, rows_U = tensors.get("ids"), tensors.get("rows")
    if ids_U is None or rows_U is None or ids_U.dtype != np.int64 or rows_U.dtype != np.uint32:
        raise DamagedArtifactError("an int64 vocabulary needs the tensors ids (int64) and rows (uint32)")
    if ids_U.ndim != 1 or ids_U.shape != rows_U.shape:
        raise DamagedArtifactError(f"vocabulary: ids {ids_U.shape} and rows {rows_U.shape} do not match")
    return Int64Vocabulary(ids_U, rows_U)
