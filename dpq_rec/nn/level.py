"""One residual level of a quantizer. In: residuals of queries, less the values of earlier levels. Out: Choice.

The code of a group is the key with the highest score: the dot product, minus the squared Euclidean distance, or the
cosine, which is the dot product of `directions`. Batch norm of the scores (DPQ paper, appendix C) keeps one mean and
one variance per code, pooled over the batch and the subspaces, so that every code is chosen now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable

from dpq_rec import kernels
from dpq_rec.nn.codebook import choose, kmeans, sums_by_code
from dpq_rec.nn.collectives import sum_over_ranks
from dpq_rec.nn.recompute import Codebook, recomputing

if TYPE_CHECKING:
    from dpq_rec.nn.quantizer import Quantizer

_ENCODE_CHUNK = 1 << 24  # scores in memory at a time where no kernel runs
_LEAST_SQUARE = 1e-12  # squared length below which a group has no direction


class Choice(NamedTuple):
    """The codes that a level chose, and what they were chosen from.

    Attributes:
        queries_NDX: residuals of the queries, of length one for cosines; X, the width of a key, may differ from S.
        keys_DKX: the keys that they were compared with.
        values_DKS: the values of the codes.
        scale_K: the normalised score of a code is scale * score + shift.
        shift_K: likewise.
        codes_ND: the code with the highest normalised score (int64).
        euclidean: whether the score is minus the squared distance, not the dot product.
    """

    queries_NDX: torch.Tensor
    keys_DKX: torch.Tensor
    values_DKS: torch.Tensor
    scale_K: torch.Tensor
    shift_K: torch.Tensor
    codes_ND: torch.Tensor
    euclidean: bool


class Level:
    """One level of a quantizer: its keys, values and statistics, and the choice of codes by them.

    Args:
        quantizer: whose level.
        index: l, from 0.
        num_rows: how many of a batch's rows have it, from the first on: with tiers, rows at the end have fewer levels.
    """

    def __init__(self, quantizer: Quantizer, index: int, num_rows: int = 0) -> None:
        self.quantizer, self.config, self.index, self.num_rows = quantizer, quantizer.config, index, num_rows
        num_groups = len(quantizer.values_MKS) // self.config.num_levels
        self.groups = slice(index * num_groups, (index + 1) * num_groups)

    def of(self, tensor_MKS: torch.Tensor) -> torch.Tensor:
        """The level's keys or values [D, K, S]; the same for every subspace where they are shared."""
        return tensor_MKS[self.groups].expand(self.config.num_subspaces, -1, -1)

    def codebook(self, subspaces: slice = slice(None)) -> Codebook:
        """The level's values and keys."""
        quantizer = self.quantizer
        values_DKS = self.of(quantizer.stored_values())[subspaces]
        own_keys_MKS = quantizer.own_keys_MKS
        keys_DKX = values_DKS if own_keys_MKS is None else self.of(own_keys_MKS)[subspaces]
        # EMA and revival may write before this forward's backward, which must find what was compared; and FSDP frees
        # its weights, which it cannot while numpy looks at them.
        if quantizer._is_fsdp_managed_module or (quantizer.training and quantizer.first_runs is not None):
            values_DKS, keys_DKX = values_DKS.clone(), keys_DKX.clone()
        return values_DKS, keys_DKX

    def choose(self, residual_NDS: torch.Tensor, counts_N: torch.Tensor | None, codebook: Codebook) -> Choice:
        """Choose codes (DPQ paper, eq. 1); the batch's own statistics count where `counts_N` is given."""
        queries_NDX, (values_DKS, keys_DKX) = residual_NDS, codebook
        if self.config.resolved_metric == "cosine":
            queries_NDX, keys_DKX = directions(queries_NDX), directions(keys_DKX)
        scale_K, shift_K = keys_DKX.new_ones(self.config.num_codes), keys_DKX.new_zeros(self.config.num_codes)
        if self.config.batch_norm:
            # DPQ-VQ has no gradient that passes the scores.
            with torch.set_grad_enabled(self.config.method == "sx" and torch.is_grad_enabled()):
                scale_K, shift_K = self.quantizer.score_norms[self.index](queries_NDX, keys_DKX, counts_N)
        euclidean = self.config.resolved_metric == "euclidean"
        codes_ND = encode(queries_NDX, keys_DKX, scale_K, shift_K, euclidean=euclidean)
        return Choice(queries_NDX, keys_DKX, values_DKS, scale_K, shift_K, codes_ND, euclidean)

    @torch.no_grad()
    def revive(self, residual_NDS: torch.Tensor) -> None:
        """Reset codes that were idle for long to queries of this batch: the same ones on every rank."""
        quantizer, revival = self.quantizer, self.quantizer.revival
        if revival is None or recomputing():
            return
        group_P, code_P = (revival.idle_MK[self.groups] >= revival.after).nonzero(as_tuple=True)
        group_P = group_P + self.groups.start
        drawn_PDS = revival.draw(residual_NDS, len(code_P))
        if not len(drawn_PDS):
            return
        at_P = torch.arange(len(code_P), device=code_P.device)
        subspace_P = at_P % self.config.num_subspaces if self.config.share_subspaces else group_P - self.groups.start
        # Through `data`: a forward whose backward is still to come holds copies (see `codebook`).
        values_MKS = quantizer.values_MKS.data
        if quantizer.own_keys_MKS is None:
            values_MKS[group_P, code_P] = drawn_PDS[at_P, subspace_P]
        else:  # the query keeps the value that it has, now from a code nearer to it
            now_P = self.choose(drawn_PDS, None, self.codebook()).codes_ND[at_P, subspace_P]
            values_MKS[group_P, code_P] = values_MKS[group_P, now_P]
            quantizer.own_keys_MKS.data[group_P, code_P] = drawn_PDS[at_P, subspace_P]
        revival.idle_MK[group_P, code_P] = 0
        if quantizer.running_means is not None:
            quantizer.running_means.counts_MK[group_P, code_P] = 0
            quantizer.running_means.sums_MKS[group_P, code_P] = 0

    def update_statistics(self, codes_ND: torch.Tensor, residual_NDS: torch.Tensor, counts_N: torch.Tensor) -> None:
        """Update running means and counts of idle codes by a batch: once, however often its forward runs."""
        if recomputing():
            return
        quantizer = self.quantizer
        if quantizer.running_means is not None:
            values_GKS = quantizer.values_MKS.data[self.groups]
            quantizer.running_means.update(values_GKS, self.groups, codes_ND, residual_NDS, counts_N)
        if quantizer.revival is not None:
            quantizer.revival.count(self.groups, codes_ND)

    def start(self, residual_NDS: torch.Tensor, seed: int) -> torch.Tensor:
        """Place keys and values by k-means of a sample; the residuals of the sample are returned."""
        config, quantizer, groups = self.config, self.quantizer, self.groups
        spherical = config.resolved_metric == "cosine"
        keys_GKX = kmeans(residual_NDS, config.num_codes, shared=config.share_subspaces, spherical=spherical, seed=seed)
        (quantizer.values_MKS if quantizer.own_keys_MKS is None else quantizer.own_keys_MKS).data[groups] = keys_GKX
        ones_N = residual_NDS.new_ones(len(residual_NDS))
        codes_ND = self.choose(residual_NDS, ones_N, self.codebook()).codes_ND
        values_GKS = quantizer.values_MKS.data[groups]
        if keys_GKX.shape != values_GKS.shape:
            return residual_NDS
        counts_GK, sums_GKS = sums_by_code(codes_ND, residual_NDS, ones_N, keys_GKX.shape[:2])
        means_GKS = sums_GKS / counts_GK.clamp(min=1)[..., None]
        if quantizer.own_keys_MKS is not None:
            values_GKS[counts_GK > 0] = means_GKS[counts_GK > 0]
        elif spherical:  # as long as its queries are along it, which leaves the choice as it is
            lengths_GK = (means_GKS * keys_GKX).sum(-1)
            values_GKS[lengths_GK > 0] *= lengths_GK[lengths_GK > 0][:, None]
        if quantizer.running_means is not None:  # as if all batches before had held the sample
            quantizer.running_means.counts_MK[groups] = counts_GK
            quantizer.running_means.sums_MKS[groups] = values_GKS * counts_GK[..., None]
        return residual_NDS - choose(self.of(quantizer.stored_values()), codes_ND)


