"""What moves keys and values by use rather than by gradients. In: a batch's queries and codes, the same on every rank.

`RunningMeans` makes each value the running mean of the queries it stands for; `Revival` finds codes that no row chooses
and draws queries for them to be placed on. Both add up over ranks, so that all ranks hold the same keys and values.
"""

from __future__ import annotations

import torch
from torch import nn

from dpq_rec.nn.collectives import rank, sum_over_ranks, world_size


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
        self.counts_MK: torch.Tensor
        self.sums_MKS: torch.Tensor
        self.register_buffer("counts_MK", torch.zeros(value_shape[:2], dtype=torch.float32, device=device))
        self.register_buffer("sums_MKS", torch.zeros(value_shape, dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Nothing was seen yet."""
        self.counts_MK.zero_()
        self.sums_MKS.zero_()

    def forget(self, group_P: torch.Tensor, code_P: torch.Tensor) -> None:
        """Nothing was seen yet of some codes."""
        self.counts_MK[group_P, code_P] = 0
        self.sums_MKS[group_P, code_P] = 0

    def begin(self, groups: slice, counts_GK: torch.Tensor, values_GKS: torch.Tensor) -> None:
        """As if all batches before had held these counts, and values were their means."""
        self.counts_MK[groups] = counts_GK
        self.sums_MKS[groups] = values_GKS * counts_GK[..., None]

    @torch.no_grad()
    def update(
        self,
        values_GKS: torch.Tensor,
        groups: slice,
        codes_ND: torch.Tensor,
        queries_NDS: torch.Tensor,
        counts_N: torch.Tensor,
    ) -> None:
        """Move values to their queries, in place.

        Args:
            values_GKS: the values of a level.
            groups: its part of the M groups.
            codes_ND: what was chosen.
            queries_NDS: by these queries.
            counts_N: occurrences of each row in the batch.
        """
        found = sums_by_code(codes_ND, queries_NDS, counts_N, values_GKS.shape)
        batch_GKS = sum_over_ranks(torch.cat([found[1], found[0][..., None]], -1))
        counts_GK, sums_GKS = self.counts_MK[groups], self.sums_MKS[groups]
        counts_GK.lerp_(batch_GKS[..., -1], 1 - self.decay)
        sums_GKS.lerp_(batch_GKS[..., :-1], 1 - self.decay)
        chosen_GK = batch_GKS[..., -1] > 0
        values_GKS[chosen_GK] = sums_GKS[chosen_GK] / counts_GK[chosen_GK][:, None]


def sums_by_code(
    codes_ND: torch.Tensor, queries_NDS: torch.Tensor, counts_N: torch.Tensor, value_shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a level's codes, on this rank: the occurrences [G, K] that chose each, and the sum [G, K, S] of their queries.

    Args:
        codes_ND: what was chosen.
        queries_NDS: by these queries.
        counts_N: occurrences of each row.
        value_shape: [G, K, S], of the level's values.
    """
    weights_ND1 = counts_N[:, None, None].expand(*codes_ND.shape, 1)
    seen_NDS = torch.cat([queries_NDS * weights_ND1, weights_ND1], -1)
    slots_ND = codes_ND + _first_slots(value_shape, codes_ND)
    sums_TS = seen_NDS.new_zeros(value_shape[0] * value_shape[1], seen_NDS.shape[2])
    sums_TS.index_add_(0, slots_ND.flatten(), seen_NDS.flatten(0, 1))
    sums_GKS = sums_TS.view(*value_shape[:2], -1)
    return sums_GKS[..., -1], sums_GKS[..., :-1]


class Revival(nn.Module):
    """Which codes were chosen by no row for how many batches, and queries to place them on.

    Args:
        code_shape: [M, K].
        after: batches after which a code is due.
        device: of the counts.
    """

    def __init__(self, code_shape: tuple[int, ...], after: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.after = after
        self.idle_MK: torch.Tensor
        self.num_draws: torch.Tensor
        self.register_buffer("idle_MK", torch.zeros(code_shape, dtype=torch.int64, device=device))
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        """Every code is as if just used."""
        self.idle_MK.zero_()
        self.num_draws.zero_()

    @torch.no_grad()
    def note_use(self, groups: slice, codes_ND: torch.Tensor) -> None:
        """Count what a level's batch chose, on any rank."""
        idle_GK = self.idle_MK[groups]
        used_T = torch.zeros_like(idle_GK).flatten()
        used_T[(codes_ND + _first_slots(idle_GK.shape, codes_ND)).flatten()] = 1
        used_GK = sum_over_ranks(used_T).view_as(idle_GK) > 0
        idle_GK += 1
        idle_GK[used_GK] = 0

    def due(self, groups: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups [P] (of all M) and codes [P] that were idle for long enough."""
        group_P, code_P = (self.idle_MK[groups] >= self.after).nonzero(as_tuple=True)
        return group_P + groups.start, code_P

    def draw(self, queries_NDS: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Queries [num_queries, D, S] of distinct rows of any rank, the same on every rank; none where there are none.

        Where more are asked for than there are, they come again.
        """
        if not num_queries:
            return queries_NDS[:0]
        rows_per_rank = torch.zeros(world_size(), dtype=torch.int64, device=queries_NDS.device)
        rows_per_rank[rank()] = len(queries_NDS)
        rows_per_rank = sum_over_ranks(rows_per_rank)
        total, first = int(rows_per_rank.sum()), int(rows_per_rank[: rank()].sum())
        if not total:
            return queries_NDS[:0]
        self.num_draws += 1
        generator = torch.Generator().manual_seed(int(self.num_draws))
        wanted_P = torch.randperm(total, generator=generator)[torch.arange(num_queries) % total]
        wanted_P = wanted_P.to(queries_NDS.device) - first
        mine_P = (wanted_P >= 0) & (wanted_P < len(queries_NDS))
        drawn_PDS = queries_NDS.new_zeros(num_queries, *queries_NDS.shape[1:])
        drawn_PDS[mine_P] = queries_NDS[wanted_P[mine_P]]
        return sum_over_ranks(drawn_PDS)


def _first_slots(code_shape: torch.Size, codes_ND: torch.Tensor) -> torch.Tensor:
    """Where the codes [K] of each subspace's group begin [D], the groups [G, K] being one behind the other."""
    num_groups, num_codes = code_shape[:2]
    return torch.arange(codes_ND.shape[1], device=codes_ND.device) % num_groups * num_codes
