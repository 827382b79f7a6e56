"""What each user chose. In: interactions and vocabularies. Out: Histories, from which a user's items are drawn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dpq_rec.vocabulary import Vocabulary
from training.data.batches import Bag
from training.data.files import IDS
from training.data.interactions import Interactions
from training.data.splits import TRAIN
from training.data.stretches import places
from training.data.vocabularies import find_rows

_ITEM_BITS = 32  # rows are below 2^32, by the artifact's format


class Histories:
    """The distinct item rows that each user row has in the training split, in 8 bytes each.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id, built from them.
    """

    def __init__(self, interactions: Interactions, vocabularies: Mapping[str, Vocabulary]) -> None:
        pairs = [np.empty(0, np.int64)]
        for piece in interactions.scan(IDS):
            users_N, items_N = (
                find_rows(vocabularies[name], piece.values[name].where(piece.splits_N == TRAIN)) for name in IDS
            )
            pairs.append(_pairs(users_N, items_N))
        self._pairs_T = np.unique(np.concatenate(pairs))

    def draw(self, users_B: NDArray[np.int64], items_B: NDArray[np.int64], most: int, rng: torch.Generator) -> Bag:
        """For each example its user's other items: all of them, or `most` drawn with repetition where there are more.

        Args:
            users_B: rows of the examples' users, and
            items_B: of their own items, which are left out; such pairs as train.
            most: 1 or more.
            rng: of the draws.
        """
        firsts_B, lengths_B = self._spans(users_B)
        others_B = lengths_B - 1
        taken_B = np.minimum(others_B, most)
        others_T = np.repeat(others_B, taken_B)
        at_T = places(0, taken_B)
        drawn_T = (torch.rand(len(at_T), generator=rng, dtype=torch.float64).numpy() * others_T).astype(np.int64)
        at_T = np.where(others_T > most, drawn_T, at_T)
        own_B = np.searchsorted(self._pairs_T, _pairs(users_B, items_B)) - firsts_B
        at_T += at_T >= np.repeat(own_B, taken_B)
        return Bag(self._items(np.repeat(firsts_B, taken_B) + at_T), taken_B)

    def whole(self, users_N: NDArray[np.int64]) -> Bag:
        """All items of users, by their rows; none of a row that does not train."""
        firsts_N, lengths_N = self._spans(users_N)
        return Bag(self._items(places(firsts_N, lengths_N)), lengths_N)

    def _spans(self, users_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each user's pairs begin, and how many they are."""
        firsts_N = np.searchsorted(self._pairs_T, users_N << _ITEM_BITS)
        return firsts_N, np.searchsorted(self._pairs_T, (users_N + 1) << _ITEM_BITS) - firsts_N

    def _items(self, at_T: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._pairs_T[at_T] & ((1 << _ITEM_BITS) - 1)


def _pairs(users_N: NDArray[np.int64], items_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return users_N << _ITEM_BITS | items_N
