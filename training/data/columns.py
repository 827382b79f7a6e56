"""Parquet columns to arrays. In: Arrow arrays. Out: Values of ids and categorical features, numbers of dense ones.

What a column is follows from its type (contract 1): numbers are dense, strings and lists categorical. Ids and the
values of lists are integers, which become int64, or strings; strings may be dictionary-encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

IdKind: TypeAlias = Literal["int64", "string"]
_ARROW_TYPES = {"int64": pa.int64(), "string": pa.large_string()}


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
    def join(cls, parts: Sequence[Values]) -> Values:
        """All parts, one after the other; at least one."""
        distinct = cls.of(pa.concat_arrays([part.distinct_D for part in parts]))
        starts = np.cumsum([0, *(len(part.distinct_D) for part in parts)])
        codes = [distinct.codes_T[start:][part.codes_T] for start, part in zip(starts, parts, strict=False)]
        return cls(distinct.distinct_D, np.concatenate(codes))

    def where(self, wanted_T: NDArray[np.bool_]) -> Values:
        """Those wanted, and no distinct value that none of them has."""
        if wanted_T.all():
            return self
        codes_T = self.codes_T[wanted_T]
        used_D = np.zeros(len(self.distinct_D), np.bool_)
        used_D[codes_T] = True
        return Values(self.distinct_D.filter(pa.array(used_D)), (np.cumsum(used_D) - 1)[codes_T])

    def sorted(self) -> Values:
        """The same values, the distinct ones ascending: strings by their code points."""
        order_D = pc.array_sort_indices(self.distinct_D).to_numpy()
        places_D = np.empty(len(order_D), np.int64)
        places_D[order_D] = np.arange(len(order_D))
        return Values(self.distinct_D.take(pa.array(order_D)), places_D[self.codes_T])

    def positions(self, ids_U: Any) -> NDArray[np.int64]:
        """Where each value stands among distinct ids (Arrow, of the same type), -1 where it does not (int64 [T])."""
        return pc.fill_null(pc.index_in(self.distinct_D, ids_U), -1).to_numpy().astype(np.int64)[self.codes_T]


def id_array(ids_U: Any, kind: IdKind) -> Any:
    """Ids as an Arrow array of int64 or large_string."""
    return pa.array(ids_U, _ARROW_TYPES[kind])


def empty_values(kind: IdKind) -> Values:
    """No values."""
    return Values.of(id_array([], kind))


def id_kind(column_type: Any) -> IdKind | None:
    """What ids a column of this Arrow type holds; None where it can hold none."""
    plain = _plain(column_type)
    if _is_string(plain):
        return "string"
    return "int64" if pa.types.is_integer(plain) and plain != pa.uint64() else None


def feature_kind(column_type: Any) -> IdKind | Literal["dense"] | None:
    """What a feature of this Arrow type is: dense, or categorical with values of a kind; None where it is neither."""
    plain = _plain(column_type)
    if _is_list(plain):
        return id_kind(plain.value_type)
    is_number = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
    if is_number or pa.types.is_boolean(plain):
        return "dense"
    return id_kind(plain)


def has_no_values(column_type: Any) -> bool:
    """Whether nothing but nulls can stand in a column of this Arrow type, as writers have it who saw no values."""
    plain = _plain(column_type)
    return bool(pa.types.is_null(plain.value_type if _is_list(plain) else plain))


def bags(column_N: Any, kind: IdKind) -> tuple[Values, NDArray[np.int64]]:
    """The values of N rows and how many each row has (int64 [N]); nulls, also within lists, are no values."""
    column_N = _decoded(column_N)
    valid_N = column_N.is_valid().to_numpy(zero_copy_only=False)
    if _is_list(column_N.type):
        counts_N = pc.fill_null(pc.list_value_length(column_N), 0).to_numpy().astype(np.int64)
        lengths_N = np.where(valid_N, counts_N, 0)
        values_T = _decoded(pc.list_flatten(column_N))
    else:
        lengths_N, values_T = np.ones(len(column_N), np.int64), column_N
    if values_T.null_count:
        valid_T = values_T.is_valid().to_numpy(zero_copy_only=False)
        rows_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
        lengths_N = np.bincount(rows_T[valid_T], minlength=len(lengths_N)).astype(np.int64)
        values_T = values_T.drop_null()
    return Values.of(values_T.cast(_ARROW_TYPES[kind])), lengths_N


def numbers(column_N: Any) -> NDArray[np.float64]:
    """Numbers [N] (float64), integers beyond 2^53 rounded as all are; null is NaN."""
    array: NDArray[Any] = _decoded(column_N).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return array


def _plain(column_type: Any) -> Any:
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _decoded(column_N: Any) -> Any:
    return column_N.dictionary_decode() if pa.types.is_dictionary(column_N.type) else column_N


def _is_string(plain: Any) -> bool:
    return pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)


def _is_list(plain: Any) -> bool:
    return pa.types.is_list(plain) or pa.types.is_large_list(plain) or pa.types.is_fixed_size_list(plain)
