"""Parquet files and what is in them. In: a path. Out: DataFile of each file, row groups, record batches."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dpq_rec.errors import ConfigError
from training.data.partitions import PathColumn, path_columns

_logger = logging.getLogger(__name__)
IDS = ("user_id", "item_id")
_PIECE_ROWS = 1 << 18  # rows read at a time
_SUFFIXES = (".parquet", ".parq", ".pq")
_SPARK_PART = re.compile(r"\.c\d+")  # part-00000-UUID.c000
_MAGIC = (b"PAR1", b"PARE")  # plain, and encrypted, which is refused when it is read
_FOOTERS = ("_metadata", "_common_metadata")  # Parquet by their magic, without rows
_TABLE_FORMATS = ("_delta_log", ".hoodie")  # folders that say which of the files are of the table
_READ_NAMED, _OTHERS_NAMED = 5, 20  # files named in a line of the log: those that are read, and those that are not


class DataFile(NamedTuple):
    """A Parquet file.

    Attributes:
        path: where it is.
        metadata: its footer.
        types: column -> Arrow type, of those that its path names too.
        stored: its own columns, and how often it has each.
        in_path: the columns that its path names.
    """

    path: Path
    metadata: Any
    types: dict[str, Any]
    stored: Counter[str]
    in_path: Mapping[str, PathColumn]

    @classmethod
    def open(cls, path: Path, in_path: Mapping[str, PathColumn]) -> DataFile:
        """Read the footer.

        Raises:
            ConfigError: the file is no Parquet.
        """
        try:
            with _opened(path) as source:
                metadata = pq.read_metadata(source)
            schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {path} cannot be read as Parquet: {error}") from error
        types = {name: column.type for name, column in in_path.items()}
        types.update(zip(schema.names, schema.types, strict=True))
        return cls(path, metadata, types, Counter(schema.names), in_path)

    @property
    def lacks(self) -> list[str]:
        """Which of user_id and item_id it lacks."""
        return [name for name in IDS if name not in self.types]


class RowGroup(NamedTuple):
    """One row group of a file; `first_row` counts through all files."""

    file: DataFile
    position: int
    first_row: int
    num_rows: int

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns as Arrow record batches of at most 262,144 rows.

        Raises:
            ConfigError: the file is damaged, or its path says otherwise.
        """
        stored = [name for name in columns if name in self.file.stored]
        num_rows = max(1, min(_PIECE_ROWS, self.num_rows))
        try:
            with _opened(self.path) as source, pq.ParquetFile(source, metadata=self.file.metadata) as file:
                for batch in file.iter_batches(num_rows, [self.position], stored, use_threads=False):
                    yield self._with_path_columns(batch, columns)
        except pa.ArrowMemoryError:
            raise  # no fault of the file
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {self.path} cannot be read: {error}") from error

    def _with_path_columns(self, batch: Any, columns: Sequence[str]) -> Any:
        for name in columns:
            column = self.file.in_path.get(name)
            if column is not None and name in self.file.stored:
                column.refuse_contradiction(name, batch.column(name), self.path)
            elif column is not None:
                batch = batch.append_column(name, column.repeated(len(batch)))
        return batch


def open_files(path: Path) -> list[DataFile]:
    """The Parquet file, or those of a folder and its subfolders, in the order of their paths.

    A file is Parquet by its name (.parquet, .parq or .pq, in any letters); without a suffix, by its first bytes.
    Folders named `column=value`, below the path, give their files that column. Links are followed, and what several
    lead to is read once. Names that begin with `.` or `_` are left out, but for folders such as `_column=value`. The
    log says what is read and what is not.

    Raises:
        ConfigError: there is nothing at the path, or a file that is no Parquet although its name says so.
    """
    if not path.exists():
        raise ConfigError(f"data: {path} does not exist; want a Parquet file or a folder of them")
    if not path.is_dir():
        return [DataFile.open(path, {})]
    files, others = _parquet_files(path)
    if files:
        _logger.info("%s: reading %d Parquet file(s): %s", path, len(files), _named(path, files, _READ_NAMED))
    if others:
        kinds = Counter(other.suffix or "no suffix" for other in others).most_common(_OTHERS_NAMED)
        shown = ", ".join(f"{number} {kind}" for kind, number in kinds)
        what = "%s: not reading %d file(s) that are no Parquet by name (%s): %s"
        _logger.warning(what, path, len(others), shown, _named(path, others))
    in_paths = path_columns([file.relative_to(path).parts[:-1] for file in files])
    return [DataFile.open(*each) for each in zip(files, in_paths, strict=True)]


