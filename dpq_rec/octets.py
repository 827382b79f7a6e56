"""Lookups as they travel. In: a table, and ids as octets. Out: rows and positions of missing ids as octets.

Ids are little-endian int64, one behind the other. A reply holds the rows, then the positions of missing ids as
little-endian uint32, then, of the codes of a table with tiers, the tier of each row in a byte.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Table
from dpq_rec.decode import decode_rows
from dpq_rec.errors import IdTypeError
from dpq_rec.kernels.ids import lookup_bytes
from dpq_rec.packed import packed_rows
from dpq_rec.vocabulary import Int64Vocabulary

Form = Literal["float32", "float16", "codes"]
Octets = bytes | memoryview
ID_BYTES = 8


class FoundOctets(NamedTuple):
    """A reply, and how many of the ids have no row."""

    reply: Octets
    num_missing: int


def find_octets(table: Table, asked: bytes, form: Form) -> FoundOctets:
    """Vectors, or packed codes, of ids; zeros where one is missing.

    Raises:
        IdTypeError: no multiple of 8 bytes, or a table whose ids are strings.
        ConfigError: codes of a dense table.
        DamagedArtifactError: as `EmbeddingStore.lookup`.
    """
    asked = _checked_octets(asked)
    vocabulary = table.vocabulary
    can_be = form != "codes" or table.manifest.has_codes
    if can_be and isinstance(vocabulary, Int64Vocabulary):
        return FoundOctets(*lookup_bytes(asked, vocabulary.sorted, table.stored, form=form))
    if vocabulary.kind == "string":
        raise IdTypeError(f"ids: got octets, want strings: those are the ids of table {table.name!r}")
    rows_N = vocabulary.rows(ids_of_octets(asked))
    missing = (rows_N == kernels.MISSING_ROW).nonzero()[0].astype(np.uint32)
    if form == "codes":
        return FoundOctets(to_octets(*packed_rows(table, rows_N, missing)), len(missing))
    return FoundOctets(to_octets(decode_rows(table, rows_N, dtype=form), missing), len(missing))


def ids_of_octets(asked: bytes) -> NDArray[np.int64]:
    """Ids [N] (int64).

    Raises:
        IdTypeError: no multiple of 8 bytes.
    """
    return np.frombuffer(_checked_octets(asked), np.int64)


def _checked_octets(asked: Any) -> bytes:
    held = bytes(asked) if isinstance(asked, bytearray | memoryview) else asked
    if not isinstance(held, bytes):
        raise IdTypeError(f"ids: got {type(asked).__name__}, want bytes; `lookup` takes lists and arrays")
    if len(held) % ID_BYTES:
        raise IdTypeError(f"ids: got {len(held)} bytes, want a multiple of {ID_BYTES}: little-endian int64")
    return held


def to_octets(rows_NX: NDArray[Any], missing: NDArray[np.uint32], tiers_N: NDArray[np.uint8] | None = None) -> Octets:
    """A reply's octets; where there is nothing beside the rows, a view of them and not a copy."""
    rest = [bytes_of(array) for array in (missing, tiers_N) if array is not None and len(array)]
    rows = bytes_of(rows_NX)
    return b"".join((rows, *rest)) if rest else rows


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The array's own bytes: the kernels are built for little-endian machines alone."""
    return memoryview(array).cast("B") if array.size else memoryview(b"")  # type: ignore[arg-type] # it is a buffer
