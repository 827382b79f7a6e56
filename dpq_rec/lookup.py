"""Ids to vectors, vectors to ids. In: a table's name, and ids or queries. Out: Lookup, or Neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Artifact, Table, open_artifact
from dpq_rec.decode import decode_rows
from dpq_rec.errors import ConfigError, IdTypeError, UnknownIdsError, UnknownTableError
from dpq_rec.ids import ids_of_kind, int64_ids, plain_array
from dpq_rec.kernels.ids import lookup_integers
from dpq_rec.octets import Form, FoundOctets, find_octets, ids_of_octets
from dpq_rec.packed import PackedRows, packed_rows
from dpq_rec.search import Check, Neighbours, Similarity, TableSearch
from dpq_rec.vocabulary import Int64Vocabulary

MissingPolicy = Literal["zeros", "error"]
VectorType = Literal["float32", "float16"]
Pooling = Literal["sum", "mean"]
_FORMS = get_args(Form)
_NO_POSITIONS = np.empty(0, np.uint32)
_MISSING_POLICIES, _VECTOR_TYPES, _POOLINGS = get_args(MissingPolicy), get_args(VectorType), get_args(Pooling)


class Lookup(NamedTuple):
    """What a lookup found.

    Attributes:
        vectors: [N, E], float32 or float16 as asked; zeros where an id is missing. Of bags: [B, E].
        missing: positions of unknown ids in the request, ascending (uint32).
    """

    vectors: NDArray[Any]
    missing: NDArray[np.uint32]


class Rows(NamedTuple):
    """Where ids are in a table.

    Attributes:
        rows_N: rows (int64), MISSING_ROW where an id is missing.
        missing: as in `Lookup`.
    """

    rows_N: NDArray[np.int64]
    missing: NDArray[np.uint32]


class EmbeddingStore:
    """The tables of an artifact, ready for lookups. Safe to share between threads; the files are mapped, not read.

    It may be sent to other processes, by fork, by pickle and as part of a DataLoader's dataset: it is pickled as the
    artifact's path and version, and there mapped again.

    >>> store = EmbeddingStore.open("run/artifact")
    >>> vectors, missing = store.lookup("item_id", [42, 7])
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._searches = _searches_of(artifact)

    def __getstate__(self) -> dict[str, Any]:
        """As the artifact is pickled, by path and version; whatever a subclass has comes with it."""
        return {name: value for name, value in vars(self).items() if name != "_searches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._searches = _searches_of(self.artifact)

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
        _check_options(missing, dtype=dtype, num_threads=num_threads)
        found = self.table(table)
        if missing == "zeros" and isinstance(found.vocabulary, Int64Vocabulary):  # an error is for before the decoding
            known, ids_N = found.vocabulary.sorted, int64_ids(ids)
            rows_N, vectors_NE, num_missing = lookup_integers(
                ids_N, known, found.stored, dtype=dtype, num_threads=num_threads
            )
            positions = _missing_positions(found, ids_N, rows_N, missing) if num_missing else _NO_POSITIONS
            return Lookup(vectors_NE, positions)
        rows_N, positions = _find_rows(found, ids, missing)
        return Lookup(decode_rows(found, rows_N, dtype=dtype, num_threads=num_threads), positions)

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
        _check_options(missing, dtype=dtype, num_threads=num_threads, pooling=pooling)
        if pooling == "mean" and weights is not None:
            raise ConfigError("weights: got some with pooling mean, want sum; a weighted mean is not defined")
        found = self.table(table)
        rows_N, missing_positions = _find_rows(found, ids, missing)
        pooled_BE = kernels.decode_bags(
            found.stored,
            rows_N,
            _bag_lengths(bag_lengths, len(rows_N)),
            mean=pooling == "mean",
            weights_N=None if weights is None else _weights(weights, len(rows_N)),
            dtype=dtype,
            num_threads=num_threads,
        )
        return Lookup(pooled_BE, missing_positions)

    def rows(self, table: str, ids: Any, *, missing: MissingPolicy = "zeros") -> Rows:
        """Rows of ids, for whoever reads the table himself (`dpq_rec.kernels`).

        Args:
            table: the table's name.
            ids: [N], as for `lookup`.
            missing: likewise.

        Raises:
            UnknownTableError, IdTypeError, UnknownIdsError, ConfigError: as `lookup`.
        """
        _check_options(missing)
        return _find_rows(self.table(table), ids, missing)

    def codes(self, table: str, ids: Any, *, missing: MissingPolicy = "zeros") -> PackedRows:
        """Packed codes of ids, for whoever holds the table's values (`dpq_rec.packed`).

        Args:
            table: the table's name.
            ids: [N], as for `lookup`.
            missing: likewise.

        Raises:
            UnknownTableError, IdTypeError, UnknownIdsError, ConfigError: as `lookup`.
            ConfigError: a dense table, too: it has no codes.
            DamagedArtifactError: the vocabulary names a row outside the table.
        """
        _check_options(missing)
        found = self.table(table)
        return packed_rows(found, *_find_rows(found, ids, missing))

    def lookup_octets(
        self, table: str, asked: bytes, *, form: Form = "float32", missing: MissingPolicy = "zeros"
    ) -> FoundOctets:
        """What `lookup` or `codes` finds, from bytes to bytes as they travel (`dpq_rec.octets`), in one go.

        Args:
            table: the table's name.
            asked: ids, little-endian int64.
            form: "float32" or "float16" vectors, or packed "codes".
            missing: as for `lookup`.

        Raises:
            UnknownTableError, UnknownIdsError, DamagedArtifactError, ConfigError: as `lookup` and `codes`.
            IdTypeError: no multiple of 8 bytes, or a table whose ids are strings.
        """
        _check_options(missing)
        if form not in _FORMS:
            raise ConfigError(f"form: got {form!r}, want float32, float16 or codes")
        found = self.table(table)
        if missing == "error":
            _find_rows(found, ids_of_octets(asked), missing)  # which raises before anything is decoded
        return find_octets(found, asked, form)

    def search(
        self, table: str, queries: Any, k: int, *, similarity: Similarity = "dot", check: Check = None
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
        return self._searches[self.table(table).name](queries, k, similarity, check)


def _searches_of(artifact: Artifact) -> dict[str, TableSearch]:
    return {name: TableSearch(table) for name, table in artifact.tables.items()}


def _find_rows(table: Table, ids: Any, missing: MissingPolicy) -> Rows:
    held = ids_of_kind(table.vocabulary.kind, ids)
    rows_N = table.vocabulary.rows(held)
    return Rows(rows_N, _missing_positions(table, held, rows_N, missing))


def _missing_positions(
    table: Table, ids: NDArray[np.int64] | Sequence[Any], rows_N: NDArray[np.int64], missing: MissingPolicy
) -> NDArray[np.uint32]:
    """Positions of ids that have no row; the ids are those that were looked up, and not as the caller holds them.

    Raises:
        UnknownIdsError: there are some, and `missing` is "error".
    """
    positions: NDArray[np.uint32] = (rows_N == kernels.MISSING_ROW).nonzero()[0].astype(np.uint32)
    if missing == "error" and len(positions):
        raise UnknownIdsError(table.name, [ids[i] for i in positions.tolist()], positions.tolist())
    return positions


def _check_options(
    missing: MissingPolicy, *, dtype: VectorType = "float32", num_threads: int = 1, pooling: Pooling = "sum"
) -> None:
    if missing not in _MISSING_POLICIES:
        raise ConfigError(f"missing: got {missing!r}, want zeros or error")
    if dtype not in _VECTOR_TYPES:
        raise ConfigError(f"dtype: got {dtype!r}, want float32 or float16")
    if pooling not in _POOLINGS:
        raise ConfigError(f"pooling: got {pooling!r}, want sum or mean")
    if not isinstance(num_threads, int | np.integer) or num_threads < 1:
        raise ConfigError(f"num_threads: got {num_threads!r}, want 1 or more")


def _bag_lengths(bag_lengths: Any, num_ids: int) -> NDArray[np.int64]:
    lengths_B = _array("bag_lengths", bag_lengths)
    if lengths_B.ndim != 1 or (lengths_B.size and not np.issubdtype(lengths_B.dtype, np.integer)):
        raise ConfigError(f"bag_lengths: got {lengths_B.dtype} {lengths_B.shape}, want integers [B]")
    if lengths_B.size and not (lengths_B.min() >= 0 and lengths_B.max() <= num_ids):  # so that the sum is no other's
        raise ConfigError(f"bag_lengths: got {lengths_B.min()} to {lengths_B.max()}, want 0 to the {num_ids} ids")
    if lengths_B.sum() != num_ids:
        raise ConfigError(f"bag_lengths: got a sum of {lengths_B.sum()}, want the {num_ids} ids")
    return lengths_B.astype(np.int64)


def _weights(weights: Any, num_ids: int) -> NDArray[np.float32]:
    weights_N = _array("weights", weights)
    if weights_N.shape != (num_ids,):
        raise ConfigError(f"weights: got shape {weights_N.shape}, want one for each of the {num_ids} ids")
    if weights_N.dtype.kind not in "biuf":
        raise ConfigError(f"weights: got values of type {weights_N.dtype}, want numbers")
    return np.ascontiguousarray(weights_N, np.float32)


def _array(what: str, held: Any) -> NDArray[Any]:
    try:
        return plain_array(held)
    except ValueError as error:
        raise ConfigError(f"{what}: got {error}, want numbers") from error


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
