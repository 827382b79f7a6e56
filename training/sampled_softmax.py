"""Softmax of each example's own item against sampled candidates. In: vectors. Out: the loss, and its gradients.

The B x C scores set the time of a two-tower step. They are made a block of examples at a time, small enough to stay in
the cache, and the gradients are taken from a block while it is there: no score is kept for the backward pass, or made
anew in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_BLOCK_SCORES = 1 << 18  # 1 MB


def sampled_softmax(
    examples_BE: torch.Tensor,
    candidates_CE: torch.Tensor,
    own_B: torch.Tensor,
    items_B: torch.Tensor,
    rows_C: torch.Tensor,
    log_q_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of -log softmax of an example's own score among itself and its scores with candidates that are other items.

    That of one example is log(1 + sum over c of exp(s_c - own)), s_c = example . candidate_c - log_q_c, over the
    candidates whose row is not its own item.

    Args:
        examples_BE: vectors of examples (float).
        candidates_CE: vectors of candidates.
        own_B: score of each example with its own item; what is to be subtracted from it is already.
        items_B: row of each example's own item (int64), and
        rows_C: of each candidate.
        log_q_C: what is subtracted from the scores with a candidate, without a gradient; nothing where None.

    Returns:
        A number that can be differentiated once.
    """
    loss: torch.Tensor = _SampledSoftmax.apply(examples_BE, candidates_CE, own_B, items_B, rows_C, log_q_C)
    return loss


class _SampledSoftmax(torch.autograd.Function):
    """With p the softmax of an example, its loss moves with s_c by p_c, and with its own score by p_own - 1."""

    @staticmethod
    def forward(
        ctx: Any,
        examples_BE: torch.Tensor,
        candidates_CE: torch.Tensor,
        own_B: torch.Tensor,
        items_B: torch.Tensor,
        rows_C: torch.Tensor,
        log_q_C: torch.Tensor | None,
    ) -> torch.Tensor:
        to_examples_BE, to_candidates_EC = torch.empty_like(examples_BE), torch.zeros_like(candidates_CE.t())
        to_own_B, losses_B = torch.empty_like(own_B), torch.empty_like(own_B)
        first_B, last_B, order_C = _same_items(items_B, rows_C)
        num_rows = max(1, _BLOCK_SCORES // max(1, len(rows_C)))
        for start in range(0, len(items_B), num_rows):
            block = slice(start, start + num_rows)
            scores_bC = examples_BE[block] @ candidates_CE.t()
            if log_q_C is not None:
                scores_bC -= log_q_C
            scores_bC[_pairs(first_B[block], last_B[block], order_C)] = -torch.inf
            own_b = own_B[block]
            most_b = torch.maximum(scores_bC.amax(1), own_b) if len(rows_C) else own_b
            own_exp_b = (own_b - most_b).exp()
            exps_bC = scores_bC.sub_(most_b[:, None]).exp_()
            sums_b = exps_bC.sum(1) + own_exp_b
            losses_B[block] = sums_b.log() + most_b - own_b
            to_own_B[block] = own_exp_b / sums_b - 1
            softmax_bC = exps_bC.div_(sums_b[:, None])
            torch.mm(softmax_bC, candidates_CE, out=to_examples_BE[block])
            to_candidates_EC.addmm_(examples_BE[block].t(), softmax_bC)
        ctx.save_for_backward(to_examples_BE, to_candidates_EC, to_own_B)
        return losses_B.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_examples_BE, to_candidates_EC, to_own_B = ctx.saved_tensors
        to_each = to_loss / len(to_own_B)
        return to_examples_BE * to_each, (to_candidates_EC * to_each).t(), to_own_B * to_each, None, None, None


def _same_items(items_B: torch.Tensor, rows_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the candidates that are an example's own item begin and end in an order of the candidates, and that order.

    Few pairs of B x C are such. To compare all would take as long as the product that makes the scores.
    """
    sorted_C, order_C = rows_C.sort()
    return torch.searchsorted(sorted_C, items_B), torch.searchsorted(sorted_C, items_B, right=True), order_C


def _pairs(first_b: torch.Tensor, last_b: torch.Tensor, order_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Example and candidate of each pair of the same item."""
    counts_b = last_b - first_b
    examples_P = torch.repeat_interleave(counts_b)
    within_P = torch.arange(len(examples_P), device=order_C.device) - (counts_b.cumsum(0) - counts_b)[examples_P]
    return examples_P, order_C[first_b[examples_P] + within_P]
