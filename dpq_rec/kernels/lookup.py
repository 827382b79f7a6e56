"""The hot loops from ids to vectors. In: ids of a sorted list, in an array or as bytes. Out: vectors, or a reply.

They find and decode in one go: codes are on their way from memory while the next ids are searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import dpq_rec.kernels._native as _native
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.kernels import MISSING_ROW, Vectors, check_damage, native_of
from dpq_rec.kernels.arguments import call, new_array
from dpq_rec.kernels.ids import check_found, find_integer_rows

_NO_POSITIONS = np.empty(0, np.uint32)
_NUMBER_BYTES = {"float32": 4, "float16": 2, "codes": 0}


def lookup_integers(
    ids_N: NDArray[np.int64],
    known: _native.Integers,
    stored: Vectors,
    *,
    dtype: DTypeLike = np.float32,
    num_threads: int = 1,
) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    """`find_integer_rows` and `decode` in one.

    Args:
        ids_N: what is looked for (int64), contiguous.
        known: of `sorted_integers`.
        stored: the vectors of all rows.
        dtype: as in `decode`.
        num_threads: likewise.

    Returns:
        vectors_NE, zeros where an id is not in the list; and the positions where that is so, ascending (uint32).

    Raises:
        DamagedArtifactError: as in both.
    """
    vectors = native_of(stored)
    out_NE = new_array(ids_N, vectors.dim, dtype=dtype)
    rows_N = np.empty(len(out_NE), np.int64)
    num_missing, bad_id_at, *bad_at = call(_native.lookup_integers, known, vectors, ids_N, rows_N, out_NE, num_threads)
    check_found(ids_N, bad_id_at)
    check_damage(stored, rows_N, bad_at)
    return out_NE, (rows_N == MISSING_ROW).nonzero()[0].astype(np.uint32) if num_missing else _NO_POSITIONS


def lookup_bytes(asked: bytes, known: _native.Integers, stored: Vectors, *, form: str) -> tuple[bytes, int]:
    """`lookup_integers` or, with the form "codes", `find_integer_rows` and `copy_codes`, from bytes to bytes.

    The numbers are as this machine has them.

    Args:
        asked: what is looked for (int64).
        known: of `sorted_integers`.
        stored: the vectors of all rows; coded where codes are wanted.
        form: "float32", "float16" or "codes".

    Returns:
        A reply: rows, then the positions of those that are missing (uint32), then, of codes that have tiers, the tier
        of each. And how many are missing.

    Raises:
        DamagedArtifactError: as there.
    """
    if form not in _NUMBER_BYTES:
        raise ConfigError(f"form: got {form!r}, want {', '.join(_NUMBER_BYTES)}")
    number_bytes = _NUMBER_BYTES[form]
    reply, num_missing, *bad_at = call(_native.lookup_bytes, known, native_of(stored), asked, number_bytes)
    if max(bad_at) >= 0:
        ids_N, bad_id_at, at = np.frombuffer(asked, np.int64), bad_at[0], max(bad_at[1:])
        check_found(ids_N, bad_id_at)
        row_1 = find_integer_rows(ids_N[at : at + 1], known)
        check_damage(stored, row_1, [min(position, 0) for position in bad_at[1:]])
        raise DamagedArtifactError(f"id {ids_N[at]}: its row was damaged, and is no more: the file changed meanwhile")
    return reply, num_missing
