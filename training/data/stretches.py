"""Stretches of an array, end to end. In: where each begins and how long it is. Out: the places they cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def places(firsts_N: NDArray[np.int64] | int, lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """firsts, firsts + 1, ... of each stretch (int64), one stretch after the other.

    Args:
        firsts_N: where each begins (int64); one number for all alike.
        lengths_N: of each (int64).
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    shifts_N = firsts_N - (np.cumsum(lengths_N) - lengths_N)
    return np.arange(lengths_N.sum()) + np.repeat(shifts_N, lengths_N)
