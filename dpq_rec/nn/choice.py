"""The values of chosen codes. In: values_DKS, codes_ND; for DPQ-SX what the scores are made of. Out: chosen_NDS.

Under DPQ-SX forward is the hard choice, backward the soft one: H = T(tau=1) - sg(T(tau=1) - T(tau=0)) (DPQ paper,
eq. 5). On CPU the soft choice exists in the backward pass alone, a query at a time: N x D x K scores never do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from dpq_rec import kernels
from dpq_rec.nn.scores import Affine, Score, scores


def choose(values_DKS: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """The values [N, D, S] of codes; the gradient goes to the values."""
    num_subspaces, num_codes, subspace_dim = values_DKS.shape
    slots_ND = codes_ND + torch.arange(0, num_subspaces * num_codes, num_codes, device=codes_ND.device)
    # Of a flat table: a quarter of the time of indexing by subspace and code.
    chosen_TS = values_DKS.reshape(-1, subspace_dim).index_select(0, slots_ND.flatten())
    return chosen_TS.view(*codes_ND.shape, subspace_dim)


class Compared(NamedTuple):
    """Queries, what they were compared with, and the codes that won.

    Attributes:
        queries_NDX: as they were compared; X may differ from S.
        keys_DKX: what with.
        values_DKS: what the codes stand for.
        affine: of the scores.
        codes_ND: the highest normalised scores (int64).
    """

    queries_NDX: torch.Tensor
    keys_DKX: torch.Tensor
    values_DKS: torch.Tensor
    affine: Affine
    codes_ND: torch.Tensor


def softmax_choice(compared: Compared, *, score: Score, temperature: float, hard_values: bool = False) -> torch.Tensor:
    """The values [N, D, S] of the codes, with the gradients of the mixture by softmax of the scores / temperature.

    With hard values that is the gradient of queries and keys alone: the values have the gradient of the choice.

    Args:
        compared: queries, keys, values and the codes that were chosen.
        score: which score.
        temperature: of the softmax (DPQ paper, eq. 4).
        hard_values: whether a value is moved by the groups that chose it alone.
    """
    if hard_values:
        fixed = compared._replace(values_DKS=compared.values_DKS.detach())
        chosen_NDS = choose(compared.values_DKS, compared.codes_ND)
        # The difference is exactly zero.
        return softmax_choice(fixed, score=score, temperature=temperature) + (chosen_NDS - chosen_NDS.detach())
    affine = Affine(compared.affine.scale_K / temperature, compared.affine.shift_K / temperature)
    compared = compared._replace(affine=affine)
    queries_NDX = compared.queries_NDX
    if queries_NDX.device.type == "cpu" and queries_NDX.dtype == torch.float32:
        return _SoftmaxChoice.apply(*compared[:3], *affine, compared.codes_ND, score)
    return composed(compared, score)


def composed(compared: Compared, score: Score) -> torch.Tensor:
    """The same out of torch's own operations, on any device and in any precision, at temperature 1."""
    queries_NDX, keys_DKX, values_DKS, affine, codes_ND = compared
    logits_NDK = scores(queries_NDX, keys_DKX, score) * affine.scale_K + affine.shift_K
    soft_DNS = torch.bmm(logits_NDK.softmax(-1).transpose(0, 1), values_DKS)
    soft_NDS = soft_DNS.transpose(0, 1)
    # The difference is exactly zero: forward gives the very bits of eval mode.
    return choose(values_DKS, codes_ND).detach() + (soft_NDS - soft_NDS.detach())


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
        return choose(values_DKS, codes_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NDS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrays = (tensor.detach().float().contiguous().numpy() for tensor in (*ctx.saved_tensors, gradient_NDS))
        queries_NDS, keys_DKS, values_DKS, scale_K, shift_K, gradients_NDS = arrays
        gradients = kernels.softmax_gradients(
            queries_NDS, keys_DKS, values_DKS, (scale_K, shift_K), gradients_NDS, euclidean=ctx.score == "euclidean"
        )
        return (*map(torch.from_numpy, gradients), None, None)
