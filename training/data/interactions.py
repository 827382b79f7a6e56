"""Interactions as a stream. In: Parquet files of user_id and item_id (contract 1). Out: Pieces: splits, ids, features.

Files are streamed and may be larger than memory. What is held grows with the users (only where no column names the
split), never with the interactions.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.data.columns import (
    IdKind,
    Values,
    feature_kind,
    has_no_values,
    id_kind,
    merge_stream,
    to_numbers,
    to_values,
)
from training.data.files import DataFile, RowGroup, no_nulls, open_files, refuse_twice, row_groups

_logger = logging.getLogger(__name__)
IDS = ("user_id", "item_id")
TRAIN, VALIDATION, TEST = 0, 1, 2
_NO_FEATURES = (*IDS, "split", "label")
_Latest: TypeAlias = tuple[Values, NDArray[Any], NDArray[np.int64]]


class SplitCounts(NamedTuple):
    """How many rows are in each split."""

    train: int
    validation: int
    test: int


class Piece(NamedTuple):
    """N rows that follow each other in the files.

    Attributes:
        splits_N: TRAIN, VALIDATION or TEST (int8); no VALIDATION where those rows train.
        values: name of an id or a categorical feature -> its values, row after row.
        lengths: the same names -> how many values each row has (int64 [N]): ones for ids.
        numbers: name of a dense feature, or "label" -> float64 [N]; float32 would tell no two seconds since 1970 apart.
    """

    splits_N: NDArray[np.int8]
    values: dict[str, Values]
    lengths: dict[str, NDArray[np.int64]]
    numbers: dict[str, NDArray[np.float64]]

    def where(self, wanted_N: NDArray[np.bool_]) -> Piece:
        """Some of the rows."""
        return Piece(
            self.splits_N[wanted_N],
            {name: each.where(np.repeat(wanted_N, self.lengths[name])) for name, each in self.values.items()},
            {name: lengths_N[wanted_N] for name, lengths_N in self.lengths.items()},
            {name: numbers_N[wanted_N] for name, numbers_N in self.numbers.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interactions:
    """The interactions in a Parquet file or a folder of them, as a stream. Rows count through the files in their order.

    Attributes:
        row_groups: every row group, in file order.
        id_kinds: user_id, item_id and each categorical feature -> "int64" or "string".
        dense_features: the requested features that are numbers, in the order requested.
        held_out: VALIDATION and TEST -> their rows, ascending (int64); None where a column names the split.
        has_label: whether labels were requested.
        validation_trains: whether the rows of the validation split are rows of the training split.
    """

    row_groups: tuple[RowGroup, ...]
    id_kinds: Mapping[str, IdKind]
    dense_features: tuple[str, ...]
    held_out: Mapping[int, NDArray[np.int64]] | None
    has_label: bool
    validation_trains: bool

    @property
    def num_rows(self) -> int:
        """Of all splits together."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def categorical_features(self) -> tuple[str, ...]:
        """The requested features that are strings or lists, in the order requested."""
        return tuple(name for name in self.id_kinds if name not in IDS)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        features: Sequence[str] = (),
        label: bool = False,
        validation_trains: bool = False,
    ) -> Interactions:
        """Look at the files' columns; where none is named `split`, stream them once to find each user's last items.

        A folder is searched with its subfolders, and those that are named `column=value` give that column: see
        `open_files`. The order of paths is the order of the files, which is what "row order is chronological" rests on.
        Files without user_id or item_id are ignored and named in the log. Without `split`, a user's last item (by
        `timestamp`, equal ones in row order; by row order where there is none) is the test and the one before it the
        validation. The first item of a user always trains: of two, the other is the test; a single one is not held out.
        A feature that is null everywhere is left out and named in the log.

        Args:
            path: of the file or folder.
            features: more columns. Numbers, integers and booleans among them, are dense; strings, and lists of strings
                or of integers, are categorical.
            label: whether to read the column `label`, 0 or 1.
            validation_trains: whether to count the validation split as training, everywhere, and have none.

        Raises:
            ConfigError: nothing at the path, no file with interactions, a file that is no Parquet, columns missing, of
                a wrong type or not alike in all files. Wrong values are found as they are read.
        """
        files = _files_with_ids(Path(path))
        refuse_twice(files, (*IDS, "split", "timestamp", *(["label"] if label else []), *features))
        split = _shared_column(files, "split")
        timestamp = None if split else _shared_column(files, "timestamp")
        _check_types(files, [name for name in (split, timestamp, "label" if label else None) if name])
        kinds: dict[str, IdKind] = {name: _shared_kind(files, name, id_kind) for name in IDS}
        dense = []
        _check_names(features)
        for name in features:
            kind = _shared_kind(files, name, feature_kind)
            if kind is None:
                _logger.warning("features: %s has no values in any file; it is left out", name)
            elif kind == "dense":
                dense.append(name)
            else:
                kinds[name] = kind
        groups = tuple(row_groups(files))
        return cls(
            row_groups=groups,
            id_kinds=kinds,
            dense_features=tuple(dense),
            held_out=None if split else _hold_out_last(groups, kinds["user_id"], timestamp),
            has_label=label,
            validation_trains=validation_trains,
        )

    def scan(
        self, columns: Sequence[str], groups: Iterable[RowGroup] | None = None, *, splits: Sequence[int] | None = None
    ) -> Iterator[Piece]:
        """The requested columns and the splits, in pieces of at most 262,144 rows.

        Args:
            columns: ids, features and "label".
            groups: which row groups to read, and in which order; all of them unless given.
            splits: whose rows are wanted; those of all unless given.

        Raises:
            ConfigError: a null id or label, a label other than 0 and 1, a split other than 0, 1 and 2, a number that is
                infinite in float32, or a damaged file.
        """
        for group in self.row_groups if groups is None else groups:
            first_row = group.first_row
            for batch in group.read([*columns, "split"] if self.held_out is None else columns):
                splits_N = self._splits(batch, group.file.path, first_row)
                piece = self._piece(batch, columns, group.file.path, splits_N)
                yield piece if splits is None else piece.where(np.isin(splits_N, splits))
                first_row += len(batch)

    def read_ids(self, split: int) -> tuple[Values, Values]:
        """The ids of all users and of all items of a split, in row order; memory grows with them."""
        parts = [piece.values for piece in self.scan(IDS, splits=[split])]
        users, items = (Values.join([part[name] for part in parts], self.id_kinds[name]) for name in IDS)
        return users, items

    def count_splits(self) -> SplitCounts:
        """Rows of each split. An epoch has train // (batch_size * world_size) batches on each rank."""
        if self.held_out is not None:
            num_validation = 0 if self.validation_trains else len(self.held_out[VALIDATION])
            num_test = len(self.held_out[TEST])
            return SplitCounts(self.num_rows - num_validation - num_test, num_validation, num_test)
        counts = np.zeros(3, np.int64)
        for piece in self.scan(()):
            counts += np.bincount(piece.splits_N, minlength=3)
        return SplitCounts(*counts.tolist())

    def _splits(self, batch: Any, path: Path, first_row: int) -> NDArray[np.int8]:
        if self.held_out is None:
            splits_N = checked_splits(batch, path)
        else:
            splits_N = np.full(len(batch), TRAIN, np.int8)
            for split, rows in self.held_out.items():
                begin, end = np.searchsorted(rows, [first_row, first_row + len(batch)])
                splits_N[rows[begin:end] - first_row] = split
        return np.where(splits_N == VALIDATION, np.int8(TRAIN), splits_N) if self.validation_trains else splits_N

    def _piece(self, batch: Any, columns: Sequence[str], path: Path, splits_N: NDArray[np.int8]) -> Piece:
        piece = Piece(splits_N, {}, {}, {})
        for name in columns:
            column_N = no_nulls(batch, name, path) if name in (*IDS, "label") else batch.column(name)
            if name in self.id_kinds:
                piece.values[name], piece.lengths[name] = to_values(column_N, self.id_kinds[name])
                continue
            piece.numbers[name] = numbers_N = to_numbers(column_N)
            with np.errstate(over="ignore"):
                narrow_N = numbers_N.astype(np.float32)
            wrong = narrow_N[np.isinf(narrow_N) if name != "label" else (numbers_N != 0) & (numbers_N != 1)]
            if len(wrong):
                want = "0 or 1" if name == "label" else "numbers that float32 can hold"
                raise ConfigError(f"{name}: got {wrong[0]} in {path}, want {want}")
        return piece


