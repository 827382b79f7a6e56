"""Means and deviations of the dense features in the training split. In: Interactions, which are streamed once."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.data.interactions import TRAIN, Interactions

_logger = logging.getLogger(__name__)


def dense_statistics(interactions: Interactions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean and the standard deviation of each dense feature [F] (float64), in their order in `interactions`.

    A missing number counts as 0, here as in the batches; how many there are is in the log. The deviation is that of all
    rows, not of a sample; 1 for a feature that is the same everywhere.

    Raises:
        ConfigError: there are no training rows.
    """
    names = interactions.dense_features
    num_rows, means_F, squares_F = 0, np.zeros(len(names)), np.zeros(len(names))
    num_missing_F, origin_F = np.zeros(len(names), np.int64), np.zeros(len(names))
    for piece in interactions.scan(names, splits=(TRAIN,)) if names else ():
        num_piece = len(piece.splits_N)
        if not num_piece:
            continue
        numbers_NF = np.stack([piece.numbers[name] for name in names], 1)
        num_missing_F += np.isnan(numbers_NF).sum(0)
        numbers_NF = np.nan_to_num(numbers_NF, nan=0)
        origin_F = origin_F if num_rows else numbers_NF[0]
        numbers_NF = numbers_NF - origin_F  # so that one that is the same everywhere has a deviation of 0, exactly
        # Two sets of rows together: T. Chan, G. Golub, R. LeVeque (1979), eq. 2.1.
        piece_means_F, num_both = numbers_NF.mean(0), num_rows + num_piece
        shift_F = piece_means_F - means_F
        squares_F += ((numbers_NF - piece_means_F) ** 2).sum(0) + shift_F**2 * num_rows * num_piece / num_both
        num_rows = num_both
        means_F += shift_F * num_piece / num_rows
    if names and not num_rows:
        raise ConfigError(f"{names[0]}: got no training rows among {interactions.num_rows} interactions, want some")
    for name, num_missing in zip(names, num_missing_F.tolist(), strict=True):
        if num_missing:
            _logger.warning("%s: %d of %d training rows have no number; they count as 0", name, num_missing, num_rows)
    stds_F = np.sqrt(squares_F / max(num_rows, 1))
    return origin_F + means_F, np.where(stds_F > 0, stds_F, 1)
