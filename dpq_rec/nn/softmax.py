"""The choice of a code by softmax (DPQ-SX). In: scores' ingredients and the chosen codes. Out: the chosen values.

Forward is the hard choice, backward the soft one: H = T(tau=1) - sg(T(tau=1) - T(tau=0)) (DPQ paper, eq. 5). On CPU the
soft choice exists in the backward pass alone, a query at a time, so that N x D x K scores never do.
"""

from __future__ import annotations

from typing import Any

import torch

from dpq_rec import kernels
from dpq_rec.nn.scores import Affine, Score, scores


def softmax_choice(
    queries_NDS: torch.Tensor,
    keys_DKS: torch.Tensor,
    values_DKS: torch.Tensor,
    affine: Affine,
    codes_ND: torch.Tensor,
    *,
    score: Score,
    temperature: float,
) -> torch.Tensor:
    """The values [N, D, S] of the codes, with the gradients of the mixture by softmax of the scores / temperature.

    Args:
        queries_NDS: what is compared with the keys, which may be narrower or wider than the values.
        keys_DKS: keys.
        values_DKS: values.
        affine: of the scores.
        codes_ND: the chosen codes.
        score: which score.
        temperature: of the softmax (DPQ paper, eq. 4).
    """
    affine = Affine(affine.scale_K / temperature, affine.shift_K / temperature)
    if queries_NDS.device.type == "cpu" and queries_NDS.dtype == torch.float32:
        return _SoftmaxChoice.apply(queries_NDS, keys_DKS, values_DKS, *affine, codes_ND, score)
    return composed(queries_NDS, keys_DKS, values_DKS, affine, codes_ND, score)


def composed(
    queries_NDS: torch.Tensor,
    keys_DKS: torch.Tensor,
    values_DKS: torch.Tensor,
    affine: Affine,
    codes_ND: torch.Tensor,
    score: Score,
) -> torch.Tensor:
    """The same out of torch's own operations, on any device and in any precision."""
    logits_NDK = scores(queries_NDS, keys_DKS, score) * affine.scale_K + affine.shift_K
    soft_DNS = torch.bmm(logits_NDK.softmax(-1).transpose(0, 1), values_DKS)
    soft_NDS = soft_DNS.transpose(0, 1)
    # The difference is exactly zero: forward gives the very bits of eval mode.
    return _chosen(values_DKS, codes_ND).detach() + (soft_NDS - soft_NDS.detach())


def _chosen(values_DKS: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    return values_DKS[torch.arange(len(values_DKS), device=codes_ND.device), codes_ND]


class _SoftmaxChoice(torch.autograd.Function):
    """Hard forward; backward by `kernels.softmax_gradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_NDS: torch.Tensor,
        keys_DKS: torch.Tensor,
        values_DKS: torch.Tensor,
        scale_K: torch.Tensor,
        shift_K: torch.Tensor,
        codes_ND: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        ctx.save_for_backward(queries_NDS, keys_DKS, values_DKS, scale_K, shift_K)
        ctx.score = score
        return _chosen(values_DKS, codes_ND)

    @staticmethod
    def backward(ctx: Any, gradient_NDS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrays = (tensor.detach().contiguous().numpy() for tensor in (*ctx.saved_tensors, gradient_NDS))
        queries_NDS, keys_DKS, values_DKS, scale_K, shift_K, gradients_NDS = arrays
        gradients = kernels.softmax_gradients(
            queries_NDS, keys_DKS, values_DKS, (scale_K, shift_K), gradients_NDS, euclidean=ctx.score == "euclidean"
        )
        return (*map(torch.from_numpy, gradients), None, None)
