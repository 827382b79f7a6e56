"""Interactions as a stream. In: Parquet files of user_id and item_id (contract 1). Out: Pieces: splits, ids, features.

Files are streamed and may be larger than memory. What is held grows with the users (only where no column names the
split), never with the interactions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.data.columns import IdKind, Values, bags, empty_values, feature_kind, has_no_values, id_kind, numbers
from training.data.files import IDS, DataFile, RowGroup, no_nulls, open_files, refuse_twice, row_groups
from training.data.splits import TRAIN, VALIDATION, HeldOutRows, SplitCounts, checked_splits, hold_out_last

_logger = logging.getLogger(__name__)
_NO_FEATURES = ("user_id", "item_id", "split", "label")


class Piece(NamedTuple):
    """N rows that follow each other in the files, all splits among them.

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


class Pairs(NamedTuple):
    """Interactions: the ids [N] of their users and items."""

    users: Values
    items: Values


class Interactions:
    """The interactions in a Parquet file or a folder of them, as a stream. Rows count through the files in their order.

    Attributes:
        row_groups: every row group, in file order.
        num_rows: of all splits together.
        id_kinds: user_id, item_id and each categorical feature -> "int64" or "string".
        categorical_features: those of the features asked for that are strings or lists, in the order asked for.
        dense_features: those that are numbers.
        has_label: whether labels were asked for.
        validation_trains: whether the rows of the validation split are rows of the training split.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        held_out: HeldOutRows | None,
        id_kinds: Mapping[str, IdKind],
        dense_features: Sequence[str] = (),
        *,
        has_label: bool = False,
        validation_trains: bool = False,
    ) -> None:
        self.row_groups = tuple(groups)
        self.num_rows = sum(group.num_rows for group in groups)
        self.id_kinds = MappingProxyType(dict(id_kinds))
        self.categorical_features = tuple(name for name in id_kinds if name not in IDS)
        self.dense_features, self.has_label = tuple(dense_features), has_label
        self.validation_trains = validation_trains
        self._held_out = held_out

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
        files = open_files(Path(path))
        used = [file for file in files if not file.lacks]
        if not used:
            seen = "; ".join(f"{file.path.name} ({', '.join(file.types)})" for file in files[:5])
            raise ConfigError(f"data: no Parquet file at {path} has both user_id and item_id; found: {seen or 'none'}")
        for file in files:
            if file.lacks:
                _logger.warning("ignored %s: it has no column %s", file.path, " and no column ".join(file.lacks))
        used = [file for file in used if file.metadata.num_rows] or used  # an empty one may lack columns and types
        refuse_twice(used, (*IDS, "split", "timestamp", *(["label"] if label else []), *features))
        split = _shared_column(used, "split")
        timestamp = None if split else _shared_column(used, "timestamp")
        _check_types(used, [name for name in (split, timestamp, "label" if label else None) if name])
        kinds: dict[str, IdKind] = {name: _shared_kind(used, name, id_kind) for name in IDS}
        dense = []
        for name in _checked_names(features):
            kind = _shared_kind(used, name, feature_kind)
            if kind is None:
                _logger.warning("features: %s has no values in any file; it is left out", name)
            elif kind == "dense":
                dense.append(name)
            else:
                kinds[name] = kind
        groups = list(row_groups(used))
        held_out_rows = None if split else hold_out_last(groups, kinds["user_id"], timestamp)
        return cls(groups, held_out_rows, kinds, dense, has_label=label, validation_trains=validation_trains)

    def scan(self, columns: Sequence[str], groups: Iterable[RowGroup] | None = None) -> Iterator[Piece]:
        """The columns asked for and the splits, in pieces of at most 262,144 rows.

        Args:
            columns: ids, features and "label".
            groups: which row groups to read, and in which order; all of them unless given.

        Raises:
            ConfigError: a null id or label, a label other than 0 and 1, a split other than 0, 1 and 2, a number that is
                infinite in float32, or a damaged file.
        """
        read = [*columns, "split"] if self._held_out is None else list(columns)
        for group in self.row_groups if groups is None else groups:
            first_row = group.first_row
            for batch in group.read(read):
                if self._held_out is None:
                    splits_N = checked_splits(batch, group.path)
                else:
                    splits_N = self._held_out.splits(first_row, len(batch))
                if self.validation_trains:
                    splits_N = np.where(splits_N == VALIDATION, np.int8(TRAIN), splits_N)
                yield self._piece(batch, columns, group.path, splits_N)
                first_row += len(batch)

    def without(self, features: Collection[str]) -> Interactions:
        """The same interactions, some of their categorical features left out."""
        kinds = {name: kind for name, kind in self.id_kinds.items() if name not in features}
        flags = {"has_label": self.has_label, "validation_trains": self.validation_trains}
        return Interactions(self.row_groups, self._held_out, kinds, self.dense_features, **flags)

    def count_splits(self) -> SplitCounts:
        """Rows of each split. An epoch has train // (batch_size * world_size) batches on each rank."""
        if self._held_out is not None:
            num_validation = 0 if self.validation_trains else len(self._held_out.validation_rows)
            num_test = len(self._held_out.test_rows)
            return SplitCounts(self.num_rows - num_validation - num_test, num_validation, num_test)
        counts = np.zeros(3, np.int64)
        for piece in self.scan(()):
            counts += np.bincount(piece.splits_N, minlength=3)
        return SplitCounts(*counts.tolist())

    def _piece(self, batch: Any, columns: Sequence[str], path: Path, splits_N: NDArray[np.int8]) -> Piece:
        piece = Piece(splits_N, {}, {}, {})
        for name in columns:
            column_N = no_nulls(batch, name, path) if name in (*IDS, "label") else batch.column(name)
            if name in self.id_kinds:
                piece.values[name], piece.lengths[name] = bags(column_N, self.id_kinds[name])
                continue
            piece.numbers[name] = numbers_N = numbers(column_N)
            with np.errstate(over="ignore"):
                narrow_N = numbers_N.astype(np.float32)
            wrong = narrow_N[np.isinf(narrow_N) if name != "label" else (numbers_N != 0) & (numbers_N != 1)]
            if len(wrong):
                want = "0 or 1" if name == "label" else "numbers that float32 can hold"
                raise ConfigError(f"{name}: got {wrong[0]} in {path}, want {want}")
        return piece


