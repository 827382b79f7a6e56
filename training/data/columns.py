"""Parquet columns to arrays. In: Arrow arrays. Out: Values of ids and categorical features, numbers of dense ones.

What a column is follows from its type (contract 1): numbers are dense, strings and lists categorical. Ids and the
values of lists are integers, which become int64, or strings; strings may be dictionary-encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpq_rec.vocabulary import Vocabulary

T = TypeVar("T")
IdKind: TypeAlias = Literal["int64", "string"]
ARROW_TYPES: dict[IdKind, Any] = {"int64": pa.int64(), "string": pa.large_string()}
_MERGE_ROWS = 1 << 20


class Values(NamedTuple):
    """T ids or categorical values, each distinct one held once.

    Attributes:
        distinct_D: no value twice and no null (Arrow, int64 or large_string).
        codes_T: value t is distinct_D[codes_T[t]] (int32 or int64).
    """

    distinct_D: Any
    codes_T: NDArray[Any]

    @classmethod
    def of(cls, values_T: Any) -> Values:
        """The values of an Arrow array without nulls."""
        encoded = values_T.dictionary_encode()
        return cls(encoded.dictionary, encoded.indices.to_numpy())

    @classmethod
    def join(cls, parts: Sequence[Values], kind: IdKind) -> Values:
        """All parts, which are of one kind, one after the other."""
        distinct = cls.of(pa.concat_arrays([pa.array([], ARROW_TYPES[kind]), *(part.distinct_D for part in parts)]))
        starts = np.cumsum([0, *(len(part.distinct_D) for part in parts)])
        codes = [distinct.codes_T[start:][part.codes_T] for start, part in zip(starts, parts, strict=False)]
        return cls(distinct.distinct_D, np.concatenate([np.empty(0, np.int32), *codes]))

    def where(self, wanted_T: NDArray[np.bool_]) -> Values:
        """Those wanted, and no distinct value that none of them has."""
        if wanted_T.all():
            return self
        codes_T = self.codes_T[wanted_T]
        used_D = np.zeros(len(self.distinct_D), np.bool_)
        used_D[codes_T] = True
        return Values(self.distinct_D.filter(pa.array(used_D)), (np.cumsum(used_D) - 1)[codes_T])

    def rows(self, vocabulary: Vocabulary) -> NDArray[np.int64]:
        """The row of each value [T] (int64), MISSING_ROW where it has none; looks each distinct value up once."""
        if self.distinct_D.type != pa.int64():
            return vocabulary.rows(self.distinct_D.to_pylist())[self.codes_T]
        ids_D = self.distinct_D.to_numpy()
        order_D = np.argsort(ids_D)  # ascending ids are found several times as fast
        rows_D = np.empty(len(ids_D), np.int64)
        rows_D[order_D] = vocabulary.rows(ids_D[order_D])
        return rows_D[self.codes_T]


def merge_stream(parts: Iterable[T], merge: Callable[[list[T]], T], num_rows: Callable[[T], int]) -> T | None:
    """merge(all parts), of which few are held at a time; None of none.

    Args:
        parts: are read once.
        merge: one part of several.
        num_rows: the size of a part.
    """
    held: list[T] = []
    num_new = 0
    for part in parts:
        held.append(part)
        num_new += num_rows(part)
        if num_new >= max(num_rows(held[0]), _MERGE_ROWS):  # as much new as merged already: N log N for the whole
            held, num_new = [merge(held)], 0
    return merge(held) if held else None


def id_kind(column_type: Any) -> IdKind | None:
    """What ids a column of this Arrow type holds; None where it can hold none."""
    plain = _plain(column_type)
    if pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain):
        return "string"
    return "int64" if pa.types.is_integer(plain) and plain != pa.uint64() else None


def feature_kind(column_type: Any) -> IdKind | Literal["dense"] | None:
    """What a feature of this Arrow type is: dense, or categorical with values of a kind; None where it is neither."""
    plain = _plain(column_type)
    if _is_list(plain):
        return id_kind(plain.value_type)
    is_number = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
    return "dense" if is_number or pa.types.is_boolean(plain) else id_kind(plain)


def has_no_values(column_type: Any) -> bool:
    """Whether nothing but nulls can stand in a column of this Arrow type, as writers have it who saw no values."""
    plain = _plain(column_type)
    return bool(pa.types.is_null(plain.value_type if _is_list(plain) else plain))


def to_values(column_N: Any, kind: IdKind) -> tuple[Values, NDArray[np.int64]]:
    """The values of N rows and how many each row has (int64 [N]); nulls, also within lists, are no values."""
    column_N = decoded(column_N)
    if _is_list(column_N.type):
        lengths_N = pc.fill_null(pc.list_value_length(column_N), 0).to_numpy().astype(np.int64)
        values_T = decoded(pc.list_flatten(column_N))
    else:
        lengths_N, values_T = np.ones(len(column_N), np.int64), column_N
    if values_T.null_count:
        rows_T = np.repeat(np.arange(len(lengths_N)), lengths_N)[values_T.is_valid().to_numpy(zero_copy_only=False)]
        lengths_N = np.bincount(rows_T, minlength=len(lengths_N)).astype(np.int64)
        values_T = values_T.drop_null()
    return Values.of(values_T.cast(ARROW_TYPES[kind])), lengths_N


def to_numbers(column_N: Any) -> NDArray[np.float64]:
    """Numbers [N] (float64), integers beyond 2^53 rounded as all are; null is NaN."""
    array: NDArray[Any] = decoded(column_N).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return array


def decoded(column_N: Any) -> Any:
    """The values of a column that may be dictionary-encoded, as they are."""
    return column_N.dictionary_decode() if pa.types.is_dictionary(column_N.type) else column_N


def _plain(column_type: Any) -> Any:
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _is_list(plain: Any) -> bool:
    return pa.types.is_list(plain) or pa.types.is_large_list(plain) or pa.types.is_fixed_size_list(plain)
