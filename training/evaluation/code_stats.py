"""How an artifact uses its codes. In: a table, and the same table of an earlier artifact. Out: CodeStats.

Counting is `dpq_rec.code_use`'s: a report on an artifact shows the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.code_use import blocks_of_codes, count_codes, perplexity
from dpq_rec.table import Table


class CodeStats(NamedTuple):
    """Of each of a row's M codes, level by level and within a level subspace by subspace.

    Attributes:
        used_codes_M: how many of the K codes some row has (int64).
        perplexity_M: exp of the entropy of their use over all rows that have the level (float64): K where all are used
            alike, 1 where every row has the same.
        changed_M: share of these rows whose code differs from the earlier artifact's (float64; DPQ paper, appendix
            D.2); None without an earlier one.
    """

    used_codes_M: NDArray[np.int64]
    perplexity_M: NDArray[np.float64]
    changed_M: NDArray[np.float64] | None

    def as_dict(self) -> dict[str, Any]:
        """Lists of numbers by name, as metrics.json holds them."""
        changed = None if self.changed_M is None else self.changed_M.tolist()
        return {
            "used_codes": self.used_codes_M.tolist(),
            "perplexity": self.perplexity_M.tolist(),
            "changed": changed,
        }


def code_stats(table: Table, earlier: Table | None = None) -> CodeStats:
    """Count the codes of all rows.

    Args:
        table: that has codes.
        earlier: the same table as it was before.
    """
    counts_MK = count_codes(table)
    changed_M = None
    if earlier is not None:
        pairs = zip(blocks_of_codes(table), blocks_of_codes(earlier), strict=True)
        num_changed_M = np.zeros(len(counts_MK), np.int64)
        for now_NM, before_NM in pairs:
            num_changed_M[: now_NM.shape[1]] += (now_NM != before_NM).sum(0)
        changed_M = num_changed_M / np.maximum(counts_MK.sum(1), 1)
    return CodeStats((counts_MK > 0).sum(1), perplexity(counts_MK), changed_M)
