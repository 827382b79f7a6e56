"""Which id lives in which row. In: interactions and a VocabularyPolicy. Out: the Vocabulary of a column, rows' counts.

Vocabularies come from the training split alone, by streaming; what is held grows with the distinct ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.strings import PackedStrings
from dpq_rec.vocabulary import Int64Vocabulary, ModuloVocabulary, StringVocabulary, Vocabulary
from training.data.columns import ARROW_TYPES, Values, merge_stream
from training.data.interactions import TRAIN, Interactions

_Counts: TypeAlias = tuple[Any, NDArray[np.int64]]
ColumnVocabulary: TypeAlias = tuple[Vocabulary, NDArray[np.int64]]  # and how often each row occurs [V]


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


def count_ids(interactions: Interactions, column: str) -> _Counts:
    """The distinct ids of a column in the training split [U] (Arrow) and their counts [U] (int64).

    They come by falling count, then ascending id.
    """

    def merge(parts: list[_Counts]) -> _Counts:
        """Each id once, with the sum of its counts."""
        merged = Values.of(pa.concat_arrays([ids_U for ids_U, _ in parts]))
        counts_N = np.concatenate([counts_U for _, counts_U in parts])
        counts_U = np.bincount(merged.codes_T, counts_N, minlength=len(merged.distinct_D))
        return merged.distinct_D, counts_U.astype(np.int64)

    counts = (
        (values.distinct_D, np.bincount(values.codes_T, minlength=len(values.distinct_D)))
        for values in _training_values(interactions, column)
    )
    found = merge_stream(counts, merge, lambda part: len(part[1]))
    ids_U, counts_U = found or (pa.array([], ARROW_TYPES[interactions.id_kinds[column]]), np.empty(0, np.int64))
    table = pa.table({"id": ids_U, "count": counts_U})
    order_U = pc.sort_indices(table, [("count", "descending"), ("id", "ascending")])
    return ids_U.take(order_U), counts_U[order_U.to_numpy()]


def build_vocabulary(
    interactions: Interactions, column: str, policy: VocabularyPolicy | None = None
) -> ColumnVocabulary:
    """The vocabulary of an id or a categorical feature, and how often each row occurs in training [V] (int64).

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
    build = _modulo if policy.num_buckets else _exact
    vocabulary, counts_V = build(interactions, column, policy)
    if not counts_V.any():
        got = f"no value in the training rows among {interactions.num_rows} interactions"
        raise ConfigError(f"{column}: got {got}, want at least one")
    return vocabulary, counts_V


def has_values(interactions: Interactions, column: str) -> bool:
    """Whether the training split has any value of an id or a categorical feature."""
    return any(len(values.codes_T) for values in _training_values(interactions, column))


def _training_values(interactions: Interactions, column: str) -> Iterator[Values]:
    return (piece.values[column] for piece in interactions.scan((column,), splits=(TRAIN,)))


def _exact(interactions: Interactions, column: str, policy: VocabularyPolicy) -> ColumnVocabulary:
    ids_U, counts_U = count_ids(interactions, column)
    num_frequent = int(np.count_nonzero(counts_U >= policy.min_count))
    rows_U = np.arange(len(counts_U))
    rows_U[num_frequent:] = num_frequent + np.arange(len(counts_U) - num_frequent) % policy.rare_buckets
    counts_V = np.bincount(rows_U, counts_U).astype(np.int64)
    order_U = pc.array_sort_indices(ids_U)
    sorted_U, rows_U = ids_U.take(order_U), rows_U[order_U.to_numpy()]
    if interactions.id_kinds[column] == "int64":
        return Int64Vocabulary(sorted_U.to_numpy(), rows_U.astype(np.uint32)), counts_V
    return StringVocabulary(_packed(sorted_U), rows_U.astype(np.uint32)), counts_V


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
        counts_V += np.bincount(values.rows(vocabulary), minlength=len(counts_V))
    return vocabulary, counts_V
