"""Ids to vectors, vectors to ids. In: a table's name, and ids or queries. Out: Lookup, or Neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Artifact, Table, open_artifact
from dpq_rec.decode import decode_rows
from dpq_rec.errors import ConfigError, IdTypeError, UnknownIdsError, UnknownTableError
from dpq_rec.search import Neighbours, Similarity, TableSearch

MissingPolicy = Literal["zeros", "error"]
VectorType = Literal["float32", "float16"]


class Lookup(NamedTuple):
    """What a lookup found.

    Attributes:
        vectors: [N, E], float32 or float16 as asked; zeros where an id is missing.
        missing: positions of unknown ids in the request, ascending (uint32).
    """

    vectors: NDArray[Any]
    missing: NDArray[np.uint32]


class EmbeddingStore:
    """The tables of an artifact, ready for lookups. Safe to share between threads; the files are mapped, not read.

    >>> store = EmbeddingStore.open("run/artifact")
    >>> vectors, missing = store.lookup("item_id", [42, 7])
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._searches = {name: TableSearch(table) for name, table in artifact.tables.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """Open an artifact, or the current one of a store.

        Raises:
            ArtifactError: see `dpq_rec.artifact.open_artifact`.
        """
        return cls(open_artifact(path))

    @property
    def version(self) -> str:
        """The artifact's version."""
        return self.artifact.version

    @property
    def tables(self) -> Mapping[str, Table]:
        """Name -> table."""
        return self.artifact.tables

    def table(self, name: str) -> Table:
        """One table.

        Raises:
            UnknownTableError: there is none of that name.
        """
        try:
            return self.artifact.tables[name]
        except KeyError:
            raise UnknownTableError(name, self.artifact.tables) from None

    def lookup(
        self, table: str, ids: Any, *, dtype: VectorType = "float32", missing: MissingPolicy = "zeros"
    ) -> Lookup:
        """Vectors of ids.

        Args:
            table: the table's name.
            ids: [N], a list or an array of the vocabulary's type: integers, or strings.
            dtype: of the vectors.
            missing: "zeros" gives zero vectors to unknown ids and reports their positions; "error" raises.

        Raises:
            UnknownTableError: no such table.
            IdTypeError: ids of another type than the vocabulary's.
            UnknownIdsError: an id is not in the vocabulary and `missing` is "error".
            DamagedArtifactError: a row's codes are not what was published.
            ConfigError: another dtype or policy than those named.
        """
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype: got {dtype!r}, want float32 or float16")
        if missing not in ("zeros", "error"):
            raise ConfigError(f"missing: got {missing!r}, want zeros or error")
        found = self.table(table)
        rows_N = found.vocabulary.rows(ids)
        missing_positions = np.flatnonzero(rows_N == kernels.MISSING_ROW).astype(np.uint32)
        if missing == "error" and len(missing_positions):
            raise UnknownIdsError(table, [ids[i] for i in missing_positions], missing_positions.tolist())
        return Lookup(decode_rows(found, rows_N, dtype=dtype), missing_positions)

    def search(self, table: str, queries: Any, k: int, *, similarity: Similarity = "dot") -> Neighbours:
        """The k ids of a table whose vectors are most similar to each query, exactly: every row is looked at.

        Compressed rows are scored from their codes, in fp32, without decoding a vector. Where scores tie, the lower
        row comes first, which is the more frequent id where rows are sorted by frequency. Nothing is left out: an id
        may be among the answers to its own vector.

        >>> user, _ = store.lookup("user_id", [7])
        >>> ids, scores = store.search("item_id", user, 10, similarity="cosine")

        Args:
            table: the table's name.
            queries: [Q, E], finite numbers.
            k: answers to each query; fewer where the table has fewer ids.
            similarity: "dot", the inner product, or "cosine", which is 0 with a vector of zeros.

        Raises:
            UnknownTableError: no such table.
            ConfigError: queries that do not fit the table, no k, or another similarity.
            DamagedArtifactError: a row's codes are not what was published.
        """
        return self._searches[self.table(table).name](queries, k, similarity)


def ids_of_texts(table: Table, texts: Sequence[str]) -> list[int] | list[str]:
    """Ids as the table's vocabulary has them: what stands on a command line is text.

    Raises:
        IdTypeError: no integer, where the table has integers.
    """
    if table.vocabulary.kind == "string":
        return list(texts)
    return [_integer(text, table.name) for text in texts]


def _integer(text: str, table: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise IdTypeError(f"ID: got {text!r}, want an integer: table {table!r} has integer ids") from None
