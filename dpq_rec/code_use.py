"""How the rows of a table use its codes. In: a table that has codes. Out: counts_MK, and what follows from them.

The packed codes are mapped and streamed in blocks: what is held grows with M * K, not with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import unpack_codes
from dpq_rec.errors import DamagedArtifactError

if TYPE_CHECKING:
    from dpq_rec.table import Table

_BLOCK_CODES = 1 << 21  # unpacked at a time


def blocks_of_codes(table: Table) -> Iterator[NDArray[np.uint16]]:
    """The codes [N, M] of all rows in order, in blocks of as many rows for every table of this layout.

    No block holds rows of two tiers: M is what the rows of its tier have.

    Raises:
        DamagedArtifactError: a row holds a code of K or more.
    """
    for tier, packed_VW in zip(table.tiers, table.packed, strict=True):
        layout = tier.layout
        num_rows = max(1, _BLOCK_CODES // layout.codes_per_row)
        for start in range(0, tier.num_rows, num_rows):
            codes_NM = unpack_codes(packed_VW[start : start + num_rows], layout)
            wrong_N = (codes_NM >= layout.num_codes).any(axis=1)
            if wrong_N.any():
                row = tier.first_row + start + int(wrong_N.argmax())
                raise DamagedArtifactError(
                    f"table {table.name!r}: row {row} holds a code of {layout.num_codes} or more"
                )
            yield codes_NM


def count_codes(table: Table, progress: Callable[[int], object] = lambda num_rows: None) -> NDArray[np.int64]:
    """How many rows have each code, counts_MK (int64); each subspace of each level adds up to the rows that have it.

    Args:
        table: that has codes.
        progress: called with the number of rows of each block.

    Raises:
        DamagedArtifactError: a row holds a code of K or more.
    """
    layout = table.manifest.layout
    counts_MK = np.zeros((layout.codes_per_row, layout.num_codes), np.int64)
    for codes_NM in blocks_of_codes(table):
        for m, codes_N in enumerate(np.ascontiguousarray(codes_NM.T)):
            counts_MK[m] += np.bincount(codes_N, minlength=layout.num_codes)
        progress(len(codes_NM))
    return counts_MK


def perplexity(counts_MK: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exp of the entropy of use [M] (float64): K where all codes are used alike, 1 where all rows have the same."""
    shares_MK: NDArray[np.float64] = counts_MK / np.maximum(counts_MK.sum(1, keepdims=True), 1)
    logs_MK = np.log(shares_MK, where=shares_MK > 0, out=np.zeros_like(shares_MK))
    perplexity_M: NDArray[np.float64] = np.exp(-(shares_MK * logs_MK).sum(1))
    return perplexity_M


def chance_of_agreement(counts_MK: NDArray[np.int64]) -> NDArray[np.float64]:
    """The chance [M] (float64) that two rows drawn at random, with replacement, have the same code.

    Rows that lack the level agree with none.
    """
    num_rows = max(counts_MK.sum(1).max(initial=0), 1)  # all have level 0
    chance_M: NDArray[np.float64] = np.square(counts_MK / num_rows).sum(1)
    return chance_M
