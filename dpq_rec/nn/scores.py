"""How near a query is to each key. In: queries_NDS, keys_DKS. Out: scores_NDK, codes_ND, and the scores' batch norm.

Scores are dot products or minus squared Euclidean distances; the cosine is the dot product of `directions`.

Batch norm of the scores (DPQ paper, appendix C) keeps one mean and one variance per code, pooled over the batch and the
subspaces, so that every code is chosen now and then. A score is a polynomial of its query, so its mean and variance
follow from the moments of the queries, and N x D x K scores need not exist for them: DPQ-VQ never makes them, DPQ-SX
saves two passes over them, and ranks exchange D x S x S numbers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable

from dpq_rec import kernels
from dpq_rec.nn.collectives import sum_over_ranks
from dpq_rec.nn.recompute import recomputing

Score = Literal["dot", "euclidean"]
_ENCODE_CHUNK = 1 << 24  # scores in memory at a time where no kernel runs
_LEAST_SQUARE = 1e-12  # squared length below which a group has no direction


class Affine(NamedTuple):
    """Normalised score = scale[k] * score + shift[k]."""

    scale_K: torch.Tensor
    shift_K: torch.Tensor


class Moments(NamedTuple):
    """Mean and variance of each code's score."""

    mean_K: torch.Tensor
    var_K: torch.Tensor


def directions(groups_XS: torch.Tensor) -> torch.Tensor:
    """Groups [..., S] of length one, differentiable; each depends on itself alone, as `encode` wants it."""
    squared_X = groups_XS[..., 0].square()
    for s in range(1, groups_XS.shape[-1]):  # in order, never by a reduction, whose order differs with the shape
        squared_X = squared_X + groups_XS[..., s].square()
    return groups_XS / squared_X.clamp(min=_LEAST_SQUARE).sqrt()[..., None]


def scores(queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, score: Score) -> torch.Tensor:
    """Scores [N, D, K] (DPQ paper, eq. 3), differentiable."""
    products_NDK = torch.bmm(queries_NDS.transpose(0, 1), keys_DKS.transpose(1, 2)).transpose(0, 1)
    if score == "dot":
        return products_NDK
    return 2 * products_NDK - queries_NDS.square().sum(-1, keepdim=True) - keys_DKS.square().sum(-1)