def held_out(interactions: Interactions, split: int) -> Pairs:
    """The interactions of a split, VALIDATION or TEST, in row order; memory grows with them."""
    parts = [tuple(empty_values(interactions.id_kinds[name]) for name in IDS)]
    for piece in interactions.scan(IDS):
        wanted_N = piece.splits_N == split
        if wanted_N.any():
            parts.append(tuple(piece.values[name].where(wanted_N) for name in IDS))
    return Pairs(*(Values.join(each) for each in zip(*parts, strict=True)))


def _checked_names(features: Sequence[str]) -> Sequence[str]:
    for at, name in enumerate(features):
        if name in _NO_FEATURES or name in features[:at]:
            reason = f"it is {'the label' if name == 'label' else 'read anyway'}" if name in _NO_FEATURES else "twice"
            raise ConfigError(f"features: got {name}, {reason}; want other columns, each once")
    return features


def _check_types(files: Sequence[DataFile], columns: Sequence[str]) -> None:
    """Raises ConfigError for a split, timestamp or label that is missing or of a wrong type."""
    for file in files:
        for name in columns:
            if name not in file.types:
                raise ConfigError(f"{name}: got no such column in {file.path}; it has: {', '.join(file.types)}")
            kind = file.types[name]
            is_number = (pa.types.is_integer(kind) and kind != pa.uint64()) or pa.types.is_floating(kind)
            is_time = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
            fits = {
                "split": is_number and not pa.types.is_floating(kind),
                "timestamp": is_number or is_time,
                "label": is_number or pa.types.is_boolean(kind),
            }
            if not fits[name]:
                want = {
                    "split": "int8, 0 (train), 1 (validation) or 2 (test)",
                    "timestamp": "a number, a date or a timestamp",
                    "label": "a number",
                }[name]
                raise ConfigError(f"{name}: got {kind}, want {want} ({file.path})")


def _shared_kind(files: Sequence[DataFile], column: str, kind_of: Any) -> Any:
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
    if len(kinds) > 1:
        raise ConfigError(f"{column}: got {', '.join(kinds.values())}; want the same in every file")
    return next(iter(kinds), None)


def _shared_column(files: Sequence[DataFile], column: str) -> str | None:
    """The column's name where all files have it, of one type or all integers; None where none has it."""
    shown = {}
    for file in files:
        kind = file.types.get(column)
        alike = "integer" if kind is not None and pa.types.is_integer(kind) else str(kind)
        shown[alike] = f"{kind or 'none'} in {file.path}"
    if len(shown) > 1:
        raise ConfigError(f"{column}: got {', '.join(shown.values())}; want the same in every file")
    return column if column in files[0].types else None
