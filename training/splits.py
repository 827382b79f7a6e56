"""Which rows train and which are held out. In: row groups. Out: HeldOutRows, where no column names the split.

What is held grows with the users, never with the interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.columns import IdKind, Values, bags
from training.files import RowGroup, no_nulls

TRAIN, VALIDATION, TEST = 0, 1, 2

_MERGE_ROWS = 1 << 20


class SplitCounts(NamedTuple):
    """How many rows are in each split."""

    train: int
    validation: int
    test: int


class HeldOutRows(NamedTuple):
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


def hold_out_last(groups: Sequence[RowGroup], user_kind: IdKind, timestamp: str | None) -> HeldOutRows:
    """The default split, in one pass: three rows of each user say which is its last and how many it has.

    Raises:
        ConfigError: a null in user_id or the timestamps, or a damaged file.
    """
    parts: list[_Latest] = []
    for group in groups:
        first_row = group.first_row
        for batch in group.read(["user_id", *([timestamp] if timestamp else [])]):
            users, _ = bags(no_nulls(batch, "user_id", group.path), user_kind)
            rows_N = np.arange(first_row, first_row + len(batch))
            times_N = no_nulls(batch, timestamp, group.path).to_numpy(zero_copy_only=False) if timestamp else rows_N
            parts.append(_Latest(users, times_N, rows_N))
            first_row += len(rows_N)
            # As much must be new as is merged already: so the whole stays at N log N.
            if sum(len(part.rows_N) for part in parts[1:]) >= max(len(parts[0].rows_N), _MERGE_ROWS):
                parts = [_merge_latest(parts)]
    if not parts:
        return HeldOutRows(np.empty(0, np.int64), np.empty(0, np.int64))
    users, _, rows_N = _merge_latest(parts)
    as_before = np.zeros(len(rows_N) + 1, np.bool_)
    as_before[1:-1] = users.codes_T[1:] == users.codes_T[:-1]
    is_later_N, is_last_N = as_before[:-1], ~as_before[1:]
    is_second_last_N = np.append(is_last_N[1:], np.False_) & ~is_last_N
    return HeldOutRows(np.sort(rows_N[is_second_last_N & is_later_N]), np.sort(rows_N[is_last_N & is_later_N]))


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


class _Latest(NamedTuple):
    """Rows of users with their times; after a merge the last three of each user, by user and time."""

    users: Values
    times_N: NDArray[Any]
    rows_N: NDArray[np.int64]


def _merge_latest(parts: Sequence[_Latest]) -> _Latest:
    users = Values.join([part.users for part in parts])
    times_N, rows_N = np.concatenate([p.times_N for p in parts]), np.concatenate([p.rows_N for p in parts])
    order_N = np.lexsort((times_N, users.codes_T))  # stable: equal times stay in row order
    codes_N = users.codes_T[order_N]
    keep_N = np.ones(len(codes_N), np.bool_)
    keep_N[:-3] = codes_N[:-3] != codes_N[3:]
    return _Latest(Values(users.distinct_D, codes_N[keep_N]), times_N[order_N][keep_N], rows_N[order_N][keep_N])
