"""Titles of ids. In: a Parquet, CSV or TSV file with a column of ids and one of titles. Out: id -> title.

The column of ids is called as the table (or one of its features), or `id`; the column of titles `title`, `name` or the
like, or it is the only other column of text. The file is streamed: what is held are the titles that are asked for.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpq_rec.errors import ConfigError
from dpq_rec.export import import_pyarrow

if TYPE_CHECKING:
    from dpq_rec.report.facts import Id
    from dpq_rec.table import Table

_TITLES = ("title", "name", "label", "word", "text")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".parquet", *_DELIMITERS)


class Names:
    """A file of titles, and where the titles of a table's ids are in it: `table`, `id_column`, `title_column`.

    Args:
        path: the file.
        tables: of the artifact, by name.
        chosen: the table whose ids the file names; None finds it by the file's columns.

    Raises:
        ConfigError: no such file, another kind of file, or no such columns.
        MissingDependencyError: a Parquet file, and pyarrow is not installed.
    """

    def __init__(self, path: Path, tables: Mapping[str, Table], chosen: str | None = None) -> None:
        if not path.is_file():
            raise ConfigError(f"--names: {path} is no file; name a {', '.join(_SUFFIXES)} file")
        if _suffix(path) not in _SUFFIXES:
            raise ConfigError(f"--names: got {path.name}, want a {', '.join(_SUFFIXES)} file")
        columns = _parquet_columns(path) if _suffix(path) == ".parquet" else _csv_columns(path)
        self.path = path
        self.table, self.id_column = _find_id_column(path, dict(columns), tables, chosen)
        self.title_column = _find_title_column(path, dict(columns), self.id_column)
        for wanted in (self.id_column, self.title_column):
            if (found := sum(name == wanted for name, _ in columns)) > 1:
                raise ConfigError(f"--names: {path} has {found} columns called {wanted}; rename or drop all but one")
        self.ids_are_text = tables[self.table].vocabulary.kind == "string"

    def titles_of(self, ids: Collection[Id]) -> dict[Id, str]:
        """The titles that the file has for ids; of an id that is there twice, the first.

        Raises:
            ConfigError: the column of ids holds others than the table, or the file is damaged.
        """
        read = self._read_parquet if _suffix(self.path) == ".parquet" else self._read_csv
        titles: dict[Id, str] = {}
        for found, title in read(set(ids)):
            if title:
                titles.setdefault(found, title)
        return titles

    def _read_parquet(self, wanted: set[Id]) -> Iterator[tuple[Id, str | None]]:
        pyarrow, parquet = import_pyarrow()
        id_type = pyarrow.string() if self.ids_are_text else pyarrow.int64()
        values = pyarrow.array(sorted(wanted), id_type)
        try:
            with self.path.open("rb") as source, parquet.ParquetFile(source) as file:
                for batch in file.iter_batches(columns=[self.id_column, self.title_column]):
                    ids = batch.column(self.id_column).cast(id_type)
                    is_wanted = pyarrow.compute.is_in(ids, value_set=values)
                    titles = batch.column(self.title_column).cast(pyarrow.string()).filter(is_wanted)
                    yield from zip(ids.filter(is_wanted).to_pylist(), titles.to_pylist(), strict=True)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            raise ConfigError(f"--names: {self.path}: {self._wrong_ids}: {error}") from error

    def _read_csv(self, wanted: set[Id]) -> Iterator[tuple[Id, str]]:
        lines = _csv_lines(self.path)
        _, header = next(lines)
        id_at, title_at = header.index(self.id_column), header.index(self.title_column)
        for number, line in lines:
            if not line:
                continue
            where = f"--names: {self.path}, line {number}: got"
            if len(line) != len(header):
                raise ConfigError(f"{where} {len(line)} columns, the header has {len(header)}")
            try:
                found = line[id_at] if self.ids_are_text else int(line[id_at])
            except ValueError:
                raise ConfigError(f"{where} {line[id_at]!r}: {self._wrong_ids}") from None
            if found in wanted:
                yield found, line[title_at]

    @property
    def _wrong_ids(self) -> str:
        kind = "strings" if self.ids_are_text else "64-bit integers"
        return f"column {self.id_column!r} cannot be read as {kind}, which table {self.table!r} has for ids"


def _find_id_column(
    path: Path, columns: Collection[str], tables: Mapping[str, Table], chosen: str | None
) -> tuple[str, str]:
    """A table, and the column of its ids."""
    searched = tables if chosen is None else {chosen: tables[chosen]}
    for name, table in searched.items():
        for wanted in (name, *table.manifest.features):
            if wanted in columns:
                return name, wanted
    if "id" in columns and len(searched) == 1:
        return next(iter(searched)), "id"
    fix = "name the table with --table" if "id" in columns else "rename its column of ids"
    raise ConfigError(
        f"--names: {path} has the columns {_listed(columns)}, none of them named {_listed(searched)}; {fix}"
    )


def _find_title_column(path: Path, columns: Mapping[str, bool], id_column: str) -> str:
    """The column of titles; `columns` says of each whether it is text."""
    others = [name for name, is_text in columns.items() if is_text and name != id_column]
    for wanted in _TITLES:
        for name in others:
            if name.lower() == wanted or name.lower().endswith(f"_{wanted}"):
                return name
    if len(others) != 1:
        raise ConfigError(
            f"--names: {path} has the columns {_listed(columns)}, none of them of titles; rename that one to title"
        )
    return others[0]


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "(none)"


def _parquet_columns(path: Path) -> list[tuple[str, bool]]:
    """Each column, and whether it is text."""
    pyarrow, parquet = import_pyarrow()
    try:
        with path.open("rb") as file:  # a path, pyarrow may take for a URI
            schema = parquet.read_schema(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"--names: {path} is no Parquet file that pyarrow can read: {error}") from error
    of_text = (pyarrow.string(), pyarrow.large_string())
    kinds = [field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type for field in schema]
    return [(field.name, kind in of_text) for field, kind in zip(schema, kinds, strict=True)]


def _csv_columns(path: Path) -> list[tuple[str, bool]]:
    """Each column; all are text."""
    _, header = next(_csv_lines(path), (0, []))
    return [(name, True) for name in header]


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines, each with its number in the file."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=_DELIMITERS[_suffix(path)], strict=True)
        try:
            for line in reader:
                yield reader.line_num, line
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--names: {path}, after line {reader.line_num}: no {_suffix(path)[1:]} in UTF-8: {error}"
            ) from error
