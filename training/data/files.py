"""Parquet files and what is in them. In: a path. Out: DataFile of each file, row groups, record batches.

Columns may stand in paths, as Hive, Spark and Arrow write them: `split=0/day=2024-01-01/part-0.parquet`.
pyarrow.dataset reads such folders too, but in an order of its own and without the row groups that ranks share out.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpq_rec.errors import ConfigError

_logger = logging.getLogger(__name__)
_PIECE_ROWS = 1 << 18  # rows read at a time
_SUFFIXES = (".parquet", ".parq", ".pq")
_SPARK_PART = re.compile(r"\.c\d+")  # part-00000-UUID.c000
_MAGIC = (b"PAR1", b"PARE")  # plain, and encrypted, which is refused when it is read
_FOOTERS = ("_metadata", "_common_metadata")  # Parquet by their magic, without rows
_TABLE_FORMATS = ("_delta_log", ".hoodie")  # folders that say which of the files are of the table
_READ_NAMED, _OTHERS_NAMED = 5, 20  # files named in a line of the log: those that are read, and those that are not
_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER, _NUMBER = re.compile(r"-?[0-9]+"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEAN = re.compile(r"true|false", re.IGNORECASE)


class DataFile(NamedTuple):
    """A Parquet file.

    Attributes:
        path: where it is.
        metadata: its footer.
        types: column -> Arrow type, of those that its path names too.
        stored: its own columns, and how often it has each.
        in_path: the columns that its path names -> their values as text, None for null.
    """

    path: Path
    metadata: Any
    types: dict[str, Any]
    stored: Counter[str]
    in_path: Mapping[str, str | None]

    @classmethod
    def open(cls, path: Path, in_path: Mapping[str, str | None], path_types: Mapping[str, Any]) -> DataFile:
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
        types = {name: path_types[name] for name in in_path} | dict(zip(schema.names, schema.types, strict=True))
        return cls(path, metadata, types, Counter(schema.names), in_path)

    def type_of(self, column: str) -> Any:
        """The Arrow type of a column.

        Raises:
            ConfigError: the file has no such column.
        """
        if column not in self.types:
            raise ConfigError(f"{column}: got no such column in {self.path}; it has: {', '.join(self.types)}")
        return self.types[column]


class RowGroup(NamedTuple):
    """One row group of a file; `first_row` counts through all files."""

    file: DataFile
    position: int
    first_row: int
    num_rows: int

    def read(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns as Arrow record batches of at most 262,144 rows.

        Raises:
            ConfigError: the file is damaged, or a column in it has another value than its path says.
        """
        path, stored, in_path = self.file.path, self.file.stored, self.file.in_path
        num_rows = max(1, min(_PIECE_ROWS, self.num_rows))
        wanted = [name for name in columns if name in stored]
        try:
            with _opened(path) as source, pq.ParquetFile(source, metadata=self.file.metadata) as file:
                for batch in file.iter_batches(num_rows, [self.position], wanted, use_threads=False):
                    for name in (name for name in columns if name in in_path):
                        if name in stored:
                            _check_path(name, in_path[name], batch.column(name), path)
                        else:
                            value = pa.scalar(in_path[name], pa.string()).cast(self.file.types[name])
                            batch = batch.append_column(name, pa.repeat(value, len(batch)))
                    yield batch
        except pa.ArrowMemoryError:
            raise  # no fault of the file
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {path} cannot be read: {error}") from error


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
        return [DataFile.open(path, {}, {})]
    files, others = _parquet_files(path)
    if files:
        _logger.info("%s: reading %d Parquet file(s): %s", path, len(files), _named(path, files, _READ_NAMED))
    if others:
        kinds = Counter(other.suffix or "no suffix" for other in others).most_common(_OTHERS_NAMED)
        shown = ", ".join(f"{number} {kind}" for kind, number in kinds)
        what = "%s: not reading %d file(s) that are no Parquet by name (%s): %s"
        _logger.warning(what, path, len(others), shown, _named(path, others))
    in_paths = [_path_columns(file.relative_to(path).parts[:-1]) for file in files]
    types = {name: _path_type(name, in_paths) for name in {name for columns in in_paths for name in columns}}
    return [DataFile.open(file, columns, types) for file, columns in zip(files, in_paths, strict=True)]


