"""The choice of a code by softmax (DPQ-SX). In: scores' ingredients and the chosen codes. Out: the chosen values.

Forward is the hard choice, backward the soft one: H = T(tau=1) - sg(T(tau=1) - T(tau=0)) (DPQ paper, eq. 5).
"""

from __future__ import annotations

import torch

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
    logits_NDK = scores(queries_NDS, keys_DKS, score) * affine.scale_K + affine.shift_K
    soft_DNS = torch.bmm(logits_NDK.softmax(-1).transpose(0, 1), values_DKS)
    soft_NDS = soft_DNS.transpose(0, 1)
    # The difference is exactly zero: forward gives the very bits of eval mode.
    return _chosen(values_DKS, codes_ND).detach() + (soft_NDS - soft_NDS.detach())


def _chosen(values_DKS: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    return values_DKS[torch.arange(len(values_DKS), device=codes_ND.device), codes_ND]
