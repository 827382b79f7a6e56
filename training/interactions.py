"""Interactions to batches of rows. In: Parquet files of user_id and item_id (contract 1). Out: Batch(user_rows_B, ...).

Files are streamed and may be larger than memory. What is held grows with the users (only where no column names the
split) and with the distinct ids (vocabularies), never with the interactions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.vocabulary import Vocabulary

TRAIN, VALIDATION, TEST = 0, 1, 2

_IdCounts: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]
_logger = logging.getLogger(__name__)
_IDS = ("user_id", "item_id")
_PIECE_ROWS = 1 << 20  # rows read at a time
_WINDOW_ROWS = 1 << 22  # rows mixed with each other: their ids take 64 MB


class RowGroup(NamedTuple):
    """One row group of a file; `first_row` counts through all files."""

    path: Path
    metadata: Any
    position: int
    first_row: int
    num_rows: int


class SplitCounts(NamedTuple):
    """How many rows are in each split."""

    train: int
    validation: int
    test: int


class Pairs(NamedTuple):
    """Interactions: the ids [N] (int64) of their users and items."""

    user_ids_N: NDArray[np.int64]
    item_ids_N: NDArray[np.int64]


class Batch(NamedTuple):
    """The rows [B] (int64) of users and of the items they chose."""

    user_rows_B: NDArray[np.int64]
    item_rows_B: NDArray[np.int64]


class Interactions:
    """The interactions in a Parquet file or a folder of them, as a stream. Rows count through the files in their order.

    Attributes:
        row_groups: every row group, in file order.
        num_rows: of all splits together.
    """

    def __init__(self, row_groups: Sequence[RowGroup], held_out: _HeldOutRows | None) -> None:
        self.row_groups = tuple(row_groups)
        self.num_rows = sum(group.num_rows for group in row_groups)
        self._held_out = held_out

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Interactions:
        """Look at the files' columns; where none is named `split`, stream them once to find each user's last items.

        A folder is searched with its subfolders for *.parquet, names that start with . or _ left out. The order of
        their paths is the order of the files, which is what "row order is chronological" rests on. Files without
        user_id or item_id are ignored and named in the log. Without `split`, a user's last item (by `timestamp`, equal
        ones in row order; by row order where there is none) is the test and the one before it the validation. The first
        item of a user always trains: of two, the other is the test; a single one is not held out.

        Raises:
            ConfigError: nothing at the path, no file with interactions, a file that is no Parquet, columns of a wrong
                type or not alike in all files. Nulls are found as they are read.
        """
        files = [_File.open(file) for file in _parquet_files(Path(path))]
        used = [file for file in files if not file.lacks]
        if not used:
            seen = "; ".join(f"{file.path.name} ({', '.join(file.types)})" for file in files[:5])
            raise ConfigError(f"data: no Parquet file at {path} has both user_id and item_id; found: {seen or 'none'}")
        for file in files:
            if file.lacks:
                _logger.warning("ignored %s: it has no column %s", file.path, " and no column ".join(file.lacks))
        split = _shared_column(used, "split")
        timestamp = None if split else _shared_column(used, "timestamp")
        for file in used:
            for column in filter(None, (*_IDS, split, timestamp)):
                file.check(column)
        groups = list(_row_groups(used))
        return cls(groups, None if split else _hold_out_last(groups, timestamp))

    def scan(
        self, columns: Sequence[str], row_groups: Iterable[RowGroup] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The columns asked for and `split` (int8 [N]), in pieces of at most 1,048,576 rows.

        Args:
            columns: names besides `split`, at least one; ids come as int64.
            row_groups: which to read, and in which order; all of them unless given.

        Raises:
            ConfigError: a null, a split other than 0, 1 and 2, or a damaged file.
        """
        for group in self.row_groups if row_groups is None else row_groups:
            first_row = group.first_row
            for piece in _read(group, [*columns, "split"] if self._held_out is None else list(columns)):
                if self._held_out is not None:
                    piece["split"] = self._held_out.splits(first_row, len(piece[columns[0]]))
                first_row += len(piece["split"])
                yield piece

    def count_splits(self) -> SplitCounts:
        """Rows of each split. An epoch has train // (batch_size * world_size) batches on each rank."""
        counts = np.zeros(3, np.int64)
        for piece in self.scan(("user_id",)):
            counts += np.bincount(piece["split"], minlength=3)
        return SplitCounts(*counts.tolist())


