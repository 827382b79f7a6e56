"""Stretches of an array, end to end. In: where each begins and how long it is. Out: the places they cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def places(firsts_N: NDArray[np.int64] | int, lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """firsts, firsts + 1, ... of each stretch, one stretch after the other: [T] (int64), T the sum of the lengths.

    Args:
        firsts_N: where each begins (int64); 0 counts each up from 0.
        lengths_N: of each (int64).
    """
    shifts_N = firsts_N - (np.cumsum(lengths_N) - lengths_N)
    return np.arange(lengths_N.sum()) + np.repeat(shifts_N, lengths_N)