def checked_splits(batch: Any, path: Path) -> NDArray[np.int8]:
    """The column `split` (int8 [N]).

    Raises:
        ConfigError: a null, or a split other than 0, 1 and 2.
    """
    splits_N = no_nulls(batch, "split", path).to_numpy(zero_copy_only=False)
    wrong = splits_N[(splits_N < TRAIN) | (splits_N > TEST)]
    if len(wrong):
        raise ConfigError(f"split: got {wrong[0]} in {path}, want 0 (train), 1 (validation) or 2 (test)")
    return splits_N.astype(np.int8, copy=False)


def _hold_out_last(
    groups: Sequence[RowGroup], user_kind: IdKind, timestamp: str | None
) -> dict[int, NDArray[np.int64]]:
    """The default split, in one pass: three rows of each user say which is its last and how many it has.

    Raises:
        ConfigError: a null in user_id or the timestamps, or a damaged file.
    """

    def read() -> Iterator[_Latest]:
        for group in groups:
            first_row = group.first_row
            for batch in group.read(["user_id", *([timestamp] if timestamp else [])]):
                users, _ = to_values(no_nulls(batch, "user_id", group.file.path), user_kind)
                rows_N = np.arange(first_row, first_row + len(batch))
                times = no_nulls(batch, timestamp, group.file.path) if timestamp else None
                yield users, rows_N if times is None else times.to_numpy(zero_copy_only=False), rows_N
                first_row += len(rows_N)

    def last_three(parts: list[_Latest]) -> _Latest:
        """The last three rows of each user, by user and time."""
        users = Values.join([users for users, _, _ in parts], user_kind)
        times_N, rows_N = (np.concatenate(each) for each in list(zip(*parts, strict=True))[1:])
        order_N = np.lexsort((times_N, users.codes_T))  # stable: equal times stay in row order
        codes_N = users.codes_T[order_N]
        keep_N = np.ones(len(codes_N), np.bool_)
        keep_N[:-3] = codes_N[:-3] != codes_N[3:]
        return Values(users.distinct_D, codes_N[keep_N]), times_N[order_N][keep_N], rows_N[order_N][keep_N]

    found = merge_stream(read(), last_three, lambda part: len(part[2]))
    if found is None:
        return {VALIDATION: np.empty(0, np.int64), TEST: np.empty(0, np.int64)}
    users, _, rows_N = found
    is_last_N = np.append(users.codes_T[1:] != users.codes_T[:-1], np.True_)[: len(rows_N)]
    is_first_N = np.roll(is_last_N, 1)
    is_second_last_N = np.append(is_last_N[1:], np.False_) & ~is_last_N
    return {VALIDATION: np.sort(rows_N[is_second_last_N & ~is_first_N]), TEST: np.sort(rows_N[is_last_N & ~is_first_N])}