def directions(groups_XS: torch.Tensor) -> torch.Tensor:
    """Groups [..., S] of length one, differentiable; each depends on itself alone, as `encode` wants it."""
    squared_X = groups_XS[..., 0].square()
    for s in range(1, groups_XS.shape[-1]):  # in order, never by a reduction, whose order differs with the shape
        squared_X = squared_X + groups_XS[..., s].square()
    return groups_XS / squared_X.clamp(min=_LEAST_SQUARE).sqrt()[..., None]


@torch.no_grad()
def encode(
    queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, scale_K: torch.Tensor, shift_K: torch.Tensor, *, euclidean: bool
) -> torch.Tensor:
    """Codes [N, D] (int64): the highest normalised score, the lowest code where several are as high (DPQ paper, eq. 1).

    A row's codes depend on the row alone: each score is summed over s in order, never by a matrix product, whose last
    bits differ with the size of the batch.
    """
    if queries_NDS.device.type == "cpu":
        arrays = _arrays(*(tensor.float() for tensor in (queries_NDS, keys_DKS, scale_K, shift_K)))
        return torch.from_numpy(kernels.encode(*arrays, euclidean=euclidean)).long()
    chunk = max(1, _ENCODE_CHUNK // keys_DKS[..., 0].numel())
    parts = queries_NDS.split(chunk)
    return torch.cat([_encode_chunk(part, keys_DKS, scale_K, shift_K, euclidean=euclidean) for part in parts])


def _encode_chunk(
    queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, scale_K: torch.Tensor, shift_K: torch.Tensor, *, euclidean: bool
) -> torch.Tensor:
    scores_NDK = queries_NDS.new_zeros(*queries_NDS.shape[:2], keys_DKS.shape[1])
    for s in range(queries_NDS.shape[2]):
        query_ND1, key_1DK = queries_NDS[:, :, s, None], keys_DKS[None, :, :, s]
        if euclidean:
            scores_NDK -= (key_1DK - query_ND1) ** 2
        else:
            scores_NDK += key_1DK * query_ND1
    normalised_NDK = scores_NDK * scale_K + shift_K
    # argmax leaves open which of several maxima it returns; the first is taken by hand.
    return (normalised_NDK == normalised_NDK.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def score_moments(
    queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, counts_N: torch.Tensor, *, euclidean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [K] and variance [K] of every code's score over the occurrences on all ranks, and the number of these.

    They are pooled over the subspaces, and differentiable.

    A score is a polynomial of its query, so they follow from the moments of the queries: N x D x K scores need not
    exist for them, and ranks exchange D x S x S numbers.

    With m the mean query of a subspace, c = query - m and C = E[c c^T]:

    * dot: mean = key.m, variance = key^T C key.
    * minus squared distance, with d = key - m, r = c.c and t = E[r c]: mean = -(E[r] + d.d),
      variance = Var(r) + 4 d^T C d - 4 t.d.

    Pooled over the subspaces: the mean of the means; the mean of the variances plus the variance of the means.
    """
    _, D, S = queries_NDS.shape
    first = torch.cat([torch.einsum("n,nds->ds", counts_N, queries_NDS).flatten(), counts_N.sum()[None]])
    first = sum_over_ranks(first)
    count = first[-1].detach().clamp(min=1)
    mean_DS = first[:-1].view(D, S) / count
    moments = sum_over_ranks(_central_moments(queries_NDS, mean_DS, counts_N / count))
    covariance, third_DS, norms = moments.split([S * S, S, 2], 1)
    covariance_DSS, (norm_D, norm_squared_D) = covariance.view(D, S, S), norms.unbind(1)

    from_mean_DKS = keys_DKS - mean_DS[:, None] if euclidean else keys_DKS
    spread_DK = (torch.bmm(from_mean_DKS, covariance_DSS) * from_mean_DKS).sum(-1)
    if euclidean:
        mean_DK = -(norm_D[:, None] + from_mean_DKS.square().sum(-1))
        norm_var_D = norm_squared_D - norm_D.square()
        var_DK = norm_var_D[:, None] + 4 * spread_DK - 4 * torch.einsum("ds,dks->dk", third_DS, from_mean_DKS)
    else:
        mean_DK, var_DK = torch.einsum("dks,ds->dk", keys_DKS, mean_DS), spread_DK
    mean_K = mean_DK.mean(0)
    var_K = (var_DK.clamp(min=0) + (mean_DK - mean_K).square()).mean(0)
    return mean_K, var_K, first[-1].detach()


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
    """`_central_moments` by a kernel: one pass over the queries each way, not products whose inner width is S."""

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
    """Batch norm of scores without scale and offset of its own: a batch's moments in training, running ones in eval."""

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, num_codes: int, *, euclidean: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self.euclidean = euclidean
        self.mean_K = nn.Buffer(torch.zeros(num_codes, dtype=torch.float32, device=device))
        self.var_K = nn.Buffer(torch.ones(num_codes, dtype=torch.float32, device=device))
        self.num_batches = nn.Buffer(torch.zeros((), dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """No batches yet: scores stay as they are. Not a no-op on a module that was built on meta."""
        self.mean_K.zero_()
        self.var_K.fill_(1)
        self.num_batches.zero_()

    def forward(
        self, queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, counts_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale [K] and shift [K] that normalise this batch; in training the running moments move towards its own.

        Without counts they are those of eval mode.
        """
        mean_K: torch.Tensor = self.mean_K
        var_K: torch.Tensor = self.var_K
        if self.training and counts_N is not None:
            mean_K, var_K, num_occurrences = score_moments(queries_NDS, keys_DKS, counts_N, euclidean=self.euclidean)
            if not recomputing():
                self._update(mean_K, var_K, num_occurrences)
        scale_K = torch.rsqrt(var_K + self.epsilon)
        return scale_K, -mean_K * scale_K

    @torch.no_grad()
    def _update(self, mean_K: torch.Tensor, var_K: torch.Tensor, num_occurrences: torch.Tensor) -> None:
        """Running moments: a plain average of the first batches, so that no start is left in them; then exponential."""
        has_rows = (num_occurrences > 0).to(self.num_batches.dtype)
        self.num_batches.add_(has_rows)
        step = has_rows * torch.clamp(1 / self.num_batches.clamp(min=1), min=self.momentum)
        self.mean_K.lerp_(mean_K, step)
        self.var_K.lerp_(var_K, step)
