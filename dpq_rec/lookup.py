"""Ids to vectors. In: a table's name and ids. Out: Lookup(vectors_NE, missing positions)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import DPQ, DPQ_TIERS, Artifact, Table, open_artifact
from dpq_rec.errors import ConfigError, DamagedArtifactError, IdTypeError, UnknownIdsError, UnknownTableError
from dpq_rec.tiers import by_tier

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
        vectors_NE = decode_rows(found, rows_N)
        return Lookup(vectors_NE if dtype == "float32" else vectors_NE.astype(np.float16), missing_positions)


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


def decode_rows(table: Table, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors [N, E] (float32) of rows; MISSING_ROW gives zeros.

    Raises:
        DamagedArtifactError: a row outside the table, or an impossible code.
    """
    if table.manifest.kind == DPQ:
        return kernels.decode(
            table.tensors["packed_codes"], table.tensors["values_fp32"], rows_N, table.manifest.layout
        )
    present_N = rows_N != kernels.MISSING_ROW
    outside_N = (rows_N < kernels.MISSING_ROW) | (rows_N >= table.manifest.num_embeddings)
    if outside_N.any():
        raise DamagedArtifactError(
            f"row {rows_N[outside_N][0]} is outside the table's {table.manifest.num_embeddings} rows"
        )
    vectors_NE = np.zeros((len(rows_N), table.manifest.embedding_dim), np.float32)
    if table.manifest.kind == DPQ_TIERS:
        _decode_tiers(table, rows_N, vectors_NE)
    else:
        vectors_NE[present_N] = table.tensors["vectors"][rows_N[present_N]]
    return vectors_NE


def _decode_tiers(table: Table, rows_N: NDArray[np.int64], vectors_NE: NDArray[np.float32]) -> None:
    """Put the vectors of rows that are not missing in their places, tier by tier."""
    values_MKS = table.tensors["values_fp32"]
    per_level = len(values_MKS) // table.manifest.num_levels
    for tier, here_P in by_tier(table.tiers, rows_N):
        values_of_tier = values_MKS[: tier.layout.num_levels * per_level]
        try:
            vectors_NE[here_P] = kernels.decode(
                tier.packed_VW, values_of_tier, rows_N[here_P] - tier.first_row, tier.layout
            )
        except DamagedArtifactError as error:
            raise DamagedArtifactError(f"of the rows from {tier.first_row} on, {error}") from error