def count_ids(interactions: Interactions, column: str) -> _IdCounts:
    """The distinct ids [V] of a column in the training split, ascending, and how often each occurs [V] (both int64)."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for piece in interactions.scan((column,)):
        parts.append(np.unique(piece[column][piece["split"] == TRAIN], return_counts=True))
        # As much must be new as is merged already: so the whole stays at N log N.
        if sum(len(ids_V) for ids_V, _ in parts[1:]) >= max(len(parts[0][0]), _PIECE_ROWS):
            parts = [_merge_counts(parts)]
    return _merge_counts(parts)


def _merge_counts(parts: Sequence[_IdCounts]) -> _IdCounts:
    every_N, counts_N = map(np.concatenate, zip(*parts, strict=True))
    ids_V, at_N = np.unique(every_N, return_inverse=True)
    return ids_V, np.bincount(at_N, counts_N, minlength=len(ids_V)).astype(np.int64)


def build_vocabulary(interactions: Interactions, column: str) -> NDArray[np.int64]:
    """The ids of a column in the training split: row v holds ids_V[v] (int64), falling frequency, then ascending id.

    Raises:
        ConfigError: there are no training rows.
    """
    ids_V, counts_V = count_ids(interactions, column)
    if not len(ids_V):
        raise ConfigError(f"data: got no training rows among {interactions.num_rows} interactions, want at least one")
    return ids_V[np.argsort(-counts_V, kind="stable")]


def train_batches(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    window_rows: int = _WINDOW_ROWS,
) -> Iterator[Batch]:
    """This rank's batches of an epoch: over all ranks every training row once, but for the remainder.

    All ranks get equally many batches, all of batch_size: fewer than world_size * batch_size rows, others in each
    epoch, are dropped at its end. The order depends on data, seed and epoch alone: row groups are read in shuffled
    order, and rows are mixed within windows of several row groups. Data that fit into a window are mixed completely.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id.
        batch_size: B, of one rank.
        rank: of world_size ranks; takes every world_size-th batch.
        world_size: number of ranks.
        seed: 0 or more, the same on all ranks.
        epoch: 0 or more.
        shuffle: False gives the rows in file order, and drops the last ones.
        window_rows: rows held at a time; each takes 50 bytes or so.

    Raises:
        ConfigError: too few rows for one batch on each rank, or an id that its vocabulary does not know.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = list(interactions.row_groups)
    if shuffle:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    rest, step_rows, num_rows = _join([]), batch_size * world_size, 0
    for window in _windows(interactions, groups, window_rows):
        num_rows += len(window.user_ids_N)
        window = _join([rest, window])
        order_N = np.arange(len(window.user_ids_N), dtype=np.int32)
        if shuffle:
            rng.shuffle(order_N)
        whole = len(order_N) // step_rows * step_rows
        mine_N = order_N[:whole].reshape(-1, world_size, batch_size)[:, rank].ravel()
        rest = Pairs(*(ids_N[order_N[whole:]] for ids_N in window))
        users_N = _known_rows(vocabularies["user_id"], window.user_ids_N[mine_N], "user_id")
        items_N = _known_rows(vocabularies["item_id"], window.item_ids_N[mine_N], "item_id")
        del window, order_N
        for at in range(0, len(mine_N), batch_size):
            yield Batch(users_N[at : at + batch_size], items_N[at : at + batch_size])
    if num_rows < step_rows:
        got = f"{batch_size} on each of {world_size} rank(s), {num_rows} training rows"
        raise ConfigError(f"batch_size: got {got}; want at most {num_rows // world_size}")


