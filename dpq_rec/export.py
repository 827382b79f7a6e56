"""A table to Parquet. In: a table of an opened artifact. Out: a folder of part-00000.parquet, part-00001.parquet, ...

Columns: `id` (int64, or string), and `vector` (list<float32> or list<halffloat>) or `codes` (list<uint16>, fewer in a
tier of fewer levels); ascending rows. Ids that share a row get a line each; a row without an id gets none. Parts are
ranges of rows, decoded and written a small batch at a time: the memory this takes does not grow with the table. The
only module that imports pyarrow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import find_damaged_row, unpack_codes
from dpq_rec.errors import ConfigError, DamagedArtifactError, MissingDependencyError
from dpq_rec.files import renamed_into
from dpq_rec.table import Table, VectorType

_BATCH_BYTES = 1 << 24  # of a row group's vectors, or of its ids where they are longer


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written of a table.

    Attributes:
        dtype: of the vectors.
        codes: the codes [L*D] of each row, L being its tier's, instead of its vector.
        rows_per_part: rows of the table whose ids stand in one file.
    """

    dtype: VectorType = "float32"
    codes: bool = False
    rows_per_part: int = 1 << 20

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype: got {self.dtype!r}, want float32 or float16")
        if self.codes and self.dtype != "float32":
            raise ConfigError(f"dtype: got {self.dtype} with codes, which are always uint16: ask for one of the two")
        if self.rows_per_part < 1:
            raise ConfigError(f"rows_per_part: got {self.rows_per_part}, want 1 or more")


def export_table(
    table: Table,
    out: str | os.PathLike[str],
    config: ExportConfig | None = None,
    progress: Callable[[int], object] = lambda num_rows: None,
) -> tuple[int, int]:
    """Write a table as Parquet files; on any error nothing is left behind.

    Args:
        table: a table of an opened artifact: `EmbeddingStore.open(path).table(name)`.
        out: the folder to make; it must not exist.
        config: what is written; float32 vectors if not given.
        progress: called with the number of rows that each batch covers; they add up to num_embeddings.

    Returns:
        how many files, and how many ids in them.

    Raises:
        ConfigError: codes of a table that has none.
        DamagedArtifactError: a row's codes are not what was published.
        FileExistsError: `out` exists.
        MissingDependencyError: pyarrow is not installed.
    """
    config = config or ExportConfig()
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{target} exists; an export goes into a folder of its own: name another one")
    if config.codes and not table.manifest.has_codes:
        raise ConfigError(f"table {table.name!r} is {table.manifest.kind} and has no codes: export its vectors instead")
    pyarrow, parquet = import_pyarrow()
    column = _Column(pyarrow, table, config)
    num_rows = table.manifest.num_embeddings
    starts = range(0, max(1, num_rows), config.rows_per_part)
    num_ids = 0
    with renamed_into(target) as folder:
        for part, start in enumerate(starts):
            reached, stop = start, min(start + config.rows_per_part, num_rows)
            # A file, for pyarrow takes some paths for URIs.
            with (
                (folder / f"part-{part:05}.parquet").open("wb") as file,
                parquet.ParquetWriter(file, column.schema) as writer,
            ):
                for batch, last_row in column.batches(start, stop):
                    writer.write_batch(batch)
                    num_ids += batch.num_rows
                    progress(last_row + 1 - reached)
                    reached = last_row + 1
            progress(stop - reached)
    return len(starts), num_ids


def import_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow, with pyarrow.compute in it, and pyarrow.parquet.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", "export") from error
    return pyarrow, pyarrow.parquet


class _Column:
    """What stands beside the ids: vectors or codes, in batches."""

    def __init__(self, pyarrow: Any, table: Table, config: ExportConfig) -> None:
        self.pyarrow, self.table, self.config = pyarrow, table, config
        name, element = ("codes", "uint16") if config.codes else ("vector", config.dtype)
        item = {"uint16": pyarrow.uint16, "float32": pyarrow.float32, "float16": pyarrow.float16}[element]()
        id_type, id_bytes = pyarrow.int64(), 8
        if table.vocabulary.kind == "string":
            id_type, id_bytes = pyarrow.string(), table.vocabulary_bytes // max(1, len(table.tensors["rows"]))
        self.schema = pyarrow.schema({"id": id_type, name: pyarrow.list_(item)})
        self.rows_per_batch = max(1, _BATCH_BYTES // max(4 * table.manifest.embedding_dim, id_bytes))

    def batches(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """Record batches of the ids that live in rows start to stop-1, each with its last row."""
        ids_N, rows_N = self.table.vocabulary.ids_of_rows(start, stop)
        for begin in range(0, len(ids_N), self.rows_per_batch):
            batch = slice(begin, begin + self.rows_per_batch)
            parts = (
                self._codes(rows_N[batch])
                if self.config.codes
                else [self.table.decode(rows_N[batch], dtype=self.config.dtype)]
            )
            widths_N = np.concatenate([np.full(len(items_PX), items_PX.shape[1]) for items_PX in parts])
            offsets = np.concatenate([[0], widths_N.cumsum()]).astype(np.int32)
            items_T = np.concatenate([items_PX.reshape(-1) for items_PX in parts])
            lists = self.pyarrow.ListArray.from_arrays(offsets, items_T, type=self.schema.field(1).type)
            columns = [self.pyarrow.array(ids_N[batch], self.schema.field(0).type), lists]
            yield self.pyarrow.record_batch(columns, schema=self.schema), int(rows_N[batch][-1])

    def _codes(self, rows_N: NDArray[np.int64]) -> list[NDArray[np.uint16]]:
        """Codes [P, M] of ascending rows, tier by tier."""
        parts = []
        for tier, packed_VW, here_P in self.table.by_tier(rows_N):
            rows_P = rows_N[here_P]
            packed_PW = packed_VW[rows_P - tier.first_row]
            damaged = find_damaged_row(packed_PW, tier.layout)
            if damaged is not None:
                raise DamagedArtifactError(
                    f"table {self.table.name!r}: row {rows_P[damaged]} holds an impossible code or padding bit"
                )
            parts.append(unpack_codes(packed_PW, tier.layout))
        return parts
