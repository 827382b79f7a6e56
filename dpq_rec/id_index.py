"""What finds ids fast in a sorted list. In: the list. Out: `id_tree` of integers, `id_slots` of strings.

Both stand beside the list in the artifact, may be missing, and hold nothing that does not follow from it. What they
find is compared with the id in the list. That an id is not where it could be, a tree shows; a slot that was lost, and
with it a string, `verify` alone finds.

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
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpq_rec.kernels.ids import fill_slots
from dpq_rec.strings import PackedStrings

NODE_KEYS = 16  # two cache lines
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


def build_slots(ids: PackedStrings) -> NDArray[np.uint32]:
    """The `id_slots` of strings.

    Raises:
        DamagedArtifactError: a string that lies outside the bytes.
    """
    return fill_slots(*ids, num_slots(len(ids.offsets_U1) - 1))


def num_slots(num_ids: int) -> int:
    """How long the `id_slots` of a number of ids are: two thirds are taken, and never all."""
    return num_ids + num_ids // 2 + 1
