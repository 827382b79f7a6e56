"""The hot loops that find ids, and that go on from there. In: ids; a vocabulary's arrays. Out: rows, vectors, bytes.

As in `dpq_rec.kernels`, arguments of another type or size raise ConfigError.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.errors import ConfigError, DamagedArtifactError, IdTypeError
from dpq_rec.kernels import Stored, _native, check_damage, native_of
from dpq_rec.kernels.arguments import MadeAnew, call, new_array


@dataclasses.dataclass(frozen=True, eq=False)
class SortedIntegers(MadeAnew):
    """A sorted list of integers, and the row of each.

    Attributes:
        ids_U: strictly ascending (int64).
        rows_U: the row of each (uint32).
        tree_T: the list's `id_tree` (see `dpq_rec.id_index`), of the length that belongs to U; without it the list is
            halved, which is slower.
    """

    ids_U: NDArray[np.int64]
    rows_U: NDArray[np.uint32]
    tree_T: NDArray[np.int64] | None = None

    @functools.cached_property
    def native(self) -> _native.Integers:
        """The same, as the C++ takes it."""
        return call(_native.Integers, self.ids_U, self.rows_U, self.tree_T)


def find_integer_rows(ids_N: NDArray[np.int64], known: SortedIntegers) -> NDArray[np.int64]:
    """Rows of integers, found in a sorted list of them.

    Args:
        ids_N: what is looked for (int64), contiguous.
        known: the list.

    Returns:
        rows_N (int64), MISSING_ROW where an id is not in the list.

    Raises:
        DamagedArtifactError: the tree leads an id to where it cannot be: it is not said to be missing.
    """
    out_N = new_array(ids_N, dtype=np.int64)
    _check_id(ids_N, call(_native.find_integer_rows, known.native, ids_N, out_N))
    return out_N


class FoundVectors(NamedTuple):
    """Rows of ids, and their vectors.

    Attributes:
        rows_N: int64; MISSING_ROW where an id is not known.
        vectors_NE: zeros there.
        num_missing: how often that is so.
    """

    rows_N: NDArray[np.int64]
    vectors_NE: NDArray[Any]
    num_missing: int


def lookup_integers(
    ids_N: NDArray[np.int64],
    known: SortedIntegers,
    stored: Stored,
    *,
    dtype: DTypeLike = np.float32,
    num_threads: int = 1,
) -> FoundVectors:
    """`find_integer_rows` and `decode` in one: codes are on their way from memory while the next ids are searched.

    Args:
        ids_N: what is looked for (int64), contiguous.
        known: the list of ids.
        stored: the vectors of all rows.
        dtype: as in `decode`.
        num_threads: likewise.

    Raises:
        DamagedArtifactError: as in both.
    """
    vectors = native_of(stored)
    out_NE = new_array(ids_N, vectors.dim, dtype=dtype)
    rows_N = np.empty(len(out_NE), np.int64)
    num_missing, bad_id_at, *bad_at = call(
        _native.lookup_integers, known.native, vectors, ids_N, rows_N, out_NE, num_threads
    )
    _check_id(ids_N, bad_id_at)
    check_damage(stored, rows_N, bad_at)
    return FoundVectors(rows_N, out_NE, num_missing)


class FoundBytes(NamedTuple):
    """A reply to ids, and how many of them are not known."""

    reply: bytes
    num_missing: int


def lookup_bytes(asked: bytes, known: SortedIntegers, stored: Stored, *, form: str) -> FoundBytes:
    """`lookup_integers` or, with the form "codes", `find_integer_rows` and `copy_codes`, from bytes to bytes.

    The numbers are as this machine has them.

    Args:
        asked: what is looked for (int64).
        known: the list of ids.
        stored: the vectors of all rows; coded where codes are wanted.
        form: "float32", "float16" or "codes".

    Returns:
        rows, then the positions of those that are missing (uint32), then, of codes that have tiers, the tier of each.

    Raises:
        DamagedArtifactError: as there.
    """
    if form not in _NUMBER_BYTES:
        raise ConfigError(f"form: got {form!r}, want {', '.join(_NUMBER_BYTES)}")
    number_bytes = _NUMBER_BYTES[form]
    reply, num_missing, *bad_at = call(_native.lookup_bytes, known.native, native_of(stored), asked, number_bytes)
    if max(bad_at) >= 0:
        ids_N, bad_id_at, at = np.frombuffer(asked, np.int64), bad_at[0], max(bad_at[1:])
        _check_id(ids_N, bad_id_at)
        row_1 = find_integer_rows(ids_N[at : at + 1], known)
        check_damage(stored, row_1, [min(position, 0) for position in bad_at[1:]])
        raise DamagedArtifactError(f"id {ids_N[at]}: its row was damaged, and is no more: the file changed meanwhile")
    return FoundBytes(reply, num_missing)


_MOST_SLOTS = 1 << 34  # ids that a slot can number are fewer than 2**32
_NUMBER_BYTES = {"float32": 4, "float16": 2, "codes": 0}


def _check_id(ids_N: NDArray[np.int64], bad_at: int) -> None:
    if bad_at >= 0:
        raise DamagedArtifactError(f"the vocabulary's id_tree leads id {ids_N[bad_at]} to where it cannot be")


def find_rows(
    ids: Sequence[object],
    id_bytes_T: NDArray[np.uint8],
    id_offsets_U1: NDArray[np.int64],
    rows_U: NDArray[np.uint32],
    slots_H: NDArray[np.uint32] | None = None,
) -> NDArray[np.int64]:
    """Rows of strings, found in a sorted list of them.

    Args:
        ids: N str, in a list or a tuple.
        id_bytes_T: the UTF-8 of the list's ids, one behind the other (uint8 [T]).
        id_offsets_U1: id i is id_bytes[id_offsets[i] : id_offsets[i + 1]] (int64 [U + 1]).
        rows_U: the row of each (uint32).
        slots_H: the list's `id_slots` (see `dpq_rec.id_index`); without them the list is halved, which is slower.

    Returns:
        rows_N (int64), MISSING_ROW where an id is not in the list.

    Raises:
        IdTypeError: something that is no str, or that holds half a surrogate pair, which UTF-8 cannot.
        DamagedArtifactError: offsets outside the bytes, or slots that name no id: nothing is read there.
    """
    if not isinstance(ids, list | tuple):  # a string would be taken for a list of its characters
        raise IdTypeError(f"ids: got {type(ids).__name__}, want a list or a tuple of strings")
    held = tuple(ids)
    out_N = np.empty(len(held), np.int64)
    bad_id_at, bad_entry = call(_native.find_rows, held, id_bytes_T, id_offsets_U1, rows_U, slots_H, out_N)
    if bad_id_at >= 0:
        bad = held[bad_id_at]
        got = "half a surrogate pair" if isinstance(bad, str) else type(bad).__name__
        raise IdTypeError(f"ids: got {got} at position {bad_id_at}, want a flat list of strings, valid in UTF-8")
    if bad_entry == len(rows_U):
        raise DamagedArtifactError(
            f"the vocabulary's id_slots name an id that is none of its {len(rows_U)}, or have no end"
        )
    if bad_entry >= 0:
        raise _outside(bad_entry, id_bytes_T)
    return out_N


def fill_slots(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64], num_slots: int) -> NDArray[np.uint32]:
    """The `id_slots` [H] of a list of strings (see `dpq_rec.id_index`).

    Args:
        id_bytes_T: as in `find_rows`.
        id_offsets_U1: likewise.
        num_slots: H, more than there are ids.

    Raises:
        DamagedArtifactError: offsets outside the bytes: nothing is read there.
        ConfigError: too few slots.
    """
    if not isinstance(num_slots, int) or not 0 < num_slots < _MOST_SLOTS:
        raise ConfigError(f"num_slots: got {num_slots!r}, want more than there are ids, and less than {_MOST_SLOTS}")
    slots_H = np.empty(num_slots, np.uint32)
    bad_entry = call(_native.fill_slots, id_bytes_T, id_offsets_U1, slots_H)
    if bad_entry >= 0:
        raise _outside(bad_entry, id_bytes_T)
    return slots_H


def _outside(entry: int, id_bytes_T: NDArray[np.uint8]) -> DamagedArtifactError:
    return DamagedArtifactError(f"the vocabulary's id {entry} lies outside its {len(id_bytes_T)} bytes")


def find_disorder(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> int | None:
    """The first id that is not above the one before it, or that lies outside the bytes; None if there is none.

    Args:
        id_bytes_T: as in `find_rows`.
        id_offsets_U1: likewise.
    """
    at = call(_native.find_disorder, id_bytes_T, id_offsets_U1)
    return at if at >= 0 else None
