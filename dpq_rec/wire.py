"""Binary wire format for lookups. In: ids, rows, values. Out: the bytes of requests and replies, and back.

    request   ids, little-endian int64, one behind the other
    reply     rows: vectors (float32, float16) or packed codes, row major, little-endian; then the positions of missing
              ids (uint32); then, of the codes of a table with tiers, the tier of each row in a byte
    values    what decodes a table's packed codes: a safetensors file with the tensor `values`, as the artifact holds
              it, and, as text, `version`, `num_subspaces`, `num_codes`, `code_bits`, and `num_levels`, a JSON list with
              the levels of each tier

>>> vectors_NE, missing = np.array([[1.5, -2.0], [0.0, 0.0]], np.float32), np.array([1], np.uint32)
>>> ids_from_bytes(np.array([42, 7]).tobytes()).tolist()
[42, 7]
>>> bytes(to_bytes(vectors_NE, missing)).hex(" ", 4)
'0000c03f 000000c0 00000000 00000000 01000000'

A row of a tier of fewer levels has fewer bytes of codes: it is filled up with zeros.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.codes import MAX_TIERS, CodeLayout
from dpq_rec.errors import DamagedArtifactError, IdTypeError
from dpq_rec.kernels import MISSING_ROW, Coded
from dpq_rec.tensorfile import pack_tensors, parse_json, unpack_tensors

JSON = "application/json"  # media types of requests and replies
BINARY = "application/octet-stream"
CODES = "application/vnd.dpq-rec.codes"
ID_BYTES = 8
Form = Literal["float32", "float16", "codes"]  # of the rows of a reply
Buffer = bytes | memoryview


class LookupBytes(NamedTuple):
    """A binary reply, and how many of the ids have no row."""

    reply: Buffer
    num_missing: int


class PackedRows(NamedTuple):
    """The codes of rows, as an artifact holds them.

    Attributes:
        packed_NW: packed codes (uint8), zeros where an id is missing.
        missing: positions of unknown ids in the request, ascending (uint32).
        tiers_N: the tier of each (uint8), 0 where one is missing; None for a table without tiers.
    """

    packed_NW: NDArray[np.uint8]
    missing: NDArray[np.uint32]
    tiers_N: NDArray[np.uint8] | None = None

    @classmethod
    def from_bytes(cls, reply: bytes, num_rows: int, row_bytes: int, num_missing: int) -> PackedRows:
        """The rows of a reply of `to_bytes`; views of it.

        Raises:
            ValueError: it is shorter.
        """
        at = num_rows * row_bytes
        packed_NW = np.frombuffer(reply, np.uint8, at).reshape(num_rows, row_bytes)
        missing = np.frombuffer(reply, "<u4", num_missing, at).astype(np.uint32, copy=False)
        rest: NDArray[np.uint8] = np.frombuffer(reply, np.uint8, -1, at + 4 * num_missing)
        return cls(packed_NW, missing, rest if len(rest) else None)


def ids_from_bytes(content: Any) -> NDArray[np.int64]:
    """The ids [N] (int64) of a request; a view of it.

    Raises:
        IdTypeError: no bytes, or no multiple of 8 of them.
    """
    return np.frombuffer(check_ids(content), np.int64)


def check_ids(content: Any) -> bytes:
    """The bytes of a request.

    Raises:
        IdTypeError: as `ids_from_bytes`.
    """
    held = bytes(content) if isinstance(content, bytearray | memoryview) else content
    if not isinstance(held, bytes):
        raise IdTypeError(f"ids: got {type(content).__name__}, want bytes; `lookup` takes lists and arrays")
    if len(held) % ID_BYTES:
        raise IdTypeError(f"ids: got {len(held)} bytes, want a multiple of {ID_BYTES}: little-endian int64")
    return held


def to_bytes(rows_NX: NDArray[Any], missing: NDArray[np.uint32], tiers_N: NDArray[np.uint8] | None = None) -> Buffer:
    """A reply; where there is nothing beside the rows, a view of them and not a copy."""
    rest = [bytes_of(array) for array in (missing, tiers_N) if array is not None and len(array)]
    rows = bytes_of(rows_NX)
    return b"".join((rows, *rest)) if rest else rows


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The array's own bytes: the kernels are built for little-endian machines alone."""
    return memoryview(array).cast("B") if array.size else memoryview(b"")  # type: ignore[arg-type] # it is a buffer


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of a table, with which a client decodes packed codes to vectors.

    Attributes:
        version: of the artifact.
        layouts: of the codes of a row of each tier; one, where there are none.
        values_MKS: of the first tier, and so of all (float32, float16); [L, K, S] where the subspaces share them.
    """

    version: str
    layouts: tuple[CodeLayout, ...]
    values_MKS: NDArray[Any]

    def decode(self, rows: PackedRows) -> NDArray[np.float32]:
        """Vectors [N, E] of rows, bit for bit those of `EmbeddingStore.lookup`; zeros where one is missing.

        Raises:
            DamagedArtifactError: a code of K or more, or rows that are none of this table's: nothing is read outside.
        """
        self._check(rows)
        packed_NW, missing, tiers_N = rows
        rows_N = np.arange(len(packed_NW))
        packed = [np.ascontiguousarray(packed_NW)]
        if len(self.layouts) > 1:
            # A table of these rows alone, sorted by tier.
            tiers_N = np.zeros(0, np.uint8) if tiers_N is None else tiers_N
            rows_N[np.argsort(tiers_N, kind="stable")] = np.arange(len(packed_NW))
            packed = [
                np.ascontiguousarray(packed_NW[tiers_N == tier, : layout.row_bytes])
                for tier, layout in enumerate(self.layouts)
            ]
        rows_N[missing] = MISSING_ROW
        if "_coded" not in vars(self):
            vars(self)["_coded"] = Coded(self.layouts, packed, np.asarray(self.values_MKS, np.float32))
        coded: Coded = vars(self)["_coded"]  # kept for its values, of which the C++ has a copy
        return kernels.decode(coded.with_codes(packed), rows_N)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_coded"}

    def _check(self, rows: PackedRows) -> None:
        """Check rows that a server sent: the kernels trust shapes."""
        packed_NW, missing, tiers_N = rows
        for what, array, num_dims in (("codes", packed_NW, 2), ("missing", missing, 1), ("tiers", tiers_N, 1)):
            if array is not None and (array.dtype.kind != "u" or array.ndim != num_dims):
                raise DamagedArtifactError(f"{what}: got {array.dtype} {array.shape}, want those of `PackedRows`")
        got, want = packed_NW.shape[1] * packed_NW.itemsize, self.layouts[0].row_bytes
        if got != want:
            raise DamagedArtifactError(f"codes: got {got} bytes a row, want {want}")
        if len(missing) and missing.max() >= len(packed_NW):
            raise DamagedArtifactError(f"missing: got position {missing.max()} of {len(packed_NW)} rows")
        if len(packed_NW) and (tiers_N is None) != (len(self.layouts) == 1):
            raise DamagedArtifactError(f"tiers: want those of a table that has {len(self.layouts)}")
        if tiers_N is not None and (len(tiers_N) != len(packed_NW) or tiers_N.max(initial=0) >= len(self.layouts)):
            raise DamagedArtifactError(f"tiers: want {len(packed_NW)} of {len(self.layouts)}, got others")

    def to_bytes(self) -> bytes:
        """The safetensors file that a server sends; see the module."""
        layout = self.layouts[0]
        metadata = {
            "version": self.version,
            "num_subspaces": str(layout.num_subspaces),
            "num_codes": str(layout.num_codes),
            "code_bits": str(layout.code_bits),
            "num_levels": json.dumps([layout.num_levels for layout in self.layouts]),
        }
        return pack_tensors({"values": self.values_MKS}, metadata)

    @classmethod
    def from_bytes(cls, content: bytes) -> Values:
        """Read what `to_bytes` wrote.

        Raises:
            DamagedArtifactError: it is not what that writes.
        """
        tensors, metadata = unpack_tensors(content)
        try:
            sizes = {name: int(metadata[name]) for name in ("num_subspaces", "num_codes")}
            levels = parse_json(metadata["num_levels"].encode())
            if not all(type(level) is int for level in levels):
                raise ValueError("num_levels are no counts")
            layouts = [CodeLayout(num_levels=level, **sizes) for level in levels]
            values_MKS, first = np.array(tensors["values"], np.float32), layouts[0]
            fits = values_MKS.ndim == 3 and len(values_MKS) in (first.num_levels, first.codes_per_row)
            falls = all(layout.num_levels <= first.num_levels for layout in layouts) and len(layouts) <= MAX_TIERS
            if not fits or not falls or values_MKS.shape[1] != first.num_codes:
                raise ValueError(f"values {values_MKS.shape} of {first}")
            return cls(version=metadata["version"], layouts=tuple(layouts), values_MKS=values_MKS)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DamagedArtifactError(f"values: got something else than a server sends: {error!r}") from error
