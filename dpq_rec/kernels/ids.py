"""The indexes that find ids fast, and strings by them. In: ids; a vocabulary's arrays. Out: rows; the indexes.

An index stands beside a sorted list of ids in the artifact, may be missing, and holds nothing that does not follow from
the list. What it finds is compared with the id in the list. A damaged tree shows; a lost slot, and with it a string, is
found by `verify` alone.

    id_tree     int64. The ids are cut into leaves of 16. A level holds the first id of each leaf, the level above it
                every 16th key of it, and so on up to a level of 16 keys or fewer, the root. The levels stand from the
                root down, each filled up with 2**63 - 1 to a multiple of 16. 16 ids or fewer need none: it has no keys.
    id_slots    uint32 [U + U // 2 + 1], a hash table with linear probing. A slot is 0, or has i + 1 in its lowest
                U.bit_length() bits and the lowest bits of the hash of id i above them. Id i is in the first slot that
                was free from slot (hash * number of slots) >> 64 on, the ids in their order, slot 0 after the last.

The hash of a text begins with its size times B (all modulo 2**64). With each of its words, the hash becomes
fold((hash ^ word) * A), in the end fold(hash * B), where fold is the exclusive or of the two halves of 128 bits, A is
0x9e3779b97f4a7c15 and B is 0xd1b54a32d192ed03. The words are 8 bytes each, the lowest first, the last one ends with the
text; a text of less than 8 bytes is one word, filled up with zeros.

As in `dpq_rec.kernels`, arguments of another type or size raise ConfigError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import dpq_rec.kernels._native as _native
from dpq_rec.errors import DamagedArtifactError, IdTypeError
from dpq_rec.kernels.arguments import call, check_array

NODE_KEYS = 16  # of the tree: two cache lines
MOST_SLOTTED = (1 << 32) - 1  # ids that a slot can number


def build_tree(ids_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """The `id_tree` of ascending ids; the memory it takes beside them is 1/15 of theirs."""
    levels, keys = [np.empty(0, np.int64)], ids_U
    while len(keys) > NODE_KEYS:
        keys = keys[::NODE_KEYS]
        levels.append(np.pad(keys, (0, -len(keys) % NODE_KEYS), constant_values=np.iinfo(np.int64).max))
    return np.concatenate(levels[::-1])


def num_tree_keys(num_ids: int) -> int:
    """How long the `id_tree` of a number of ids is."""
    num_keys, left = 0, num_ids
    while left > NODE_KEYS:
        left = -(-left // NODE_KEYS)
        num_keys += left + -left % NODE_KEYS
    return num_keys


def sorted_integers(
    ids_U: NDArray[np.int64], rows_U: NDArray[np.uint32], tree_T: NDArray[np.int64] | None = None
) -> _native.Integers:
    """The C++ object of a sorted list of integers and the row of each.

    Args:
        ids_U: strictly ascending (int64).
        rows_U: the row of each (uint32).
        tree_T: the list's `id_tree`, `num_tree_keys(U)` long; without it the list is halved, which is slower.
    """
    return call(_native.Integers, ids_U, rows_U, tree_T)


def find_string_rows(
    ids: Sequence[object],
    id_bytes_T: NDArray[np.uint8],
    id_offsets_U1: NDArray[np.int64],
    rows_U: NDArray[np.uint32],
    slots_H: NDArray[np.uint32] | None = None,
) -> NDArray[np.int64]:
    """Rows (int64) of strings, found in a sorted list of them; MISSING_ROW where an id is not in the list.

    Args:
        ids: N str, in a list or a tuple.
        id_bytes_T: the UTF-8 of the list's ids, one behind the other (uint8 [T]).
        id_offsets_U1: id i is id_bytes[id_offsets[i] : id_offsets[i + 1]] (int64 [U + 1]).
        rows_U: the row of each (uint32).
        slots_H: the list's `id_slots`; without them the list is halved, which is slower.

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
    _check_entry(bad_entry, id_bytes_T)
    return out_N


def build_slots(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The `id_slots` of a list of strings, which `find_string_rows` describes.

    Raises:
        DamagedArtifactError: offsets outside the bytes: nothing is read there.
    """
    check_array("id_offsets", id_offsets_U1, np.int64, None)
    slots_H = np.empty(num_slots(max(0, len(id_offsets_U1) - 1)), np.uint32)
    _check_entry(call(_native.fill_slots, id_bytes_T, id_offsets_U1, slots_H), id_bytes_T)
    return slots_H


def num_slots(num_ids: int) -> int:
    """How long the `id_slots` of a number of ids are: two thirds are taken, and never all."""
    return num_ids + num_ids // 2 + 1


def _check_entry(bad_entry: int, id_bytes_T: NDArray[np.uint8]) -> None:
    if bad_entry >= 0:
        raise DamagedArtifactError(f"the vocabulary's id {bad_entry} lies outside its {len(id_bytes_T)} bytes")


def find_disorder(id_bytes_T: NDArray[np.uint8], id_offsets_U1: NDArray[np.int64]) -> int | None:
    """The first string that is not above the one before it, or that lies outside the bytes; None if there is none.

    Args:
        id_bytes_T: as in `find_string_rows`.
        id_offsets_U1: likewise.
    """
    at = call(_native.find_disorder, id_bytes_T, id_offsets_U1)
    return at if at >= 0 else None
