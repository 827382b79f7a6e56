"""What the dense features look like. In: Interactions. Out: DenseStatistics of the training split, by streaming."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.data.interactions import Interactions
from training.data.splits import TRAIN

_logger = logging.getLogger(__name__)


class DenseStatistics(NamedTuple):
    """Of each dense feature over the training split, in the order of `Interactions.dense_features`.

    Attributes:
        means_F: a missing number is 0, here as in the batches (float64).
        stds_F: of all rows, not a sample (float64); 1 for a feature that is the same everywhere.
        num_missing_F: nulls, and numbers that are none (int64).
    """

    means_F: NDArray[np.float64]
    stds_F: NDArray[np.float64]
    num_missing_F: NDArray[np.int64]


def dense_statistics(interactions: Interactions) -> DenseStatistics:
    """One pass over the dense features; what is missing is counted in the log.

    Raises:
        ConfigError: there are no training rows.
    """
    names = interactions.dense_features
    num_rows, means_F, squares_F = 0, np.zeros(len(names)), np.zeros(len(names))
    num_missing_F, origin_F = np.zeros(len(names), np.int64), np.zeros(len(names))
    for piece in interactions.scan(names) if names else ():
        train_N = piece.splits_N == TRAIN
        if not train_N.any():
            continue
        numbers_NF = np.stack([piece.numbers[name][train_N] for name in names], 1)
        num_missing_F += np.isnan(numbers_NF).sum(0)
        numbers_NF = np.nan_to_num(numbers_NF, nan=0)
        if not num_rows:
            origin_F = numbers_NF[0]
        numbers_NF = (
            numbers_NF - origin_F
        )  # so that a feature that is the same everywhere has a deviation of 0, exactly
        # Two sets of rows together: T. Chan, G. Golub, R. LeVeque (1979), eq. 2.1.
        piece_means_F, num_piece = numbers_NF.mean(0), len(numbers_NF)
        shift_F = piece_means_F - means_F
        squares_F += ((numbers_NF - piece_means_F) ** 2).sum(0) + shift_F**2 * num_rows * num_piece / (
            num_rows + num_piece
        )
        num_rows += num_piece
        means_F += shift_F * num_piece / num_rows
    if names and not num_rows:
        raise ConfigError(f"{names[0]}: got no training rows among {interactions.num_rows} interactions, want some")
    for name, num_missing in zip(names, num_missing_F.tolist(), strict=True):
        if num_missing:
            _logger.warning("%s: %d of %d training rows have no number; they count as 0", name, num_missing, num_rows)
    stds_F = np.sqrt(squares_F / max(num_rows, 1))
    return DenseStatistics(origin_F + means_F, np.where(stds_F > 0, stds_F, 1), num_missing_F)
