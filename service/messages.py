"""Requests to an engine, and what the library has no name for in its replies: SearchReply, TableInfo."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.search import Similarity
from dpq_rec.table import MissingPolicy, Table, VectorType

Pooling = Literal["none", "sum", "mean"]


class TableRequest(NamedTuple):
    """A lookup in one table.

    Attributes:
        table: its name.
        ids: int64 [N], or N strings.
        dtype: of the vectors.
        missing: "zeros" reports unknown ids, "error" refuses them.
        pooling: "none" gives a vector for each id, "sum" and "mean" one for each bag.
        bag_lengths_B: ids in each bag, in order (int64); None without pooling.
    """

    table: str
    ids: NDArray[np.int64] | list[str]
    dtype: VectorType = "float32"
    missing: MissingPolicy = "zeros"
    pooling: Pooling = "none"
    bag_lengths_B: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A search in one table.

    Attributes:
        table: its name.
        queries: vectors, [Q, E], or as lists.
        ids: of the table itself, whose vectors are the queries: int64 [Q], or Q strings. Either they or queries.
        k: answers to each.
        similarity: "dot" or "cosine".
        missing: "zeros" gives no answers for an unknown id, and reports it; "error" refuses it.
    """

    table: str
    queries: Any = None
    ids: NDArray[np.int64] | list[str] | None = None
    k: int = 10
    similarity: Similarity = "dot"
    missing: MissingPolicy = "zeros"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableInfo:
    """One table of the artifact.

    Attributes:
        name: the table's name.
        dim: width of its vectors.
        num_embeddings: rows.
        kind: "dpq" (compressed), "dpq-tiers" (likewise, rare rows to fewer bytes) or "dense".
        vocabulary: the kind of ids: "int64", "identity", "modulo" or "string".
        features: the names under which a model looks the table up.
        artifact_bytes: packed codes and values, or vectors, as they lie on disk.
        vocabulary_bytes: the list of ids, likewise.
        full_bytes: the fp32 table that this one replaces.
        compression_ratio: full_bytes / artifact_bytes.
    """

    name: str
    dim: int
    num_embeddings: int
    kind: str
    vocabulary: str
    features: list[str]
    artifact_bytes: int
    vocabulary_bytes: int
    full_bytes: int
    compression_ratio: float

    @classmethod
    def of(cls, table: Table) -> TableInfo:
        """Of a table."""
        return cls(
            name=table.name,
            dim=table.manifest.embedding_dim,
            num_embeddings=table.manifest.num_embeddings,
            kind=table.manifest.kind,
            vocabulary=table.vocabulary.kind,
            features=list(table.manifest.features),
            artifact_bytes=table.artifact_bytes,
            vocabulary_bytes=table.vocabulary_bytes,
            full_bytes=table.full_bytes,
            compression_ratio=table.compression_ratio,
        )


class SearchReply(NamedTuple):
    """What a search found.

    Attributes:
        answers: ids and scores of each query, in order, the best first; none where its id is unknown.
        missing: positions of the unknown ids among the queries, ascending (uint32).
    """

    answers: list[tuple[list[int] | list[str], list[float]]]
    missing: NDArray[np.uint32]