@torch.no_grad()
def encode(queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, affine: Affine, score: Score) -> torch.Tensor:
    """Codes [N, D] (int64): the highest normalised score, the lowest code where several are as high (DPQ paper, eq. 1).

    A row's codes depend on the row alone: each score is summed over s in order, never by a matrix product, whose last
    bits differ with the size of the batch.
    """
    if queries_NDS.device.type == "cpu":
        arrays = _arrays(*(tensor.float() for tensor in (queries_NDS, keys_DKS, *affine)))
        codes_ND = kernels.encode(*arrays, euclidean=score == "euclidean")
        return torch.from_numpy(codes_ND).long()
    chunk = max(1, _ENCODE_CHUNK // keys_DKS[..., 0].numel())
    return torch.cat([_encode_chunk(part, keys_DKS, affine, score) for part in queries_NDS.split(chunk)])


def _encode_chunk(queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, affine: Affine, score: Score) -> torch.Tensor:
    scores_NDK = queries_NDS.new_zeros(*queries_NDS.shape[:2], keys_DKS.shape[1])
    for s in range(queries_NDS.shape[2]):
        query_ND1, key_1DK = queries_NDS[:, :, s, None], keys_DKS[None, :, :, s]
        if score == "euclidean":
            scores_NDK -= (key_1DK - query_ND1) ** 2
        else:
            scores_NDK += key_1DK * query_ND1
    normalised_NDK = scores_NDK * affine.scale_K + affine.shift_K
    # argmax leaves open which of several maxima it returns; the first is asked for by name.
    return (normalised_NDK == normalised_NDK.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def score_moments(
    queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, counts_N: torch.Tensor, score: Score
) -> tuple[Moments, torch.Tensor]:
    """Mean and variance of every code's score over all occurrences on all ranks and all subspaces, and their number.

    With m the mean query of a subspace, c = query - m and C = E[c c^T]:

    * dot: mean = key.m, variance = key^T C key.
    * minus squared distance, with d = key - m, r = c.c and t = E[r c]: mean = -(E[r] + d.d),
      variance = Var(r) + 4 d^T C d - 4 t.d.

    Pooled over the subspaces: the mean of the means; the mean of the variances plus the variance of the means.

    Args:
        queries_NDS: queries of the distinct rows on this rank.
        keys_DKS: keys.
        counts_N: occurrences of each row in the batch (float).
        score: which score.
    """
    _, D, S = queries_NDS.shape
    first = torch.cat([torch.einsum("n,nds->ds", counts_N, queries_NDS).flatten(), counts_N.sum()[None]])
    first = sum_over_ranks(first)
    count = first[-1].detach().clamp(min=1)
    mean_DS = first[:-1].view(D, S) / count
    moments = sum_over_ranks(_central_moments(queries_NDS, mean_DS, counts_N / count))
    covariance, third_DS, norms = moments.split([S * S, S, 2], 1)
    covariance_DSS, (norm_D, norm_squared_D) = covariance.view(D, S, S), norms.unbind(1)

    from_mean_DKS = keys_DKS if score == "dot" else keys_DKS - mean_DS[:, None]
    spread_DK = (torch.bmm(from_mean_DKS, covariance_DSS) * from_mean_DKS).sum(-1)
    if score == "dot":
        mean_DK, var_DK = torch.einsum("dks,ds->dk", keys_DKS, mean_DS), spread_DK
    else:
        mean_DK = -(norm_D[:, None] + from_mean_DKS.square().sum(-1))
        norm_var_D = norm_squared_D - norm_D.square()
        var_DK = norm_var_D[:, None] + 4 * spread_DK - 4 * torch.einsum("ds,dks->dk", third_DS, from_mean_DKS)
    mean_K = mean_DK.mean(0)
    var_K = (var_DK.clamp(min=0) + (mean_DK - mean_K).square()).mean(0)
    return Moments(mean_K, var_K), first[-1].detach()


def _central_moments(queries_NDS: torch.Tensor, mean_DS: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Weighted sums [D, S*S + S + 2] of c c^T, r c, r and r^2, with c = query - mean and r = c.c."""
    if queries_NDS.device.type == "cpu" and queries_NDS.dtype == torch.float32:
        moments: torch.Tensor = _CentralMoments.apply(queries_NDS, mean_DS, weights_N)
        return moments
    centred_NDS = queries_NDS - mean_DS
    squared_ND = centred_NDS.square().sum(-1)
    weighted_DNS = (centred_NDS * weights_N[:, None, None]).transpose(0, 1)
    parts = [
        torch.bmm(weighted_DNS.transpose(1, 2), centred_NDS.transpose(0, 1)).flatten(1),
        torch.bmm(weighted_DNS.transpose(1, 2), squared_ND.t().unsqueeze(-1)).flatten(1),
        torch.stack([weights_N @ squared_ND, weights_N @ squared_ND.square()], 1),
    ]
    return torch.cat(parts, 1)


class _CentralMoments(torch.autograd.Function):
    """The same by a kernel: one visit of the queries, each way, instead of products whose inner width is S."""

    @staticmethod
    def forward(ctx: Any, queries_NDS: torch.Tensor, mean_DS: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(queries_NDS, mean_DS, weights_N)
        return torch.from_numpy(kernels.central_moments(*_arrays(queries_NDS, mean_DS, weights_N)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_query = torch.from_numpy(kernels.central_moments_gradient(*_arrays(*ctx.saved_tensors, gradients)))
        return by_query, -by_query.sum(0), None


def _arrays(*tensors: torch.Tensor) -> tuple[NDArray[np.float32], ...]:
    return tuple(tensor.detach().float().contiguous().numpy() for tensor in tensors)


class ScoreNorm(nn.Module):
    """Batch norm of the scores, without scale and offset of its own: batch moments in training, running ones in eval.

    Args:
        num_codes: K.
        score: which score.
    """

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, num_codes: int, score: Score, device: torch.device | None = None) -> None:
        super().__init__()
        self.score: Score = score
        self.mean_K: torch.Tensor
        self.var_K: torch.Tensor
        self.num_batches: torch.Tensor
        self.register_buffer("mean_K", torch.zeros(num_codes, dtype=torch.float32, device=device))
        self.register_buffer("var_K", torch.ones(num_codes, dtype=torch.float32, device=device))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Nothing was seen yet: scores stay as they are. Not a no-op on a module that was built on meta."""
        self.mean_K.zero_()
        self.var_K.fill_(1)
        self.num_batches.zero_()

    def forward(self, queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, counts_N: torch.Tensor) -> Affine:
        """The affine that normalises this batch; in training the running moments move towards the batch's."""
        if not self.training:
            return self.running()
        moments, count = score_moments(queries_NDS, keys_DKS, counts_N, self.score)
        if not recomputing():
            self._follow(moments, count)
        return _affine(moments, self.epsilon)

    def running(self) -> Affine:
        """The affine of eval mode."""
        return _affine(Moments(self.mean_K, self.var_K), self.epsilon)

    @torch.no_grad()
    def _follow(self, moments: Moments, count: torch.Tensor) -> None:
        """A plain average over the first batches, so that the start leaves no trace; then exponential."""
        seen = (count > 0).to(self.num_batches.dtype)
        self.num_batches += seen
        step = seen * torch.clamp(1 / self.num_batches.clamp(min=1), min=self.momentum)
        self.mean_K.lerp_(moments.mean_K, step)
        self.var_K.lerp_(moments.var_K, step)


def _affine(moments: Moments, epsilon: float) -> Affine:
    scale_K = torch.rsqrt(moments.var_K + epsilon)
    return Affine(scale_K, -moments.mean_K * scale_K)
