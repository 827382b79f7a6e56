"""Gradient-free codebook updates: EMA, dead-code revival, k-means. In: a batch's groups and their codes.

`RunningMeans` (EMA) keeps each value at the running mean of the groups that chose it. `Revival` finds codes that no
group chooses and draws queries to put in their place (dead-code revival). Both add up over ranks, so that every rank
holds the same keys and values. `kmeans` places them before training; it needs faiss.

A level has G codebooks: one for each of the D subspaces, or one that all of them share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpq_rec.errors import MissingDependencyError
from dpq_rec.nn.collectives import rank, sum_over_ranks, world_size
from dpq_rec.nn.finite import Numbers, check_finite

_ITERATIONS = 20
_MAX_ROWS_PER_CENTROID = 256  # more change centroids by less than the noise of the sample
_JITTER = 1e-3  # of the spread: sets the copies of a row apart where there are fewer rows than centroids


def choose(values_DKS: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """The values [N, D, S] of codes (DPQ paper, eq. 2); the gradient goes to the values."""
    num_subspaces, num_codes, subspace_dim = values_DKS.shape
    # Of a flat table: a quarter of the time of indexing by subspace and code.
    flat_TS = values_DKS.reshape(-1, subspace_dim)
    return flat_TS.index_select(0, _slots(codes_ND, num_subspaces, num_codes)).view(*codes_ND.shape, subspace_dim)


def sums_by_code(
    codes_ND: torch.Tensor, queries_NDS: torch.Tensor, counts_N: torch.Tensor, code_shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """The occurrences [G, K] that chose each code of a level on this rank, and the sum [G, K, S] of their queries."""
    weights_ND1 = counts_N[:, None, None].expand(*codes_ND.shape, 1)
    weighted_NDS = torch.cat([queries_NDS * weights_ND1, weights_ND1], -1)
    sums_TS = weighted_NDS.new_zeros(code_shape.numel(), weighted_NDS.shape[2])
    sums_TS.index_add_(0, _slots(codes_ND, *code_shape), weighted_NDS.flatten(0, 1))
    sums_GKS = sums_TS.view(*code_shape, -1)
    return sums_GKS[..., -1], sums_GKS[..., :-1]


def _slots(codes_ND: torch.Tensor, num_codebooks: int, num_codes: int) -> torch.Tensor:
    """Where codes [N * D] stand in a table of G * K, each subspace's in the codebook that it has or shares."""
    first_D = torch.arange(codes_ND.shape[1], device=codes_ND.device) % num_codebooks * num_codes
    return (codes_ND + first_D).flatten()


