"""Callers' ids to arrays. In: lists, arrays of any library. Out: int64 [N], or N str.

Taken are lists, tuples and ranges; arrays of numpy, torch, pandas, polars and pyarrow, with any index, on any device
and with any storage of strings. Floats, booleans, bytes, masked and null elements are refused, never converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import IdTypeError

_INT64 = np.dtype(np.int64)
_INTEGERS, _STRINGS = "64-bit integers", "strings"
_MOST = 2**63 - 1


def int64_ids(ids: Any) -> NDArray[np.int64]:
    """Ids as int64 [N], without a copy where they are int64 already.

    Raises:
        IdTypeError: not a flat list of integers that fit 64 bits.
    """
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.ndim == 1 and ids.flags.c_contiguous:
        return ids
    is_list = isinstance(ids, list | tuple)
    if is_list and {int}.issuperset(map(type, ids)):
        array = np.asarray(ids)
        if array.dtype is _INT64:
            return array
    elif is_list:  # numpy would take [True, 2] for integers
        _check_integers(ids, arrays=True)
    array = _flat_array(ids, _INTEGERS)
    if array.dtype.kind == "O" or (array.dtype.kind == "f" and is_list):  # as numpy holds integers beyond 64 bits
        held = ids if is_list else array.tolist()
        _check_integers(held, arrays=False)
        array = np.array(list(map(int, held)), np.int64)
    if array.dtype.kind not in "iu" and array.size:
        raise _refused(_kind_of(array), _INTEGERS)
    if array.dtype == np.uint64 and array.size and array.max() > _MOST:
        raise _refused(f"{array.max()} at position {array.argmax()}", f"{_INTEGERS}, at most {_MOST}")
    return np.ascontiguousarray(array, np.int64)


def string_ids(ids: Any) -> Sequence[Any]:
    """Ids as a list or a tuple; the elements of one are looked at where they are read.

    Raises:
        IdTypeError: not a flat list of strings.
    """
    if isinstance(ids, list | tuple):
        return ids
    array = _flat_array(ids, _STRINGS)
    if array.dtype.kind not in "UOT" and array.size:
        raise _refused(_kind_of(array), _STRINGS)
    held: list[Any] = array.tolist()
    return held


def ids_of_kind(kind: str, ids: Any) -> NDArray[np.int64] | Sequence[Any]:
    """`string_ids` or `int64_ids`, as the kind of vocabulary wants it."""
    return string_ids(ids) if kind == "string" else int64_ids(ids)


def ids_of_any_kind(ids: Any) -> NDArray[np.int64] | Sequence[str]:
    """Ids for a vocabulary of an unknown kind: strings where all are (or there are none), else integers.

    Raises:
        IdTypeError: neither strings nor a flat list of 64-bit integers.
    """
    is_list = isinstance(ids, list | tuple)
    if not is_list and getattr(ids, "dtype", None) is _INT64:
        return int64_ids(ids)
    if not is_list and _flat_array(ids, f"{_INTEGERS} or {_STRINGS}").dtype.kind not in "UOT":
        return int64_ids(ids)
    held = string_ids(ids)
    return held if all(isinstance(each, str) for each in held) else int64_ids(ids)


def plain_array(held: Any) -> NDArray[Any]:
    """A numpy array with the elements of a list or of any library's array.

    Raises:
        ValueError: an element is masked, or it is no array.
    """
    try:
        if hasattr(held, "detach") and hasattr(held, "cpu"):  # torch's: it may have gradients, or be on another device
            held = held.detach().cpu()
        array = np.asarray(held)
    except Exception as error:  # whatever the library of the array raises; lists of different lengths
        raise ValueError(f"what is no array: {error}") from error
    if isinstance(held, np.ma.MaskedArray) and np.ma.getmaskarray(held).any():
        raise ValueError(f"nothing at position {np.ma.getmaskarray(held).argmax()}, which is masked")
    return array


def _flat_array(ids: Any, wanted: str) -> NDArray[Any]:
    if isinstance(ids, bytes | bytearray) or (isinstance(ids, memoryview) and ids.format in ("B", "c")):
        raise _refused(type(ids).__name__, f"{wanted}; `lookup_bytes` takes bytes")
    try:
        array = plain_array(ids)
    except ValueError as error:
        raise _refused(str(error), wanted) from error
    if array.ndim == 0 or hasattr(ids, "as_py"):  # pyarrow's way to say that it is one thing
        raise _refused(f"one {type(ids).__name__}", wanted)
    if array.ndim != 1:
        raise _refused(f"an array of shape {array.shape}", wanted)
    return array


def _check_integers(ids: Sequence[Any], *, arrays: bool) -> None:
    """Refuse the first element that is no 64-bit integer; arrays, as of one number each, may be left to numpy."""
    if ids and all(isinstance(each, str) for each in ids):
        raise _refused("strings", _INTEGERS)
    for position, each in enumerate(ids):
        is_array = arrays and hasattr(each, "shape") and not isinstance(each, np.generic)
        if isinstance(each, bool) or not (isinstance(each, int | np.integer) or is_array):
            raise _refused(f"{type(each).__name__} at position {position}", _INTEGERS)
        if not is_array and not -_MOST - 1 <= int(each) <= _MOST:
            raise _refused(f"{each} at position {position}", _INTEGERS)


def _kind_of(array: NDArray[Any]) -> str:
    if array.dtype.kind == "f" and np.isnan(array).any():
        return f"{array.dtype} with nothing, or NaN, at position {np.isnan(array).argmax()}"
    names = {"U": "strings", "T": "strings", "S": "bytes, which are of no encoding", "b": "booleans"}
    return names.get(array.dtype.kind, f"values of type {array.dtype}")


def _refused(got: str, wanted: str) -> IdTypeError:
    return IdTypeError(f"ids: got {got}, want a flat list or array of {wanted}")