def _files_with_ids(path: Path) -> list[DataFile]:
    """The files that have both ids; those without rows, which may lack columns, only where no other has any."""
    files = open_files(path)
    lacking = [[name for name in IDS if name not in file.types] for file in files]
    used = [file for file, lacks in zip(files, lacking, strict=True) if not lacks]
    if not used:
        seen = "; ".join(f"{file.path.name} ({', '.join(file.types)})" for file in files[:5])
        raise ConfigError(f"data: no Parquet file at {path} has both user_id and item_id; found: {seen or 'none'}")
    for file, lacks in zip(files, lacking, strict=True):
        if lacks:
            _logger.warning("ignored %s: it has no column %s", file.path, " and no column ".join(lacks))
    return [file for file in used if file.metadata.num_rows] or used


def _check_names(features: Sequence[str]) -> None:
    for at, name in enumerate(features):
        reason = "it is the label" if name == "label" else "it is read anyway" if name in _NO_FEATURES else None
        if reason or name in features[:at]:
            raise ConfigError(f"features: got {name}, {reason or 'twice'}; want other columns, each once")


def _check_types(files: Sequence[DataFile], columns: Sequence[str]) -> None:
    """Raises ConfigError for a split, timestamp or label that is missing or of a wrong type."""
    for file in files:
        for name in columns:
            kind = file.type_of(name)
            is_integer = pa.types.is_integer(kind) and kind != pa.uint64()
            is_number = is_integer or pa.types.is_floating(kind)
            fits, want = {
                "split": (is_integer, "int8, 0 (train), 1 (validation) or 2 (test)"),
                "timestamp": (
                    is_number or pa.types.is_timestamp(kind) or pa.types.is_date(kind),
                    "a number, a date or a timestamp",
                ),
                "label": (is_number or pa.types.is_boolean(kind), "a number"),
            }[name]
            if not fits:
                raise ConfigError(f"{name}: got {kind}, want {want} ({file.path})")


def _shared_kind(files: Sequence[DataFile], column: str, kind_of: Callable[[Any], Any]) -> Any:
    """What the column is, by id_kind or feature_kind, in all files alike; None for a feature without any values."""
    kinds = {}
    for file in files:
        if column not in file.types:
            raise ConfigError(f"features: got {column}, which is not in {file.path}; it has: {', '.join(file.types)}")
        if kind_of is feature_kind and has_no_values(file.types[column]):
            continue
        kind = kind_of(file.types[column])
        if kind is None:
            want = "int64 or string" if kind_of is id_kind else "numbers, strings, or lists of strings or integers"
            raise ConfigError(f"{column}: got {file.types[column]}, want {want} ({file.path})")
        kinds[kind] = f"{file.types[column]} in {file.path}"
    return _one(column, kinds)


def _shared_column(files: Sequence[DataFile], column: str) -> str | None:
    """The column's name where all files have it, of one type or all integers; None where none has it."""
    kinds = {}
    for file in files:
        kind = file.types.get(column)
        alike = "integer" if kind is not None and pa.types.is_integer(kind) else str(kind)
        kinds[alike] = f"{kind or 'none'} in {file.path}"
    return column if _one(column, kinds) != "None" else None


def _one(column: str, kinds: Mapping[Any, str]) -> Any:
    """The one kind that all files have; None without any."""
    if len(kinds) > 1:
        raise ConfigError(f"{column}: got {', '.join(kinds.values())}; want the same in every file")
    return next(iter(kinds), None)
