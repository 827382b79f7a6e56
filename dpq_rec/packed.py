"""Packed codes that travel, and what decodes them where they arrive. In: a table and rows. Out: PackedRows, Values.

A row of a tier of fewer levels has fewer bytes: it is filled up with zeros, and its tier's number stands beside it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import Table
from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.kernels import Coded
from dpq_rec.tensorfile import pack_tensors, parse_json, unpack_tensors
from dpq_rec.tiers import MAX_TIERS


class PackedRows(NamedTuple):
    """Rows as an artifact holds them.

    Attributes:
        packed_NW: packed codes (uint8), zeros where an id is missing.
        missing: positions of unknown ids in the request, ascending (uint32).
        tiers_N: the tier of each (uint8), 0 where one is missing; None for a table without tiers.
    """

    packed_NW: NDArray[np.uint8]
    missing: NDArray[np.uint32]
    tiers_N: NDArray[np.uint8] | None = None


def packed_rows(table: Table, rows_N: NDArray[np.int64], missing: NDArray[np.uint32]) -> PackedRows:
    """The packed codes of rows; MISSING_ROW, which stands at the positions that are missing, gives zeros.

    Raises:
        ConfigError: the table is dense, and has no codes.
        DamagedArtifactError: a row outside the table.
    """
    if not isinstance(table.stored, Coded):
        raise ConfigError(f"table {table.name!r} is of kind {table.manifest.kind!r}: it has vectors, and no codes")
    packed_NW, tiers_N = kernels.copy_codes(table.stored, rows_N)
    return PackedRows(packed_NW, missing, tiers_N)


@dataclass(frozen=True, kw_only=True)
class Values:
    """What turns a table's packed codes into its vectors.

    Attributes:
        version: of the artifact.
        layouts: of the codes of a row of each tier; one, where there are none.
        values_MKS: of the first tier, and so of all (float32); [L, K, S] where the subspaces share them.
    """

    version: str
    layouts: tuple[CodeLayout, ...]
    values_MKS: NDArray[np.float32]

    def decode(self, rows: PackedRows) -> NDArray[np.float32]:
        """Vectors [N, E] of rows, bit for bit those of `EmbeddingStore.lookup`; zeros where one is missing.

        Raises:
            DamagedArtifactError: a code of K or more, or rows that are none of this table's: nothing is read outside.
        """
        self._check(rows)
        at_N = np.arange(len(rows.packed_NW))
        at_N[rows.missing] = kernels.MISSING_ROW
        if rows.tiers_N is None:
            return kernels.decode(self._coded[0].with_codes(np.ascontiguousarray(rows.packed_NW)), at_N)
        dim = self.layouts[0].num_subspaces * self.values_MKS.shape[2]
        vectors_NE = np.zeros((len(at_N), dim), np.float32)
        for tier, layout in enumerate(self.layouts):
            (here_P,) = (rows.tiers_N == tier).nonzero()
            packed_PW = np.ascontiguousarray(rows.packed_NW[here_P, : layout.row_bytes])
            there_P = np.where(at_N[here_P] == kernels.MISSING_ROW, kernels.MISSING_ROW, np.arange(len(here_P)))
            vectors_NE[here_P] = kernels.decode(self._coded[tier].with_codes(packed_PW), there_P)
        return vectors_NE

    @functools.cached_property
    def _coded(self) -> list[Coded]:
        """The values of each tier, which are the first of all, and no rows."""
        per_level = len(self.values_MKS) // self.layouts[0].num_levels
        return [
            Coded.of(
                np.empty((0, layout.row_bytes), np.uint8), self.values_MKS[: layout.num_levels * per_level], layout
            )
            for layout in self.layouts
        ]

    def _check(self, rows: PackedRows) -> None:
        """They come from elsewhere, and the kernels trust shapes."""
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


def values_to_bytes(table: Table, version: str) -> bytes:
    """A safetensors file: the tensor `values`, as the artifact holds it, and what else `Values` needs as metadata.

    The metadata, all text: `version`, `num_subspaces`, `num_codes`, `code_bits`, and `num_levels`, a JSON list of the
    levels of each tier.

    Raises:
        ConfigError: the table is dense, and has no values.
    """
    if not table.manifest.has_codes:
        raise ConfigError(f"table {table.name!r} is of kind {table.manifest.kind!r}: it has vectors, and no values")
    layout = table.manifest.layout
    metadata = {
        "version": version,
        "num_subspaces": str(layout.num_subspaces),
        "num_codes": str(layout.num_codes),
        "code_bits": str(layout.code_bits),
        "num_levels": json.dumps([tier.layout.num_levels for tier in table.tiers]),
    }
    return pack_tensors({"values": table.tensors["values"]}, metadata)


def values_of_bytes(content: bytes) -> Values:
    """What `values_to_bytes` was given.

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
        values_MKS = np.array(tensors["values"], np.float32)
        of_first = layouts[0]
        fits = values_MKS.ndim == 3 and len(values_MKS) in (of_first.num_levels, of_first.codes_per_row)
        falls = all(layout.num_levels <= of_first.num_levels for layout in layouts) and len(layouts) <= MAX_TIERS
        if not fits or not falls or values_MKS.shape[1] != of_first.num_codes:
            raise ValueError(f"values {values_MKS.shape} of {of_first}")
        return Values(version=metadata["version"], layouts=tuple(layouts), values_MKS=values_MKS)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedArtifactError(f"values: got something else than a server sends: {error!r}") from error
