"""How an artifact uses its codes. In: a table, and the same table of an earlier artifact. Out: lists of numbers.

Counting is `dpq_rec.code_use`'s: a report on an artifact shows the same numbers.
"""

from __future__ import annotations

import numpy as np

from dpq_rec.code_use import blocks_of_codes, count_codes, perplexity
from dpq_rec.table import Table


def code_stats(table: Table, earlier: Table | None = None) -> dict[str, list[float] | None]:
    """Count the codes of all rows, as metrics.json holds them: a number for each of the M codes that a row has.

    They come level by level and within a level subspace by subspace. `used_codes` is how many of the K codes some row
    has. `perplexity` is exp of the entropy of their use over all rows that have the level: K where all are used alike,
    1 where every row has the same. `changed` is the share of these rows whose code differs from the earlier artifact's
    (DPQ paper, appendix D.2); None without an earlier one.

    Args:
        table: that has codes.
        earlier: the same table as it was before.
    """
    counts_MK = count_codes(table)
    changed = None
    if earlier is not None:
        num_changed_M = np.zeros(len(counts_MK), np.int64)
        for now_NM, before_NM in zip(blocks_of_codes(table), blocks_of_codes(earlier), strict=True):
            num_changed_M[: now_NM.shape[1]] += (now_NM != before_NM).sum(0)
        changed = (num_changed_M / np.maximum(counts_MK.sum(1), 1)).tolist()
    used_M, perplexity_M = (counts_MK > 0).sum(1), perplexity(counts_MK)
    return {"used_codes": used_M.tolist(), "perplexity": perplexity_M.tolist(), "changed": changed}