def _named(folder: Path, files: Sequence[Path], most: int = _OTHERS_NAMED) -> str:
    """The first few files, and how many more there are."""
    names = [str(file.relative_to(folder)) for file in files[:most]]
    more = f" and {len(files) - len(names)} more" if len(files) > len(names) else ""
    return ", ".join(names) + more


def _parquet_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files that are Parquet, and files that are not, each in the order of their paths."""
    files: list[Path] = []
    others: list[Path] = []
    again: list[Path] = []  # links to one of the files
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
    left_out = [each for each in hidden if each.is_dir() or (each.name not in _FOOTERS and _is_parquet(each))]
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
        is_column = "=" in entry.name and entry.is_dir()  # whose name may begin with _
        is_hidden = entry.name[0] == "." or (entry.name[0] == "_" and not is_column)
        if is_hidden or entry.name.endswith("._COPYING_"):  # what Spark takes for no data
            hidden.append(entry)
        elif not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _walk(entry, above, hidden)


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


def _path_columns(folders: Sequence[str]) -> dict[str, str | None]:
    """The columns that a path names, each folder in the one before it, as `column=value`, both percent-encoded.

    Raises:
        ConfigError: a path gives a column two values, or is not UTF-8.
    """
    found: dict[str, str | None] = {}
    for folder in folders:
        name, is_column, text = folder.partition("=")
        if not (name and is_column):
            continue
        try:
            name, text = unquote(name, errors="strict"), unquote(text, errors="strict")
        except UnicodeDecodeError as error:
            raise ConfigError(f"data: the folder {folder!r} holds no UTF-8, percent-encoded: {error}") from error
        value = None if text == _NULL else text
        if found.setdefault(name, value) != value:
            raise ConfigError(f"{name}: got {found[name]} and {text} in {'/'.join(folders)}; want one value in a path")
    return found


def _path_type(column: str, in_paths: Sequence[Mapping[str, str | None]]) -> Any:
    """The Arrow type of a column in paths: int64, double or bool where all of its values read so, else a string.

    As Spark and Arrow have it, 007 is the number 7. `timestamp` alone may be a timestamp; nothing but nulls is null.
    """
    texts = {text for columns in in_paths if (text := columns.get(column)) is not None}
    if not texts:
        return pa.null()
    if all(map(_INTEGER.fullmatch, texts)):  # digits that no int64 holds are a string: rounded, ids would be others
        return pa.int64() if _can_cast(texts, pa.int64()) else pa.string()
    if all(map(_NUMBER.fullmatch, texts)):
        return pa.float64()
    if all(map(_BOOLEAN.fullmatch, texts)):
        return pa.bool_()
    return pa.timestamp("us") if column == "timestamp" and _can_cast(texts, pa.timestamp("us")) else pa.string()


def _can_cast(texts: set[str], kind: Any) -> bool:
    try:
        pa.array(texts, pa.string()).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _check_path(name: str, text: str | None, column_N: Any, path: Path) -> None:
    """Raise ConfigError where a column in a file has another value than its path says."""
    column_N = column_N.dictionary_decode() if pa.types.is_dictionary(column_N.type) else column_N
    differs_N = column_N.is_valid()
    if text is not None:
        try:
            differs_N = pc.fill_null(pc.not_equal(column_N, _as_type(text, column_N.type)), fill_value=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # no value of the column's type
            differs_N = pa.repeat(True, len(column_N))
    wrong = column_N.filter(differs_N)
    if len(wrong):
        got = f"{wrong[0].as_py()!r} in {path}, whose path says {name}={text or _NULL}"
        raise ConfigError(f"{name}: got {got}; want the same in both, or the column in one of the two alone")


def _as_type(text: str, kind: Any) -> Any:
    """A text as a value of a type; 1.0 is an integer too."""
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowInvalid:
        return pa.scalar(text).cast(pa.float64()).cast(kind)


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