def held_out(interactions: Interactions, split: int) -> Pairs:
    """The interactions of a split, VALIDATION or TEST, in row order; memory grows with them."""
    return _join(list(_pairs(interactions, split)))


def find_rows(vocabulary: Vocabulary, ids_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """vocabulary.rows(ids_N), asking once for each distinct id, in ascending order: several times as fast."""
    encoded = pa.array(ids_N).dictionary_encode()
    ids_D = encoded.dictionary.to_numpy()
    order_D = np.argsort(ids_D)
    rows_D = np.empty(len(ids_D), np.int64)
    rows_D[order_D] = vocabulary.rows(ids_D[order_D])
    return rows_D[encoded.indices.to_numpy()]


def _known_rows(vocabulary: Vocabulary, ids_N: NDArray[np.int64], column: str) -> NDArray[np.int64]:
    rows_N = find_rows(vocabulary, ids_N)
    unknown = ids_N[rows_N == MISSING_ROW]
    if len(unknown):
        got = f"{len(unknown)} training rows with ids that are not in the vocabulary, {unknown[0]} for one"
        raise ConfigError(f"{column}: got {got}; want the vocabulary that was built from these data")
    return rows_N


def _windows(interactions: Interactions, groups: Sequence[RowGroup], window_rows: int) -> Iterator[Pairs]:
    """Training rows in stretches of at least window_rows, the last one shorter."""
    parts: list[Pairs] = []
    for part in _pairs(interactions, TRAIN, groups):
        parts.append(part)
        if sum(len(each.user_ids_N) for each in parts) >= window_rows:
            parts = [_join(parts)]
            yield parts.pop()
    if parts:
        yield _join(parts)


def _pairs(interactions: Interactions, split: int, groups: Sequence[RowGroup] | None = None) -> Iterator[Pairs]:
    for piece in interactions.scan(_IDS, groups):
        wanted_N = piece["split"] == split
        yield Pairs(piece["user_id"][wanted_N], piece["item_id"][wanted_N])


def _join(parts: Sequence[Pairs]) -> Pairs:
    users, items = zip(Pairs(np.empty(0, np.int64), np.empty(0, np.int64)), *parts, strict=True)
    return Pairs(np.concatenate(users), np.concatenate(items))


class _HeldOutRows(NamedTuple):
    """The rows that the default split holds out, ascending (int64)."""

    validation_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]

    def splits(self, first_row: int, num_rows: int) -> NDArray[np.int8]:
        """The split of each of num_rows rows."""
        splits_N = np.full(num_rows, TRAIN, np.int8)
        for split, rows in ((VALIDATION, self.validation_rows), (TEST, self.test_rows)):
            begin, end = np.searchsorted(rows, [first_row, first_row + num_rows])
            splits_N[rows[begin:end] - first_row] = split
        return splits_N


class _Latest(NamedTuple):
    """Rows of users with their times; after a merge the last three of each user, by user and time."""

    users_N: NDArray[np.int64]
    times_N: NDArray[Any]
    rows_N: NDArray[np.int64]


def _hold_out_last(groups: Sequence[RowGroup], timestamp: str | None) -> _HeldOutRows:
    """The default split, in one pass: three rows of each user say which is its last and how many it has."""
    parts: list[_Latest] = []
    for group in groups:
        first_row = group.first_row
        for piece in _read(group, ["user_id", *([timestamp] if timestamp else [])]):
            rows_N = np.arange(first_row, first_row + len(piece["user_id"]))
            parts.append(_Latest(piece["user_id"], piece[timestamp] if timestamp else rows_N, rows_N))
            first_row += len(rows_N)
            if sum(len(part.rows_N) for part in parts[1:]) >= max(len(parts[0].rows_N), _PIECE_ROWS):
                parts = [_merge_latest(parts)]
    if not parts:
        return _HeldOutRows(np.empty(0, np.int64), np.empty(0, np.int64))
    users_N, _, rows_N = _merge_latest(parts)
    as_before = np.zeros(len(users_N) + 1, np.bool_)
    as_before[1:-1] = users_N[1:] == users_N[:-1]
    is_later_N, is_last_N = as_before[:-1], ~as_before[1:]
    is_second_last_N = np.append(is_last_N[1:], np.False_) & ~is_last_N
    return _HeldOutRows(np.sort(rows_N[is_second_last_N & is_later_N]), np.sort(rows_N[is_last_N & is_later_N]))


