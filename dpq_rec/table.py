"""One table of an opened artifact. In: ids, rows, queries. Out: rows, vectors, codes, values, neighbours.

    ids -> rows -> codes -> vectors

`lookup` and `lookup_bags` go all the way; `rows` and `decode` go a part of it. Names, dtypes and errors are those of
`dpq_rec.EmbeddingStore`, which finds a table by its name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec import kernels
from dpq_rec.codes import Tier
from dpq_rec.errors import ConfigError, IdTypeError, UnknownIdsError
from dpq_rec.files import PickledByPath
from dpq_rec.ids import ids_of_kind, int64_ids, plain_array
from dpq_rec.kernels import MISSING_ROW, Coded, Vectors
from dpq_rec.kernels.lookup import find_integer_rows, lookup_bytes, lookup_integers
from dpq_rec.manifest import TableManifest
from dpq_rec.search import IdsByRow, Neighbours, Similarity, inverse_lengths_of_rows, search_table
from dpq_rec.vocabulary import Int64Vocabulary, Vocabulary
from dpq_rec.wire import ID_BYTES, Form, LookupBytes, PackedRows, Values, check_ids, ids_from_bytes, to_bytes

MissingPolicy = Literal["zeros", "error"]
VectorType = Literal["float32", "float16"]
Pooling = Literal["sum", "mean"]
_CHOICES = {
    "missing": get_args(MissingPolicy),
    "dtype": get_args(VectorType),
    "pooling": get_args(Pooling),
    "form": get_args(Form),
}
VALUES_FP32 = "values_fp32"  # a tensor that is made when a table is opened, and is in no file


class Lookup(NamedTuple):
    """Vectors of ids, and which ids are missing.

    Attributes:
        vectors: [N, E], float32 or float16; zeros where an id is missing. Of bags: [B, E].
        missing: positions of unknown ids in the request, ascending (uint32).
    """

    vectors: NDArray[Any]
    missing: NDArray[np.uint32]


class Rows(NamedTuple):
    """Rows of ids, and which ids are missing.

    Attributes:
        rows_N: rows (int64), MISSING_ROW where an id is missing.
        missing: as in `Lookup`.
    """

    rows_N: NDArray[np.int64]
    missing: NDArray[np.uint32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(PickledByPath):
    """One table of an opened artifact; the tensors are mapped from the file, values are in memory as float32."""

    name: str
    manifest: TableManifest
    tensors: Mapping[str, NDArray[Any]]
    vocabulary: Vocabulary

    # Ids to rows to vectors

    def lookup(
        self, ids: Any, *, dtype: VectorType = "float32", missing: MissingPolicy = "zeros", num_threads: int = 1
    ) -> Lookup:
        """See `EmbeddingStore.lookup`."""
        _check_options(missing, dtype, num_threads)
        if missing == "zeros" and isinstance(self.vocabulary, Int64Vocabulary):  # an error is for before the decoding
            known = self.vocabulary.native
            return Lookup(*lookup_integers(int64_ids(ids), known, self.vectors, dtype=dtype, num_threads=num_threads))
        rows_N, positions = self.rows(ids, missing=missing)
        return Lookup(self.decode(rows_N, dtype=dtype, num_threads=num_threads), positions)

    def lookup_bags(
        self,
        ids: Any,
        bag_lengths: Any,
        *,
        pooling: Pooling = "sum",
        weights: Any = None,
        dtype: VectorType = "float32",
        missing: MissingPolicy = "zeros",
        num_threads: int = 1,
    ) -> Lookup:
        """See `EmbeddingStore.lookup_bags`."""
        _check_options(missing, dtype, num_threads)
        _check_choice("pooling", pooling)
        if pooling == "mean" and weights is not None:
            raise ConfigError("weights: got some with pooling mean, want sum; a weighted mean is not defined")
        rows_N, positions = self.rows(ids, missing=missing)
        pooled_BE = kernels.decode_bags(
            self.vectors,
            rows_N,
            _bag_lengths(bag_lengths, len(rows_N)),
            mean=pooling == "mean",
            weights_N=None if weights is None else _weights(weights, len(rows_N)),
            dtype=dtype,
            num_threads=num_threads,
        )
        return Lookup(pooled_BE, positions)

    def lookup_bytes(self, ids: bytes, *, form: Form = "float32", missing: MissingPolicy = "zeros") -> LookupBytes:
        """See `EmbeddingStore.lookup_bytes`."""
        _check_choice("missing", missing)
        _check_choice("form", form)
        content, vocabulary = ids, self.vocabulary
        if type(ids) is not bytes or len(ids) % ID_BYTES:
            content = check_ids(ids)
        if vocabulary.kind == "string":
            raise IdTypeError(f"ids: got bytes, want strings: those are the ids of table {self.name!r}")
        # `codes` says what is wrong with a dense table.
        has_form = form != "codes" or isinstance(self.vectors, Coded)
        if missing == "zeros" and has_form and isinstance(vocabulary, Int64Vocabulary):
            return LookupBytes(*lookup_bytes(content, vocabulary.native, self.vectors, form=form))
        ids_N = ids_from_bytes(content)
        found: Lookup | PackedRows
        if form == "codes":
            found = self.codes(ids_N, missing=missing)
        else:
            found = self.lookup(ids_N, dtype=form, missing=missing)
        return LookupBytes(to_bytes(*found), len(found.missing))

    def rows(self, ids: Any, *, missing: MissingPolicy = "zeros") -> Rows:
        """See `EmbeddingStore.rows`."""
        _check_choice("missing", missing)
        return self.find(ids_of_kind(self.vocabulary.kind, ids), missing)

    def find(self, ids: NDArray[np.int64] | Sequence[Any], missing: MissingPolicy) -> Rows:
        """As `rows`, of ids that are as the vocabulary has them: int64 [N], contiguous, or a list of strings."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, Int64Vocabulary) and isinstance(ids, np.ndarray):
            rows_N = find_integer_rows(ids, vocabulary.native)
        else:
            rows_N = vocabulary.rows(ids)
        positions = (rows_N == MISSING_ROW).nonzero()[0].astype(np.uint32)
        if missing == "error" and len(positions):
            raise UnknownIdsError(self.name, [ids[i] for i in positions.tolist()], positions.tolist())
        return Rows(rows_N, positions)

    def decode(self, rows_N: NDArray[np.int64], *, dtype: DTypeLike = np.float32, num_threads: int = 1) -> NDArray[Any]:
        """Vectors [N, E] of rows; MISSING_ROW gives zeros.

        Args:
            rows_N: rows (int64).
            dtype: float32 or float16.
            num_threads: that the work is shared among.

        Raises:
            DamagedArtifactError: a row outside the table, or an impossible code.
        """
        return kernels.decode(self.vectors, rows_N, dtype=dtype, num_threads=num_threads)

    # Vectors to ids

    def search(
        self, queries: Any, k: int, *, similarity: Similarity = "dot", check: Callable[[], None] | None = None
    ) -> Neighbours:
        """See `EmbeddingStore.search`."""
        return search_table(self, queries, k, similarity, check or (lambda: None))

    @functools.cached_property
    def row_ids(self) -> IdsByRow:
        """Where the ids of rows are: 16 bytes a row."""
        return IdsByRow(*self.vocabulary.ids_of_rows(0, self.manifest.num_embeddings), self.manifest.num_embeddings)

    @functools.cached_property
    def inverse_lengths(self) -> NDArray[np.float32]:
        """1 / length of each row's vector, for cosines: 4 bytes a row."""
        return inverse_lengths_of_rows(self)

    # Codes

    def codes(self, ids: Any, *, missing: MissingPolicy = "zeros") -> PackedRows:
        """See `EmbeddingStore.codes`."""
        rows_N, positions = self.rows(ids, missing=missing)
        if not isinstance(self.vectors, Coded):
            raise self._dense("codes")
        packed_NW, tiers_N = kernels.copy_codes(self.vectors, rows_N)
        return PackedRows(packed_NW, positions, tiers_N)

    def values(self, version: str) -> Values:
        """The values, with which a client decodes the table's codes.

        Args:
            version: of the artifact.

        Raises:
            ConfigError: the table is dense, and has no values.
        """
        if not self.manifest.has_codes:
            raise self._dense("values")
        layouts = tuple(tier.layout for tier in self.tiers)
        return Values(version=version, layouts=layouts, values_MKS=self.tensors["values"])

    def _dense(self, wanted: str) -> ConfigError:
        return ConfigError(f"table {self.name!r} is of kind {self.manifest.kind!r}: it has vectors, and no {wanted}")

    @functools.cached_property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers in the order of rows: one of all rows in a table of kind "dpq"; none where dense."""
        return self.manifest.cut() if self.manifest.has_codes else ()

    @functools.cached_property
    def packed(self) -> tuple[NDArray[np.uint8], ...]:
        """Packed codes [V, W] of each tier (uint8, mapped)."""
        return tuple(self.tensors[codes_name(at)] for at in range(len(self.tiers)))

    def by_tier(self, rows_N: NDArray[np.int64]) -> Iterator[tuple[Tier, NDArray[np.uint8], NDArray[np.intp]]]:
        """Each tier that has some of the rows, its packed codes, and the positions [P] of these rows."""
        tier_N = np.searchsorted([tier.first_row for tier in self.tiers], rows_N, side="right") - 1
        for at, (tier, packed_VW) in enumerate(zip(self.tiers, self.packed, strict=True)):
            (here_P,) = (tier_N == at).nonzero()
            if len(here_P):
                yield tier, packed_VW, here_P

    @property
    def values_fp32(self) -> NDArray[np.float32]:
        """Values [L*D, K, S] in fp32, in memory; [L, K, S] where the subspaces share them."""
        return self.tensors[VALUES_FP32]

    @functools.cached_property
    def vectors(self) -> Vectors:
        """The vectors of all rows, as the kernels take them."""
        if not self.manifest.has_codes:
            return self.tensors["vectors"]
        return Coded([tier.layout for tier in self.tiers], self.packed, self.values_fp32)

    # Sizes

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed codes as they lie on disk."""
        return sum(packed_VW.nbytes for packed_VW in self.packed)

    @property
    def artifact_bytes(self) -> int:
        """Bytes of packed codes and values, or of the vectors, as they lie on disk."""
        rest = (self.tensors[name].nbytes for name in ("values", "vectors") if name in self.tensors)
        return self.packed_bytes + sum(rest)

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of the vocabulary as it lies on disk."""
        return sum(tensor.nbytes for tensor in self.vocabulary.tensors().values())

    @property
    def full_bytes(self) -> int:
        """Bytes of the fp32 table that this one replaces."""
        return 4 * self.manifest.num_embeddings * self.manifest.embedding_dim

    @property
    def compression_ratio(self) -> float:
        """`full_bytes` / `artifact_bytes`; the vocabulary's bytes are not in it."""
        return self.full_bytes / max(1, self.artifact_bytes)

    # Text

    def ids_of_texts(self, texts: Sequence[str]) -> list[int] | list[str]:
        """Ids as the table's vocabulary has them: what stands on a command line is text.

        Raises:
            IdTypeError: no integer, where the table has integers.
        """
        if self.vocabulary.kind == "string":
            return list(texts)
        return [_integer(text, self.name) for text in texts]

    @property
    def shown_levels(self) -> str:
        """Levels, of each tier where there are several: "44, 32, 16"."""
        return ", ".join(str(tier.layout.num_levels) for tier in self.tiers)

    @property
    def shown_row_bytes(self) -> str:
        """Bytes of a row's codes, of each tier where there are several; of its vector where dense."""
        sizes = [tier.layout.row_bytes for tier in self.tiers] or [self.manifest.row_bytes]
        return ", ".join(f"{size:,}" for size in sizes)


def codes_name(tier: int) -> str:
    """The tensor that holds the packed codes of a tier."""
    return f"packed_codes.{tier}" if tier else "packed_codes"


def sizes(tables: Collection[Table]) -> dict[str, Any]:
    """Rows and bytes of tables, added up, and their compression ratio: what `inspect` and metrics.json show."""
    full_bytes, artifact_bytes = sum(t.full_bytes for t in tables), sum(t.artifact_bytes for t in tables)
    return {
        "num_embeddings": sum(t.manifest.num_embeddings for t in tables),
        "full_bytes": full_bytes,
        "artifact_bytes": artifact_bytes,
        "vocabulary_bytes": sum(t.vocabulary_bytes for t in tables),
        "compression_ratio": full_bytes / max(1, artifact_bytes),
    }


def _check_choice(name: str, value: str) -> None:
    choices = _CHOICES[name]
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}, want {', '.join(choices[:-1])} or {choices[-1]}")


def _check_options(missing: MissingPolicy, dtype: VectorType, num_threads: int) -> None:
    _check_choice("missing", missing)
    _check_choice("dtype", dtype)
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


def _integer(text: str, table: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise IdTypeError(f"ID: got {text!r}, want an integer: table {table!r} has integer ids") from None