def _named(folder: Path, files: Sequence[Path], most: int = _OTHERS_NAMED) -> str:
    """The first few files, and how many more there are."""
    names = [str(file.relative_to(folder)) for file in files[:most]]
    more = f" and {len(files) - len(names)} more" if len(files) > len(names) else ""
    return ", ".join(names) + more


def _parquet_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that are Parquet, and files that are not, each in the order of their paths."""
    files: list[Path] = []
    others: list[Path] = []
    again: list[Path] = []
    hidden: list[Path] = []
    first_of: dict[tuple[Path, ...], Path] = {}
    for file in _walk(folder, frozenset(), hidden):
        if not _is_parquet(file):
            others.append(file)
            continue
        columns = (Path(part) for part in file.relative_to(folder).parts[:-1] if "=" in part)
        first = first_of.setdefault((file.resolve(), *columns), file)
        (files if first is file else again).append(file)
    if again:
        _logger.warning("%s: not reading twice what links lead to: %s", folder, _named(folder, again))
    left_out = [each for each in hidden if _may_hold_data(each)]
    if left_out:
        _logger.warning("%s: not reading names that begin with . or _: %s", folder, _named(folder, left_out))
    if any(each.name in _TABLE_FORMATS for each in hidden):
        what = "%s: a Delta or Hudi table, read without its log: rows that it has deleted may be among those read"
        _logger.warning(what, folder)
    return files, others


def _walk(folder: Path, above: frozenset[Path], hidden: list[Path]) -> Iterator[Path]:
    """The files of a folder and its subfolders in the order of their paths; hidden names are added to a list.

    Args:
        folder: where to begin.
        above: real paths of the folders that it lies in: a link that leads back to one is not followed.
        hidden: takes files and folders that are left out.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    above = above | {folder.resolve()}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"data: {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if _is_hidden(entry):
            hidden.append(entry)
        elif not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _walk(entry, above, hidden)


def _is_hidden(entry: Path) -> bool:
    """Whether Spark takes a name for none of data; a column of a path may begin with _."""
    is_column = "=" in entry.name and entry.is_dir()
    return entry.name[0] == "." or (entry.name[0] == "_" and not is_column) or entry.name.endswith("._COPYING_")


def _may_hold_data(hidden: Path) -> bool:
    return hidden.is_dir() or (hidden.name not in _FOOTERS and _is_parquet(hidden))


def _is_parquet(file: Path) -> bool:
    if file.suffix.lower() in _SUFFIXES:
        return True
    has_suffix = file.suffix and not _SPARK_PART.fullmatch(file.suffix)
    if has_suffix or not file.is_file():  # a pipe, a device, a link to nothing
        return False
    try:
        with file.open("rb") as content:
            return content.read(len(_MAGIC[0])) in _MAGIC
    except OSError as error:
        raise ConfigError(f"data: {file} cannot be read: {error.strerror}") from error


def _opened(path: Path) -> Any:
    """The file as Arrow reads it. A path would be taken for a URI where it has a colon, for a home where a ~."""
    return pa.OSFile(os.fsencode(path), "rb")


def row_groups(files: Iterable[DataFile]) -> Iterator[RowGroup]:
    """Every row group, in file order."""
    first_row = 0
    for file in files:
        for position in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(position).num_rows
            yield RowGroup(file, position, first_row, num_rows)
            first_row += num_rows


def refuse_twice(files: Iterable[DataFile], columns: Iterable[str]) -> None:
    """Raise ConfigError where a file has two of one column's name."""
    for name in columns:
        for file in files:
            if file.stored[name] > 1:
                got = f"{file.stored[name]} columns of that name in {file.path}"
                raise ConfigError(f"{name}: got {got}; want one: rename or drop the others")


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
