"""Columns that stand in paths, as Hive, Spark and Arrow write them. In: `split=0/day=2024-01-01/`. Out: typed values.

pyarrow.dataset reads such folders too, but in an order of its own and without the row groups that ranks share out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from dpq_rec.errors import ConfigError

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER, _NUMBER = re.compile(r"-?[0-9]+"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEAN = re.compile(r"true|false", re.IGNORECASE)


class PathColumn(NamedTuple):
    """What a path says of a column: its value as text, None for null, and its Arrow type over all paths."""

    text: str | None
    type: Any

    def repeated(self, num_rows: int) -> Any:
        """The column (Arrow [N])."""
        if self.text is None:
            return pa.nulls(num_rows, self.type)
        return pa.repeat(pa.scalar(self.text).cast(self.type), num_rows)

    def refuse_contradiction(self, name: str, column_N: Any, where: object) -> None:
        """Raise ConfigError where a column in a file has another value than its path says."""
        column_N = column_N.dictionary_decode() if pa.types.is_dictionary(column_N.type) else column_N
        wrong = column_N.filter(_differs(column_N, self.text))
        if len(wrong):
            got = f"{wrong[0].as_py()!r} in {where}, whose path says {name}={self.text or _NULL}"
            raise ConfigError(f"{name}: got {got}; want the same in both, or the column in one of the two alone")


def path_columns(paths: Sequence[Sequence[str]]) -> list[dict[str, PathColumn]]:
    """For each path, of folders each in the one before it, the columns that it names as `column=value`.

    Names and values are percent-encoded. A column is int64, double or bool where all of its values read so, else a
    string; as Spark and Arrow have it, 007 is the number 7. `timestamp` alone may be a timestamp. A column that has
    nothing but nulls is null.

    Raises:
        ConfigError: a path gives a column two values, or is not UTF-8.
    """
    every = [_texts(folders) for folders in paths]
    values: dict[str, set[str]] = {}
    for texts in every:
        for name, text in texts.items():
            values.setdefault(name, set()).update(() if text is None else (text,))
    types = {name: _type(name, texts) for name, texts in values.items()}
    return [{name: PathColumn(text, types[name]) for name, text in texts.items()} for texts in every]


def _texts(folders: Sequence[str]) -> dict[str, str | None]:
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


def _type(name: str, texts: set[str]) -> Any:
    if not texts:
        return pa.null()
    if all(map(_INTEGER.fullmatch, texts)):  # digits that no int64 holds are a string: rounded, ids would be others
        return pa.int64() if _can_cast(texts, pa.int64()) else pa.string()
    if all(map(_NUMBER.fullmatch, texts)):
        return pa.float64()
    if all(map(_BOOLEAN.fullmatch, texts)):
        return pa.bool_()
    return pa.timestamp("us") if name == "timestamp" and _can_cast(texts, pa.timestamp("us")) else pa.string()


def _can_cast(texts: set[str], kind: Any) -> bool:
    try:
        pa.array(texts, pa.string()).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _differs(column_N: Any, text: str | None) -> Any:
    """Whether each value is another than a text says (Arrow, bool [N])."""
    if text is None:
        return column_N.is_valid()
    try:
        return pc.fill_null(pc.not_equal(column_N, _as_type(text, column_N.type)), fill_value=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # no value of the column's type
        return pa.repeat(True, len(column_N))


def _as_type(text: str, kind: Any) -> Any:
    """A text as a value of a type; 1.0 is an integer too."""
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowInvalid:
        return pa.scalar(text).cast(pa.float64()).cast(kind)
