"""The items that each user chose. In: interactions and vocabularies. Out: pairs of a user and an item, Histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dpq_rec.kernels import MISSING_ROW
from dpq_rec.vocabulary import Vocabulary
from training.data.columns import Values
from training.data.interactions import IDS, TRAIN, Interactions
from training.data.ragged import Bag, pair, ranges, unpair


def user_item_pairs(
    interactions: Interactions,
    number_users: Callable[[Values], NDArray[np.int64]],
    items: Vocabulary,
    splits: Sequence[int] = (TRAIN,),
) -> NDArray[np.int64]:
    """The distinct `pair`s of a user and the row of an item, ascending; memory grows with them.

    Args:
        interactions: the data.
        number_users: the number of each user id; -1 leaves the user out.
        items: of item_id; an item that it does not know has no row and is left out.
        splits: whose rows are read.
    """
    found = [np.empty(0, np.int64)]
    for piece in interactions.scan(IDS, splits=splits):
        users_N = number_users(piece.values["user_id"])
        item_rows_N = piece.values["item_id"].where(users_N >= 0).rows(items)
        has_row_N = item_rows_N != MISSING_ROW
        found.append(pair(users_N[users_N >= 0][has_row_N], item_rows_N[has_row_N]))
    return np.unique(np.concatenate(found))


class Histories:
    """The distinct item rows that each user row has in the training split, in 8 bytes each.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id, built from them.
    """

    def __init__(self, interactions: Interactions, vocabularies: Mapping[str, Vocabulary]) -> None:
        users, items = (vocabularies[name] for name in IDS)
        self._pairs_T = user_item_pairs(interactions, lambda ids: ids.rows(users), items)

    def draw(self, users_B: NDArray[np.int64], items_B: NDArray[np.int64], most: int, rng: torch.Generator) -> Bag:
        """For each example its user's other items: all of them, or `most` drawn with repetition where there are more.

        Args:
            users_B: rows of the examples' users, and
            items_B: of their own items, which are left out; such pairs as train.
            most: 1 or more.
            rng: of the draws.
        """
        firsts_B, lengths_B = self._ranges(users_B)
        others_B = lengths_B - 1
        taken_B = np.minimum(others_B, most)
        others_T = np.repeat(others_B, taken_B)
        at_T = ranges(0, taken_B)
        drawn_T = (torch.rand(len(at_T), generator=rng, dtype=torch.float64).numpy() * others_T).astype(np.int64)
        at_T = np.where(others_T > most, drawn_T, at_T)
        own_B = np.searchsorted(self._pairs_T, pair(users_B, items_B)) - firsts_B
        at_T += at_T >= np.repeat(own_B, taken_B)
        return self._bag(np.repeat(firsts_B, taken_B) + at_T, taken_B)

    def whole(self, users_N: NDArray[np.int64]) -> Bag:
        """All items of users, by their rows; none of a row that does not train."""
        firsts_N, lengths_N = self._ranges(users_N)
        return self._bag(ranges(firsts_N, lengths_N), lengths_N)

    def _ranges(self, users_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each user's pairs begin, and how many they are."""
        firsts_N = np.searchsorted(self._pairs_T, pair(users_N, 0))
        return firsts_N, np.searchsorted(self._pairs_T, pair(users_N + 1, 0)) - firsts_N

    def _bag(self, at_T: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> Bag:
        return Bag.of(unpair(self._pairs_T[at_T])[1], lengths_N)
