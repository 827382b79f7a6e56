"""Parquet files and what is in them. In: a path. Out: DataFile of each file, row groups, record batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dpq_rec.errors import ConfigError

IDS = ("user_id", "item_id")
_PIECE_ROWS = 1 << 18  # rows read at a time


class DataFile(NamedTuple):
    """A Parquet file's path, footer and column types by name, and which of user_id and item_id it lacks."""

    path: Path
    metadata: Any
    types: dict[str, Any]
    lacks: list[str]

    @classmethod
    def open(cls, path: Path) -> DataFile:
        """Read the footer.

        Raises:
            ConfigError: the file is no Parquet.
        """
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {path} cannot be read as Parquet: {error}") from error
        schema = metadata.schema.to_arrow_schema()
        types = dict(zip(schema.names, schema.types, strict=True))
        return cls(path, metadata, types, [name for name in IDS if name not in types])


class RowGroup(NamedTuple):
    """One row group of a file; `first_row` counts through all files."""

    path: Path
    metadata: Any
    position: int
    first_row: int
    num_rows: int

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns as Arrow record batches of at most 262,144 rows.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            with pq.ParquetFile(self.path, metadata=self.metadata) as file:
                num_rows = max(1, min(_PIECE_ROWS, self.num_rows))
                yield from file.iter_batches(num_rows, [self.position], list(columns), use_threads=False)
        except pa.ArrowMemoryError:
            raise  # no fault of the file
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {self.path} cannot be read: {error}") from error


def parquet_files(path: Path) -> list[Path]:
    """The file, or those of a folder and its subfolders, in the order of their paths.

    Raises:
        ConfigError: there is nothing at the path.
    """
    if not path.exists():
        raise ConfigError(f"data: {path} does not exist; want a Parquet file or a folder of them")
    if path.is_file():
        return [path]
    found = path.rglob("*.parquet")
    return sorted(file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts))


def row_groups(files: Sequence[DataFile]) -> Iterator[RowGroup]:
    """Every row group, in file order."""
    first_row = 0
    for file in files:
        for position in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(position).num_rows
            yield RowGroup(file.path, file.metadata, position, first_row, num_rows)
            first_row += num_rows


def no_nulls(batch: Any, name: str, path: Path) -> Any:
    """A column of a record batch.

    Raises:
        ConfigError: it has nulls, or a number that is none.
    """
    column_N = batch.column(name)
    num_nulls = column_N.null_count or column_N.is_null(nan_is_null=True).true_count
    if num_nulls:
        raise ConfigError(f"{name}: got {num_nulls} nulls within {len(column_N)} rows of {path}, want none")
    return column_N