def _merge_latest(parts: Sequence[_Latest]) -> _Latest:
    users_N, times_N, rows_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    order_N = np.lexsort((times_N, users_N))  # stable: equal times stay in row order
    users_N = users_N[order_N]
    keep_N = np.ones(len(users_N), np.bool_)
    keep_N[:-3] = users_N[:-3] != users_N[3:]
    return _Latest(users_N[keep_N], times_N[order_N][keep_N], rows_N[order_N][keep_N])


class _File(NamedTuple):
    """A Parquet file's path, footer and column types by name, and which of user_id and item_id it lacks."""

    path: Path
    metadata: Any
    types: dict[str, Any]
    lacks: list[str]

    @classmethod
    def open(cls, path: Path) -> _File:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"data: {path} cannot be read as Parquet: {error}") from error
        schema = metadata.schema.to_arrow_schema()
        types = dict(zip(schema.names, schema.types, strict=True))
        return cls(path, metadata, types, [name for name in _IDS if name not in types])

    def check(self, column: str) -> None:
        """Raises ConfigError for a column of a wrong type."""
        kind = self.types[column]
        is_integer = pa.types.is_integer(kind) and kind != pa.uint64()
        is_time = pa.types.is_floating(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        if not is_integer and not (column == "timestamp" and is_time):
            want = {"split": "int8", "timestamp": "a number, a date or a timestamp"}.get(column, "int64")
            raise ConfigError(f"{column}: got {kind}, want {want} ({self.path})")


def _parquet_files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"data: {path} does not exist; want a Parquet file or a folder of them")
    if path.is_file():
        return [path]
    found = path.rglob("*.parquet")
    return sorted(file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts))


def _shared_column(files: Sequence[_File], column: str) -> str | None:
    """The column's name where all files have it, of one type; None where none has it."""
    types = {str(file.types.get(column, "none")): file.path for file in files}
    if len(types) > 1:
        got = ", ".join(f"{kind} in {path}" for kind, path in types.items())
        raise ConfigError(f"{column}: got {got}; want the same in every file")
    return column if column in files[0].types else None


def _row_groups(files: Sequence[_File]) -> Iterator[RowGroup]:
    first_row = 0
    for file in files:
        for position in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(position).num_rows
            yield RowGroup(file.path, file.metadata, position, first_row, num_rows)
            first_row += num_rows


def _read(group: RowGroup, columns: list[str]) -> Iterator[dict[str, NDArray[Any]]]:
    try:
        with pq.ParquetFile(group.path, metadata=group.metadata) as file:
            num_rows = max(1, min(_PIECE_ROWS, group.num_rows))
            for batch in file.iter_batches(num_rows, [group.position], columns, use_threads=False):
                yield {name: _numpy_column(batch.column(name), name, group.path) for name in columns}
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data: {group.path} cannot be read: {error}") from error


def _numpy_column(values: Any, name: str, path: Path) -> NDArray[Any]:
    """Arrow to numpy, ids as int64, checked."""
    array: NDArray[Any] = (values.cast(pa.int64()) if name in _IDS else values).to_numpy(zero_copy_only=False)
    num_nulls = values.null_count or (int(np.isnan(array).sum()) if array.dtype.kind == "f" else 0)
    if num_nulls:
        raise ConfigError(f"{name}: got {num_nulls} nulls within {len(array)} rows of {path}, want none")
    if name != "split":
        return array
    wrong = array[(array < TRAIN) | (array > TEST)]
    if len(wrong):
        raise ConfigError(f"split: got {wrong[0]} in {path}, want 0 (train), 1 (validation) or 2 (test)")
    return array.astype(np.int8, copy=False)
