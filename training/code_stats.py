"""How an artifact uses its codes. In: a table, and the same table of an earlier artifact. Out: CodeStats.

The packed codes are mapped and streamed in chunks: what is held grows with M * K, not with the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import Table
from dpq_rec.codes import unpack_codes

_CHUNK_ROWS = 1 << 16


class CodeStats(NamedTuple):
    """Of each of a row's M codes, level by level and within a level subspace by subspace.

    Attributes:
        used_codes_M: how many of the K codes some row has (int64).
        perplexity_M: exp of the entropy of their use over all rows (float64): K where all are used alike, 1 where every
            row has the same.
        changed_M: share of rows whose code differs from the earlier artifact's (float64; DPQ paper, appendix D.2); None
            without an earlier one.
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
        table: of kind "dpq".
        earlier: the same table as it was before.
    """
    layout = table.manifest.layout
    packed_VW = table.tensors["packed_codes"]
    firsts_M = np.arange(layout.codes_per_row) * layout.num_codes
    counts = np.zeros(layout.codes_per_row * layout.num_codes, np.int64)
    num_changed_M = np.zeros(layout.codes_per_row, np.int64)
    for start in range(0, len(packed_VW), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        codes_NM = unpack_codes(packed_VW[chunk], layout)
        counts += np.bincount((codes_NM + firsts_M).ravel(), minlength=len(counts))
        if earlier is not None:
            num_changed_M += (codes_NM != unpack_codes(earlier.tensors["packed_codes"][chunk], layout)).sum(0)
    counts_MK = counts.reshape(layout.codes_per_row, layout.num_codes)
    shares_MK = counts_MK / len(packed_VW)
    logs_MK = np.log(shares_MK, where=shares_MK > 0, out=np.zeros_like(shares_MK))
    return CodeStats(
        (counts_MK > 0).sum(1),
        np.exp(-(shares_MK * logs_MK).sum(1)),
        None if earlier is None else num_changed_M / len(packed_VW),
    )
