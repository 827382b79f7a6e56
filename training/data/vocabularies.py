"""Which id lives in which row. In: interactions and a VocabularyPolicy. Out: the Vocabulary of a column, rows' counts.

Vocabularies come from the training split alone, by streaming; what is held grows with the distinct ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.strings import PackedStrings
from dpq_rec.vocabulary import Int64Vocabulary, ModuloVocabulary, StringVocabulary, Vocabulary
from training.data.columns import Values, empty_values
from training.data.interactions import Interactions
from training.data.splits import TRAIN

_MERGE_IDS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyPolicy:
    """How ids get rows.

    Attributes:
        kind: "exact", a row for each id; "modulo", the hashing trick: row = id mod num_buckets, int64 ids only.
        min_count: exact: ids that occur less often in the training split share rows at the end of the table.
        rare_buckets: exact: how many rows they share.
        num_buckets: modulo: rows of the table.
    """

    kind: Literal["exact", "modulo"] = "exact"
    min_count: int = 1
    rare_buckets: int = 1
    num_buckets: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "modulo"):
            raise ConfigError(f"vocabulary kind: got {self.kind!r}, want exact or modulo")
        for name in ("min_count", "rare_buckets", "num_buckets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, want at least 1")
        if (self.kind == "modulo") != (self.num_buckets is not None):
            raise ConfigError(f"num_buckets: got {self.num_buckets} for {self.kind}; modulo needs it, exact takes none")
        if self.kind == "modulo" and self.min_count > 1:
            raise ConfigError(f"min_count: got {self.min_count} for modulo, want 1: its ids share rows anyway")
        if self.min_count == 1 and self.rare_buckets > 1:
            raise ConfigError(f"rare_buckets: got {self.rare_buckets}, min_count 1; want min_count of 2 or more")


class ColumnVocabulary(NamedTuple):
    """The vocabulary of a column, and how often each of its rows occurs in the training split [V] (int64)."""

    vocabulary: Vocabulary
    counts_V: NDArray[np.int64]

    @property
    def num_embeddings(self) -> int:
        """V, rows of the table."""
        return len(self.counts_V)


class IdCounts(NamedTuple):
    """Distinct ids [U] (Arrow, int64 or large_string) and how often each occurs [U] (int64)."""

    ids_U: Any
    counts_U: NDArray[np.int64]


def count_ids(interactions: Interactions, column: str) -> IdCounts:
    """The distinct ids of a column in the training split and their counts, by falling count, then ascending id."""
    parts = [IdCounts(empty_values(interactions.id_kinds[column]).distinct_D, np.empty(0, np.int64))]
    for values in _training_values(interactions, column):
        parts.append(IdCounts(values.distinct_D, np.bincount(values.codes_T, minlength=len(values.distinct_D))))
        # As much must be new as is merged already: so the whole stays at N log N.
        if sum(len(part.ids_U) for part in parts[1:]) >= max(len(parts[0].ids_U), _MERGE_IDS):
            parts = [_merge_counts(parts)]
    ids_U, counts_U = _merge_counts(parts)
    table = pa.table({"id": ids_U, "count": counts_U})
    order_U = pc.sort_indices(table, [("count", "descending"), ("id", "ascending")])
    return IdCounts(ids_U.take(order_U), counts_U[order_U.to_numpy()])


def build_vocabulary(
    interactions: Interactions, column: str, policy: VocabularyPolicy | None = None
) -> ColumnVocabulary:
    """The vocabulary of an id or a categorical feature.

    exact: the ids of the training split by falling frequency, then ascending id. Those that occur less than min_count
    times are dealt out in turn to rare_buckets rows after the others, to fewer where there are fewer of them. An id
    that is not in the training split has no row.

    Args:
        interactions: the data.
        column: user_id, item_id or a categorical feature.
        policy: exact, one row for each id, unless given.

    Raises:
        ConfigError: the training split has no value of the column; modulo for strings.
    """
    policy = policy or VocabularyPolicy()
    found = _modulo(interactions, column, policy) if policy.num_buckets else _exact(interactions, column, policy)
    if not found.counts_V.any():
        got = f"no value in the training rows among {interactions.num_rows} interactions"
        raise ConfigError(f"{column}: got {got}, want at least one")
    return found


def has_values(interactions: Interactions, column: str) -> bool:
    """Whether the training split has any value of an id or a categorical feature."""
    return any(len(values.codes_T) for values in _training_values(interactions, column))


def find_rows(vocabulary: Vocabulary, values: Values) -> NDArray[np.int64]:
    """The row of each value [T], MISSING_ROW where it has none; asks once for each distinct value."""
    if values.distinct_D.type != pa.int64():
        return vocabulary.rows(values.distinct_D.to_pylist())[values.codes_T]
    ids_D = values.distinct_D.to_numpy()
    order_D = np.argsort(ids_D)  # ascending ids are found several times as fast
    rows_D = np.empty(len(ids_D), np.int64)
    rows_D[order_D] = vocabulary.rows(ids_D[order_D])
    return rows_D[values.codes_T]


def _training_values(interactions: Interactions, column: str) -> Any:
    for piece in interactions.scan((column,)):
        yield piece.values[column].where(np.repeat(piece.splits_N == TRAIN, piece.lengths[column]))


def _exact(interactions: Interactions, column: str, policy: VocabularyPolicy) -> ColumnVocabulary:
    ids_U, counts_U = count_ids(interactions, column)
    num_frequent = int(np.count_nonzero(counts_U >= policy.min_count))
    rows_U = np.arange(len(counts_U))
    rows_U[num_frequent:] = num_frequent + np.arange(len(counts_U) - num_frequent) % policy.rare_buckets
    counts_V = np.bincount(rows_U, counts_U).astype(np.int64)
    order_U = pc.array_sort_indices(ids_U)
    sorted_U, rows_U = ids_U.take(order_U), rows_U[order_U.to_numpy()]
    if interactions.id_kinds[column] == "int64":
        return ColumnVocabulary(Int64Vocabulary(sorted_U.to_numpy(), rows_U.astype(np.uint32)), counts_V)
    return ColumnVocabulary(StringVocabulary(_packed(sorted_U), rows_U.astype(np.uint32)), counts_V)


def _packed(strings_U: Any) -> PackedStrings:
    """Arrow's large_string as it is in memory, without a Python string for each."""
    _, offsets, content = strings_U.buffers()
    offsets_U1 = np.frombuffer(offsets, np.int64)[strings_U.offset : strings_U.offset + len(strings_U) + 1]
    bytes_T = np.frombuffer(content, np.uint8)[offsets_U1[0] : offsets_U1[-1]]
    return PackedStrings(bytes_T, offsets_U1 - offsets_U1[0])


def _modulo(interactions: Interactions, column: str, policy: VocabularyPolicy) -> ColumnVocabulary:
    if interactions.id_kinds[column] != "int64":
        raise ConfigError(
            f"{column}: got strings and the vocabulary kind modulo, want exact: strings have no remainder"
        )
    vocabulary = ModuloVocabulary(policy.num_buckets or 0)
    counts_V = np.zeros(vocabulary.num_embeddings, np.int64)
    for values in _training_values(interactions, column):
        counts_V += np.bincount(find_rows(vocabulary, values), minlength=len(counts_V))
    return ColumnVocabulary(vocabulary, counts_V)


def _merge_counts(parts: Sequence[IdCounts]) -> IdCounts:
    merged = Values.of(pa.concat_arrays([part.ids_U for part in parts]))
    counts_N = np.concatenate([part.counts_U for part in parts])
    counts_U = np.bincount(merged.codes_T, counts_N, minlength=len(merged.distinct_D))
    return IdCounts(merged.distinct_D, counts_U.astype(np.int64))