class RunningMeans(nn.Module):
    """Values as exponential moving averages of their queries (Kaiser et al., 2018; van den Oord et al., 2017, app. A).

    Per batch, with n the occurrences that chose a code and s the sum of their queries: counts = decay * counts +
    (1 - decay) * n, sums likewise, value = sums / counts. A code keeps its first value until it is chosen.

    Args:
        value_shape: [M, K, S], of the values.
        decay: between 0 and 1.
        device: of the statistics.
    """

    def __init__(self, value_shape: tuple[int, ...], decay: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.decay = decay
        self.counts_MK = nn.Buffer(torch.zeros(value_shape[:2], dtype=torch.float32, device=device))
        self.sums_MKS = nn.Buffer(torch.zeros(value_shape, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Counts and sums of zero."""
        self.counts_MK.zero_()
        self.sums_MKS.zero_()

    @torch.no_grad()
    def update(
        self,
        values_GKS: torch.Tensor,
        groups: slice,
        codes_ND: torch.Tensor,
        queries_NDS: torch.Tensor,
        counts_N: torch.Tensor,
    ) -> None:
        """Move a level's values, in place, to the queries that chose them; `groups` are its part of the M groups."""
        new_counts_GK, new_sums_GKS = sums_by_code(codes_ND, queries_NDS, counts_N, values_GKS.shape[:2])
        batch_GKS = sum_over_ranks(torch.cat([new_sums_GKS, new_counts_GK[..., None]], -1))
        counts_GK, sums_GKS = self.counts_MK[groups], self.sums_MKS[groups]
        counts_GK.lerp_(batch_GKS[..., -1], 1 - self.decay)
        sums_GKS.lerp_(batch_GKS[..., :-1], 1 - self.decay)
        chosen_GK = batch_GKS[..., -1] > 0
        values_GKS[chosen_GK] = sums_GKS[chosen_GK] / counts_GK[chosen_GK][:, None]


class Revival(nn.Module):
    """Dead-code revival: for how many batches each code was chosen by no row, and queries to put in its place.

    Args:
        code_shape: [M, K].
        after: batches without use after which a code is reset.
        device: of the counts.
    """

    def __init__(self, code_shape: tuple[int, ...], after: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.after = after
        self.idle_MK = nn.Buffer(torch.zeros(code_shape, dtype=torch.int64, device=device))
        self.num_draws = nn.Buffer(torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        """Every code is as if just used."""
        self.idle_MK.zero_()
        self.num_draws.zero_()

    @torch.no_grad()
    def count(self, groups: slice, codes_ND: torch.Tensor) -> None:
        """Count a batch of a level: codes that no rank chose were idle for one batch more."""
        idle_GK = self.idle_MK[groups]
        used_T = torch.zeros_like(idle_GK).flatten()
        used_T[_slots(codes_ND, *idle_GK.shape)] = 1
        idle_GK += 1
        idle_GK[sum_over_ranks(used_T).view_as(idle_GK) > 0] = 0

    def draw(self, queries_NDS: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Queries [num_queries, D, S] of random distinct rows of all ranks, the same on every rank.

        Where more are wanted than there are, they come again; where there are none at all, none are returned.
        """
        if not num_queries:
            return queries_NDS[:0]
        rows_per_rank = torch.zeros(world_size(), dtype=torch.int64, device=queries_NDS.device)
        rows_per_rank[rank()] = len(queries_NDS)
        rows_per_rank = sum_over_ranks(rows_per_rank)
        total, first = int(rows_per_rank.sum()), int(rows_per_rank[: rank()].sum())
        if not total:
            return queries_NDS[:0]
        self.num_draws.add_(1)
        generator = torch.Generator().manual_seed(int(self.num_draws))
        wanted_P = torch.randperm(total, generator=generator)[torch.arange(num_queries) % total]
        wanted_P = wanted_P.to(queries_NDS.device) - first
        mine_P = (wanted_P >= 0) & (wanted_P < len(queries_NDS))
        drawn_PDS = queries_NDS.new_zeros(num_queries, *queries_NDS.shape[1:])
        drawn_PDS[mine_P] = queries_NDS[wanted_P[mine_P]]
        return sum_over_ranks(drawn_PDS)


def import_faiss() -> Any:
    """The module faiss.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise MissingDependencyError("faiss, which places keys and values by k-means,", "train") from error
    return faiss


def kmeans(groups_NDS: torch.Tensor, num_codes: int, *, shared: bool, spherical: bool, seed: int) -> torch.Tensor:
    """Centroids [D, K, S] of one row or more, or [1, K, S] where the subspaces share them; the same for the same input.

    Spherical ones are of directions, by cosine, and have length one.

    Raises:
        ConfigError: a group that is not finite.
        MissingDependencyError: faiss is not installed.
    """
    check_finite([Numbers("k-means", "group", groups_NDS, 0)])
    rows_DNS = groups_NDS.detach().float().transpose(0, 1).cpu().numpy()
    if shared:
        rows_DNS = rows_DNS.reshape(1, -1, rows_DNS.shape[2])
    found = [_cluster(rows_NS, num_codes, spherical, seed + d) for d, rows_NS in enumerate(rows_DNS)]
    return torch.from_numpy(np.stack(found)).to(groups_NDS)


def _cluster(rows_NS: NDArray[np.float32], num_codes: int, spherical: bool, seed: int) -> NDArray[np.float32]:
    # A power of two leaves the fractions as they are; squares of large numbers overflow, and faiss ends the process.
    scale = np.float32(np.exp2(np.floor(np.log2(np.abs(rows_NS).max(initial=0.0) or 1.0))))
    rows_NS = np.ascontiguousarray(rows_NS) / scale
    if len(rows_NS) <= num_codes:
        again = np.resize(np.arange(len(rows_NS)), num_codes)
        noise = np.random.default_rng(seed).standard_normal((num_codes, rows_NS.shape[1])).astype(np.float32)
        noise[: len(rows_NS)] = 0
        return (rows_NS[again] + noise * np.float32(_JITTER * (rows_NS.std() or 1.0))) * scale
    settings = {"niter": _ITERATIONS, "seed": seed, "spherical": spherical}
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": _MAX_ROWS_PER_CENTROID}
    clustering = import_faiss().Kmeans(rows_NS.shape[1], num_codes, **settings, **limits)
    clustering.train(rows_NS)
    centroids_KS: NDArray[np.float32] = clustering.centroids
    return centroids_KS if spherical else centroids_KS * scale
