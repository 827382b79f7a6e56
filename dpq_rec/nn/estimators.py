"""Gradients through the choice of a code. In: a level's Choice. Out: the values of its codes, and a codebook loss.

A choice has no gradient; the two methods of the paper put different ones in its place. `Softmax` is DPQ-SX (DPQ paper,
eq. 5), `StraightThrough` is DPQ-VQ (eq. 7). Forward, both emit the very bits of the chosen values. In formulas, Q are
queries, H vectors, T(Q) the chosen values, and sg(x) is x without its gradient.

The codebook loss needs no line in the training loop: `with_codebook_loss` attaches it to the vectors. It counts once
for each forward, however many losses are made of them, and however many backward passes these take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from dpq_rec import kernels
from dpq_rec.config import DPQConfig
from dpq_rec.nn.codebook import choose
from dpq_rec.nn.collectives import sum_over_ranks, world_size

if TYPE_CHECKING:
    from dpq_rec.nn.level import Choice


class Softmax:
    """DPQ-SX: the backward pass takes the choice for a softmax of the scores / temperature (DPQ paper, eq. 4).

    H = T(Q|tau=1) - sg(T(Q|tau=1) - T(Q|tau=0)) (eq. 5), where T mixes the values by the softmax, and picks one as tau
    goes to 0. With `hard_values` queries and keys have the gradient of the mixture, values that of the one picked.
    """

    def __init__(self, config: DPQConfig) -> None:
        self.config = config

    def emit(
        self, choice: Choice, residual_NDS: torch.Tensor, counts_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The values [N, D, S] of a level's codes, and a codebook loss of zero."""
        scale_K, shift_K = (tensor_K / self.config.temperature for tensor_K in (choice.scale_K, choice.shift_K))
        soft = choice._replace(scale_K=scale_K, shift_K=shift_K)
        zero = residual_NDS.new_zeros(())
        if not self.config.hard_values:
            return softmax_choice(soft), zero
        mixed_NDS = softmax_choice(soft._replace(values_DKS=choice.values_DKS.detach()))
        picked_NDS = choose(choice.values_DKS, choice.codes_ND)
        return mixed_NDS + (picked_NDS - picked_NDS.detach()), zero  # the difference is exactly zero

    def pass_through(self, vectors_NE: torch.Tensor, queries_NE: torch.Tensor) -> torch.Tensor:
        """The vectors: their gradient has gone to the queries by the scores."""
        return vectors_NE


class StraightThrough:
    """DPQ-VQ: the query gets the gradient of the vector, H = Q - sg(Q - T(Q)) (DPQ paper, eq. 7); keys are the values.

    What moves the values is the codebook loss |T(Q) - sg(Q)|^2 (below eq. 7) or, by the config, their running means or
    the task's gradient. The loss's mirror |Q - sg(T(Q))|^2 commits queries to their values (van den Oord et al., 2017).
    """

    def __init__(self, config: DPQConfig) -> None:
        self.config = config

    def emit(
        self, choice: Choice, residual_NDS: torch.Tensor, counts_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The values [N, D, S] of a level's codes, and its codebook loss; rows that have the level come first."""
        chosen_NDS = choose(choice.values_DKS, choice.codes_ND)
        loss = self._codebook_loss(chosen_NDS, residual_NDS, counts_N)
        return chosen_NDS if self.config.value_gradient else chosen_NDS.detach(), loss

    def pass_through(self, vectors_NE: torch.Tensor, queries_NE: torch.Tensor) -> torch.Tensor:
        """The vectors, whose gradient goes to the queries as it is."""
        return vectors_NE + (queries_NE - queries_NE.detach())  # the difference is exactly zero

    def _codebook_loss(
        self, chosen_NDS: torch.Tensor, residual_NDS: torch.Tensor, counts_N: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the occurrences of all rows, as if a level that a row lacks had no error."""
        config = self.config
        weight = 0.0 if config.ema_decay is not None else config.penalty_weight
        if not (weight or config.commitment_weight):  # nothing to sum, here or over ranks
            return residual_NDS.new_zeros(())
        chosen_NDS, residual_NDS = map(_FirstBackwardOnly.apply, (chosen_NDS, residual_NDS))
        errors_N = weight * (chosen_NDS - residual_NDS.detach()).square().flatten(1).mean(1)
        if config.commitment_weight:
            committed_N = (residual_NDS - chosen_NDS.detach()).square().flatten(1).mean(1)
            errors_N = errors_N + config.commitment_weight * committed_N
        # Ranks average their gradients, and so their losses: this rank's share is scaled so that the average over ranks
        # is the mean over all occurrences.
        occurrences = sum_over_ranks(counts_N.sum()).clamp(min=1)
        return world_size() * (counts_N[: len(errors_N)] @ errors_N) / occurrences


def softmax_choice(choice: Choice) -> torch.Tensor:
    """The values [N, D, S] of the codes, with the gradients of the mixture of all values by softmax of the scores."""
    queries_NDX = choice.queries_NDX
    if queries_NDX.device.type == "cpu" and queries_NDX.dtype == torch.float32:
        return _SoftmaxChoice.apply(*choice)
    return composed_softmax_choice(choice)


def composed_softmax_choice(choice: Choice) -> torch.Tensor:
    """The same out of torch's own operations, on any device and in any precision."""
    logits_NDK = (
        scores(choice.queries_NDX, choice.keys_DKX, euclidean=choice.euclidean) * choice.scale_K + choice.shift_K
    )
    soft_DNS = torch.bmm(logits_NDK.softmax(-1).transpose(0, 1), choice.values_DKS)
    soft_NDS = soft_DNS.transpose(0, 1)
    # The difference is exactly zero: forward gives the very bits of eval mode.
    return choose(choice.values_DKS, choice.codes_ND).detach() + (soft_NDS - soft_NDS.detach())


def scores(queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, *, euclidean: bool) -> torch.Tensor:
    """Scores [N, D, K] (DPQ paper, eq. 3): dot products, or minus squared distances."""
    products_NDK = torch.bmm(queries_NDS.transpose(0, 1), keys_DKS.transpose(1, 2)).transpose(0, 1)
    if not euclidean:
        return products_NDK
    return 2 * products_NDK - queries_NDS.square().sum(-1, keepdim=True) - keys_DKS.square().sum(-1)


class _SoftmaxChoice(torch.autograd.Function):
    """By a kernel: weights exist in the backward pass alone, a query at a time; N x D x K numbers never do."""

    @staticmethod
    def forward(ctx: Any, *choice: Any) -> torch.Tensor:
        *inputs, values_DKS, scale_K, shift_K, codes_ND, ctx.euclidean = choice
        ctx.save_for_backward(*inputs, values_DKS, scale_K, shift_K)
        return choose(values_DKS, codes_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NDS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrays = (tensor.detach().float().contiguous().numpy() for tensor in (*ctx.saved_tensors, gradient_NDS))
        queries_NDX, keys_DKX, values_DKS, scale_K, shift_K, gradients_NDS = arrays
        gradients = kernels.softmax_gradients(
            queries_NDX, keys_DKX, values_DKS, (scale_K, shift_K), gradients_NDS, euclidean=ctx.euclidean
        )
        return (*map(torch.from_numpy, gradients), None, None)


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


class _FirstBackwardOnly(torch.autograd.Function):
    """The tensor as it is; its gradient is passed on in the first backward, and is zero in later ones.

    It stands at each tensor that a codebook loss is made of, not at the loss: a backward towards the queries alone must
    not use up the values' gradient.
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
