"""Vectors to bags. In: vectors_NE and how many of them each bag takes. Out: pooled_BE (float32)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pooling = Literal["none", "sum", "mean"]


def pool(
    vectors_NE: NDArray[np.float32],
    missing: NDArray[np.uint32],
    bag_lengths_B: NDArray[np.int64],
    pooling: Literal["sum", "mean"],
) -> NDArray[np.float32]:
    """Sum or mean of each bag, [B, E] (float32), added in the order of the rows.

    Args:
        vectors_NE: vectors (float32), zeros where an id is missing.
        missing: positions of the missing ids; they add nothing and do not count in a mean.
        bag_lengths_B: ids in each bag, in order (int64); they sum to N. An empty bag, or one of missing ids, is zeros.
        pooling: "sum" or "mean".
    """
    bags_N = np.repeat(np.arange(len(bag_lengths_B)), bag_lengths_B)
    pooled_BE = np.zeros((len(bag_lengths_B), vectors_NE.shape[1]), np.float32)
    # Not np.add.reduceat: it adds pairwise, and gives an empty bag the next bag's first vector.
    np.add.at(pooled_BE, bags_N, vectors_NE)
    if pooling == "mean":
        present_N = np.ones(len(vectors_NE), bool)
        present_N[missing] = False
        counts_B = np.bincount(bags_N[present_N], minlength=len(bag_lengths_B))
        pooled_BE /= np.maximum(counts_B, 1).astype(np.float32)[:, None]
    return pooled_BE
