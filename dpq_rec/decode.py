"""Rows to vectors, whatever the table's kind. In: a table and rows. Out: vectors_NE (float32)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpq_rec import kernels
from dpq_rec.artifact import DPQ, DPQ_TIERS, Table
from dpq_rec.errors import DamagedArtifactError
from dpq_rec.tiers import by_tier


def decode_rows(table: Table, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors [N, E] (float32) of rows; MISSING_ROW gives zeros.

    Raises:
        DamagedArtifactError: a row outside the table, or an impossible code.
    """
    if table.manifest.kind == DPQ:
        return kernels.decode(
            table.tensors["packed_codes"], table.tensors["values_fp32"], rows_N, table.manifest.layout
        )
    present_N = rows_N != kernels.MISSING_ROW
    outside_N = (rows_N < kernels.MISSING_ROW) | (rows_N >= table.manifest.num_embeddings)
    if outside_N.any():
        raise DamagedArtifactError(
            f"row {rows_N[outside_N][0]} is outside the table's {table.manifest.num_embeddings} rows"
        )
    vectors_NE = np.zeros((len(rows_N), table.manifest.embedding_dim), np.float32)
    if table.manifest.kind == DPQ_TIERS:
        _decode_tiers(table, rows_N, vectors_NE)
    else:
        vectors_NE[present_N] = table.tensors["vectors"][rows_N[present_N]]
    return vectors_NE


def _decode_tiers(table: Table, rows_N: NDArray[np.int64], vectors_NE: NDArray[np.float32]) -> None:
    """Put the vectors of rows that are not missing in their places, tier by tier."""
    values_MKS = table.tensors["values_fp32"]
    per_level = len(values_MKS) // table.manifest.num_levels
    for tier, here_P in by_tier(table.tiers, rows_N):
        values_of_tier = values_MKS[: tier.layout.num_levels * per_level]
        try:
            vectors_NE[here_P] = kernels.decode(
                tier.packed_VW, values_of_tier, rows_N[here_P] - tier.first_row, tier.layout
            )
        except DamagedArtifactError as error:
            raise DamagedArtifactError(f"of the rows from {tier.first_row} on, {error}") from error
