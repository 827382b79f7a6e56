"""`EmbeddingStore`: lookups in the tables of an artifact. In: a table's name, ids, queries. Out: Lookup, Neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from dpq_rec.artifact import Artifact, open_artifact
from dpq_rec.errors import UnknownTableError
from dpq_rec.search import Neighbours, Similarity
from dpq_rec.table import Lookup, MissingPolicy, Pooling, Rows, Table, VectorType
from dpq_rec.wire import Form, LookupBytes, PackedRows


class EmbeddingStore:
    """The tables of an artifact, ready for lookups. Safe to share between threads; the files are mapped, not read.

    It may be sent to other processes, by fork, by pickle and as part of a DataLoader's dataset: it is pickled as the
    artifact's path and version, and there mapped again.

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
        self,
        table: str,
        ids: Any,
        *,
        dtype: VectorType = "float32",
        missing: MissingPolicy = "zeros",
        num_threads: int = 1,
    ) -> Lookup:
        """Vectors of ids.

        Args:
            table: the table's name.
            ids: [N], of the vocabulary's type, integers or strings: a list, or an array of numpy, torch, pandas, polars
                or pyarrow.
            dtype: of the vectors.
            missing: "zeros" gives zero vectors to unknown ids and reports their positions; "error" raises.
            num_threads: that a lookup of thousands of ids is shared among, this one included.

        Raises:
            UnknownTableError: no such table.
            IdTypeError: ids of another type than the vocabulary's.
            UnknownIdsError: an id is not in the vocabulary and `missing` is "error".
            DamagedArtifactError: a row's codes are not what was published.
            ConfigError: another dtype or policy than those named, or no thread.
        """
        return self.table(table).lookup(ids, dtype=dtype, missing=missing, num_threads=num_threads)

    def lookup_bags(
        self,
        table: str,
        ids: Any,
        bag_lengths: Any,
        *,
        pooling: Pooling = "sum",
        weights: Any = None,
        dtype: VectorType = "float32",
        missing: MissingPolicy = "zeros",
        num_threads: int = 1,
    ) -> Lookup:
        """Pooled vectors of bags of ids: each vector is added to its bag's, in fp32 and in order, as it is decoded.

        >>> pooled, missing = store.lookup_bags("item_id", [42, 7, 9], [2, 0, 1], pooling="mean")  # three bags

        Args:
            table: the table's name.
            ids: [N], as in `lookup`, bag after bag.
            bag_lengths: [B], ids of each bag; they sum to N. An empty bag is zeros.
            pooling: "sum", or "mean", which divides by the number of a bag's ids that are not missing.
            weights: [N], a factor of each id's vector in a sum (float32); none for ones.
            dtype: of the result: sums are rounded once.
            missing: as in `lookup`; an unknown id adds nothing, and its position among the ids is reported.
            num_threads: that thousands of ids are shared among, this one included.

        Raises:
            ConfigError: bag lengths or weights that do not fit the ids, weights in a mean, another option than those
                named, or no thread.
            UnknownTableError, IdTypeError, UnknownIdsError, DamagedArtifactError: as in `lookup`.
        """
        return self.table(table).lookup_bags(
            ids, bag_lengths, pooling=pooling, weights=weights, dtype=dtype, missing=missing, num_threads=num_threads
        )

    def rows(self, table: str, ids: Any, *, missing: MissingPolicy = "zeros") -> Rows:
        """Rows of ids, for callers that read the table themselves (`Table.decode`, `dpq_rec.kernels`).

        Args:
            table: the table's name.
            ids: [N], as for `lookup`.
            missing: as for `lookup`.

        Raises:
            UnknownTableError, IdTypeError, UnknownIdsError, ConfigError: as `lookup`.
        """
        return self.table(table).rows(ids, missing=missing)

    def codes(self, table: str, ids: Any, *, missing: MissingPolicy = "zeros") -> PackedRows:
        """Packed codes of ids, for callers that hold the table's values (`Table.values`, `dpq_rec.wire`).

        Args:
            table: the table's name.
            ids: [N], as for `lookup`.
            missing: as for `lookup`.

        Raises:
            UnknownTableError, IdTypeError, UnknownIdsError, ConfigError: as `lookup`.
            ConfigError: a dense table, too: it has no codes.
            DamagedArtifactError: the vocabulary names a row outside the table.
        """
        return self.table(table).codes(ids, missing=missing)

    def lookup_bytes(
        self, table: str, ids: bytes, *, form: Form = "float32", missing: MissingPolicy = "zeros"
    ) -> LookupBytes:
        """`lookup` or `codes` from the bytes of a request to those of the reply (`dpq_rec.wire`), in one go.

        Args:
            table: the table's name.
            ids: little-endian int64.
            form: "float32" or "float16" vectors, or packed "codes".
            missing: as for `lookup`.

        Raises:
            UnknownTableError, UnknownIdsError, DamagedArtifactError, ConfigError: as `lookup` and `codes`.
            IdTypeError: no multiple of 8 bytes, or a table whose ids are strings.
        """
        return self.table(table).lookup_bytes(ids, form=form, missing=missing)

    def search(
        self,
        table: str,
        queries: Any,
        k: int,
        *,
        similarity: Similarity = "dot",
        check: Callable[[], None] | None = None,
    ) -> Neighbours:
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
            check: called before each block of rows; what it raises ends the search.

        Raises:
            UnknownTableError: no such table.
            ConfigError: queries that do not fit the table, no k, or another similarity.
            DamagedArtifactError: a row's codes are not what was published.
        """
        return self.table(table).search(queries, k, similarity=similarity, check=check)
