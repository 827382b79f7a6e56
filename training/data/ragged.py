"""Lists of different lengths in two arrays. In: values and lengths. Out: Bag, as EmbeddingBag takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SECOND_BITS = 32  # rows are below 2^32, by the artifact's format


class Bag(NamedTuple):
    """The rows of B examples, example after example.

    Three examples, the second of which has no row:

    >>> bag = Bag.of(np.array([7, 8, 9]), np.array([2, 0, 1]))
    >>> bag.offsets.tolist(), bag.owners().tolist()
    ([0, 2, 2, 3], [0, 0, 2])
    >>> bag.take(np.array([2, 0])).rows_T.tolist()
    [9, 7, 8]

    Attributes:
        rows_T: all rows (int64).
        offsets: example b has rows_T[offsets[b] : offsets[b + 1]] (int64 [B + 1]).
    """

    rows_T: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, rows_T: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> Bag:
        """A bag of the rows and how many of them each example has (int64)."""
        return cls(rows_T, np.append(0, np.cumsum(lengths_B)))

    @classmethod
    def of_pairs(cls, pairs_T: NDArray[np.int64], num_examples: int) -> Bag:
        """A bag of sorted pairs of an example and a row: see `pair`."""
        return cls(unpair(pairs_T)[1], np.searchsorted(pairs_T, pair(np.arange(num_examples + 1), 0)))

    @classmethod
    def join(cls, parts: Sequence[Bag]) -> Bag:
        """The examples of all parts, one part after the other."""
        return cls.of(np.concatenate([part.rows_T for part in parts]), np.concatenate([p.lengths for p in parts]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many rows each example has (int64)."""
        return np.diff(self.offsets)

    def owners(self) -> NDArray[np.int64]:
        """The example of each row [T] (int64)."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def pairs(self) -> NDArray[np.int64]:
        """Each row with its example: see `pair`."""
        return pair(self.owners(), self.rows_T)

    def take(self, order_N: NDArray[Any]) -> Bag:
        """Some examples, in the order given."""
        firsts_N = self.offsets[order_N]
        lengths_N = self.offsets[order_N + 1] - firsts_N
        at_T = firsts_N if (lengths_N == 1).all() else ranges(firsts_N, lengths_N)  # ids: one row each
        return Bag.of(self.rows_T[at_T], lengths_N)

    def slice(self, start: int, stop: int) -> Bag:
        """Examples start to stop - 1."""
        offsets = self.offsets[start : stop + 1]
        return Bag(self.rows_T[offsets[0] : offsets[-1]], offsets - offsets[0])

    def keep(self, kept_T: NDArray[np.bool_]) -> Bag:
        """The same examples with some of their rows."""
        return Bag(self.rows_T[kept_T], np.append(0, np.cumsum(kept_T))[self.offsets])


def pair(first_N: NDArray[np.int64], second_N: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Two numbers in one [N] (int64), which sorts by the first and then by the second; the second is below 2^32."""
    return first_N << _SECOND_BITS | second_N


def unpair(pairs_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two numbers of each pair."""
    return pairs_N >> _SECOND_BITS, pairs_N & ((1 << _SECOND_BITS) - 1)


def ranges(firsts_N: NDArray[np.int64] | int, lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """first, first + 1, ... of each range, one range after the other: [T] (int64), T the sum of the lengths.

    Args:
        firsts_N: where each begins (int64); one number for all, such as 0, counts each up from there.
        lengths_N: of each (int64).
    """
    shifts_N = firsts_N - (np.cumsum(lengths_N) - lengths_N)
    return np.arange(lengths_N.sum()) + np.repeat(shifts_N, lengths_N)
