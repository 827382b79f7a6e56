"""The codebook loss of DPQ-VQ. In: queries and the values chosen for them. Out: a scalar, minimised beside the loss.

It needs no line in the training loop: it is attached to the vectors, and counts once for each forward, however many
losses are made of them, and however many backwards these take.
"""

from __future__ import annotations

from typing import Any

import torch

from dpq_rec.config import DPQConfig
from dpq_rec.nn.collectives import sum_over_ranks, world_size


def codebook_loss(
    config: DPQConfig, chosen_NDS: torch.Tensor, rest_NDS: torch.Tensor, counts_N: torch.Tensor
) -> torch.Tensor:
    """|T(Q) - sg(Q)|^2 (DPQ paper, below eq. 7), and its mirror, which commits queries to their values.

    Of the rows that have the level, over the occurrences of all: as if a level that a row lacks had no error.

    Args:
        config: weights of the terms.
        chosen_NDS: the values of a level.
        rest_NDS: what they stand for.
        counts_N: occurrences of all rows; those that have the level come first.
    """
    draw = 0.0 if config.ema_decay is not None else config.penalty_weight
    if not (draw or config.commitment_weight):  # nothing to sum, here or over ranks
        return rest_NDS.new_zeros(())
    chosen_NDS, rest_NDS = _Once.apply(chosen_NDS), _Once.apply(rest_NDS)
    errors_N = draw * (chosen_NDS - rest_NDS.detach()).square().flatten(1).mean(1)
    if config.commitment_weight:
        committed_N = (rest_NDS - chosen_NDS.detach()).square().flatten(1).mean(1)
        errors_N = errors_N + config.commitment_weight * committed_N
    # Ranks average their gradients, and so their losses: this rank's share is scaled so that the average over ranks is
    # the mean over all occurrences.
    occurrences = sum_over_ranks(counts_N.sum()).clamp(min=1)
    return world_size() * (counts_N[: len(errors_N)] @ errors_N) / occurrences


def with_codebook_loss(vectors_NE: torch.Tensor, codebook_loss: torch.Tensor, scale: float) -> torch.Tensor:
    """The vectors; in the backward pass the codebook loss counts as a summand of the loss, times the scale."""
    return _WithCodebookLoss.apply(vectors_NE, codebook_loss, scale)


class _WithCodebookLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors_NE: torch.Tensor, codebook_loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return vectors_NE.view_as(vectors_NE)

    @staticmethod
    def backward(ctx: Any, gradient_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient_NE, gradient_NE.new_full((), ctx.scale), None


class _Once(torch.autograd.Function):
    """What a codebook loss is made of; its gradient counts in one backward, and is zero in those that come after.

    Here, and not at the codebook loss itself: a backward towards the queries alone must not take what is the values'.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.has_counted = False
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if ctx.has_counted:
            return torch.zeros_like(gradient)
        ctx.has_counted = True
        return gradient
