"""Differentiable product quantization: a loop over levels. In: queries_NQ. Out: Quantized(codes_NM, vectors_NE, loss).

A query is cut into D groups; in each group the nearest of K keys is chosen, and its value replaces the group (DPQ
paper, eq. 1 and 2). With residual levels, level l encodes the residual, the query less the values of the levels before
it, and a vector is the sum over levels. Where a table has tiers, rows from a boundary on have the first levels only: of
ascending rows, those that have a level come first. Choosing has no gradient: `estimators` put one in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.codebook import Revival, RunningMeans, choose, import_faiss
from dpq_rec.nn.estimators import Softmax, StraightThrough
from dpq_rec.nn.finite import check_dtype, check_finite, training_inputs
from dpq_rec.nn.level import Level, ScoreNorm
from dpq_rec.nn.recompute import FirstRuns
from dpq_rec.nn.tracing import refuse_scripting, refused_elsewhere

NO_CODE = -1


class Quantized(NamedTuple):
    """Codes and vectors of queries, and the codebook loss.

    Attributes:
        codes_NM: the chosen codes (int64), level by level; NO_CODE in levels that a row does not have.
        vectors_NE: their values; in training, gradients flow to queries, keys and values.
        codebook_loss: scalar, to be minimised beside the loss (zero for DPQ-SX); averaged over ranks it is the mean
            over all occurrences on all ranks. It counts once: a second backward of the same forward gets zeros from it.
    """

    codes_NM: torch.Tensor
    vectors_NE: torch.Tensor
    codebook_loss: torch.Tensor


class Quantizer(nn.Module):
    """The quantizer of one table: its keys and values, queries -> codes -> vectors, and how they are trained.

    Two levels for vectors of two groups, in each of which they choose between two values:

    >>> config = DPQConfig(method="vq", num_subspaces=2, num_codes=2, num_levels=2, batch_norm=False)
    >>> quantizer = Quantizer(4, config)
    >>> first = [[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [2.0, -2.0]]]  # [D, K, S]
    >>> second = [[[0.0, 0.0], [0.5, -0.5]], [[0.0, 0.0], [0.5, 0.5]]]
    >>> quantizer.values_MKS.data = torch.tensor(first + second)  # [L * D, K, S]
    >>> query = torch.tensor([[1.25, 0.5, 0.0, 0.25]], requires_grad=True)
    >>> codes_NM, vectors_NE, codebook_loss = quantizer(query)
    >>> codes_NM.tolist()  # level 0: (1, 1) and (0, 0); it leaves (0.25, -0.5) and (0, 0.25) to level 1
    [[1, 0, 1, 0]]
    >>> vectors_NE.tolist()  # (1, 1) + (0.5, -0.5), and (0, 0) + (0, 0)
    [[1.5, 0.5, 0.0, 0.0]]
    >>> codebook_loss.item()  # (0.25**2 + 0.5**2 + 0.25**2) / 4 in level 0, (0.25**2 + 0.25**2) / 4 in level 1
    0.125
    >>> vectors_NE.sum().backward()
    >>> query.grad.tolist()  # straight through (DPQ paper, eq. 7)
    [[1.0, 1.0, 1.0, 1.0]]

    Args:
        embedding_dim: E.
        config: method, D, K and the rest.
        device: of the parameters.
        num_embeddings: V; wanted where the config has tiers.

    Attributes:
        values_MKS: the values [L*D, K, S], or [L, K, S] where the subspaces share them: what the artifact holds, but
            for rounding to its dtype.
        own_keys_MKS: keys apart from the values, or None.
        is_warming_up: whether tables hand out the queries themselves; see `dpq_rec.nn.warm_up`.

    Raises:
        ConfigError: num_subspaces does not divide embedding_dim; or tiers of a table of unknown size.
    """

    is_warming_up = False
    _is_fsdp_managed_module = False  # set by torch, where FSDP holds the parameters
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        embedding_dim: int,
        config: DPQConfig,
        device: torch.device | None = None,
        *,
        num_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        if config.tiers and num_embeddings is None:
            raise ConfigError("num_embeddings: got none with tiers, which are shares of it; give the table's rows")
        self.config = config
        self.tiers = config.tiers_of(num_embeddings or 0)
        self.query_dim = config.query_dim(embedding_dim)
        self.estimator = Softmax(config) if config.method == "sx" else StraightThrough(config)
        num_groups = config.num_levels * (1 if config.share_subspaces else config.num_subspaces)
        value_shape = (num_groups, config.num_codes, config.subspace_dim(embedding_dim))
        key_shape = (*value_shape[:2], self.query_dim // config.num_subspaces)
        fp32: Any = {"dtype": torch.float32, "device": device}  # whatever torch's default dtype is
        self.values_MKS = nn.Parameter(torch.empty(value_shape, **fp32), requires_grad=config.ema_decay is None)
        self.own_keys_MKS = None if config.keys_are_values else nn.Parameter(torch.empty(key_shape, **fp32))
        is_euclidean = config.resolved_metric == "euclidean"
        norms = [ScoreNorm(config.num_codes, euclidean=is_euclidean, device=device) for _ in range(config.num_levels)]
        self.score_norms = nn.ModuleList(norms if config.batch_norm else [])
        self.running_means = RunningMeans(value_shape, config.ema_decay, device) if config.ema_decay else None
        self.revival = Revival(value_shape[:2], config.revive_after, device) if config.revive_after else None
        self.first_runs = FirstRuns() if self.running_means or self.revival else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys and values on the scale of queries that the modules of `embedding` start with; statistics anew."""
        bound = (self.config.num_subspaces * self.values_MKS.shape[2]) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self._reset_statistics()

    def _reset_statistics(self) -> None:
        for module in (*self.score_norms, self.running_means, self.revival):
            if module is not None:
                module.reset_parameters()

    def resize(self, num_embeddings: int) -> None:
        """Follow a table to a new number of rows: tiers keep their rows, and new rows are of the last one."""
        kept = [(tier.first_row, tier.layout.num_levels) for tier in self.tiers[1:] if tier.first_row < num_embeddings]
        # A hundredth of a row more for each: shares rise, and come to the same rows, where tiers have none too.
        shares = tuple(((row + at / 100) / num_embeddings, levels) for at, (row, levels) in enumerate(kept, 1))
        self.config = replace(self.config, tiers=shares)
        self.tiers = self.config.tiers_of(num_embeddings)

    @torch.no_grad()
    def start(self, queries_NQ: torch.Tensor, rows_N: torch.Tensor | None = None, *, seed: int = 0) -> None:
        """Place keys and values by k-means of queries: each level's of what the levels before it left over.

        Keys become the centroids, and values the means of the queries that then choose them; values of another width
        than the keys stay. Statistics begin anew, with the sample as all that was seen. On several ranks every rank
        calls it with the same queries; `dpq_rec.nn.start` does that for a whole model.

        Args:
            queries_NQ: a sample, one row at least.
            rows_N: which rows these are, ascending; wanted where there are tiers. A level that none of them has stays.
            seed: of the clustering.

        Raises:
            ConfigError: a query that is not finite, or too large; nothing has changed.
            MissingDependencyError: faiss is not installed.
        """
        import_faiss()  # before anything changes
        queries_NQ = self._in_own_dtype(queries_NQ)
        check_finite(training_inputs(self, queries_NQ, rows_N, "quantizer", only_queries=True))
        self._reset_statistics()
        was_training, residual_NDS = self.training, self._grouped(queries_NQ)
        self.train()  # for the sample's statistics of the scores
        try:
            for level in self._levels(len(queries_NQ), rows_N):
                if level.num_rows:
                    residual_NDS = level.start(residual_NDS[: level.num_rows], seed + level.index)
        finally:
            self.train(was_training)

    def stored_values(self) -> torch.Tensor:
        """The values as the artifact holds them: rounded to its dtype, in fp32; the gradient passes as if not."""
        values_MKS = self.values_MKS
        if self.config.values_dtype == "float32":
            return values_MKS
        rounded_MKS = values_MKS.detach().half().to(values_MKS.dtype)
        return rounded_MKS + (values_MKS - values_MKS.detach())

    @refused_elsewhere
    def forward(
        self,
        queries_NQ: torch.Tensor,
        counts_N: torch.Tensor | None = None,
        rows_N: torch.Tensor | None = None,
        *,
        is_checked: bool = False,
    ) -> Quantized:
        """Codes and vectors of queries.

        Args:
            queries_NQ: raw vectors of distinct rows, [N, query_dim]; compared in the dtype of the keys.
            counts_N: how often each row occurs in the batch, once if not given: weighs batch norm and codebook loss.
            rows_N: which rows these are, ascending; wanted where there are tiers.
            is_checked: the caller has checked that what a forward in training reads is finite.

        Raises:
            ConfigError: keys and values in half precision; or, in training, numbers that are not finite, on every rank.
        """
        queries_NQ = self._in_own_dtype(queries_NQ)
        if not self.training:
            codes_NM = self.encode(queries_NQ, rows_N=rows_N)
            return Quantized(codes_NM, self.decode(codes_NM), queries_NQ.new_zeros(()))
        if counts_N is None:
            counts_N = queries_NQ.new_ones(len(queries_NQ))
        if not is_checked:
            check_finite(training_inputs(self, queries_NQ, rows_N, "quantizer"))
        like = queries_NQ.detach() if rows_N is None else rows_N
        run = None if self.first_runs is None else self.first_runs.of(self, like, counts_N)
        residual_NDS, codebook_loss = self._grouped(queries_NQ), queries_NQ.new_zeros(())
        codes: list[torch.Tensor] = []
        emitted: list[torch.Tensor] = []
        for level in self._levels(len(queries_NQ), rows_N):
            if emitted:
                residual_NDS = (residual_NDS - emitted[-1].detach())[: level.num_rows]
            level.revive(residual_NDS.detach())
            codebook = level.codebook()
            codebook = codebook if run is None else run.codebook(level.index, codebook)
            choice = level.choose(residual_NDS, counts_N[: level.num_rows], codebook)
            emitted_NDS, loss = self.estimator.emit(choice, residual_NDS, counts_N)
            level.update_statistics(choice.codes_ND, residual_NDS.detach(), counts_N[: level.num_rows])
            codes.append(choice.codes_ND)
            emitted.append(emitted_NDS)
            codebook_loss = codebook_loss + loss
        vectors_NE = self.estimator.pass_through(_sum_of_levels(emitted).flatten(1), queries_NQ)
        return Quantized(_side_by_side(codes), vectors_NE, codebook_loss)

    @torch.no_grad()
    def encode(
        self, queries_NQ: torch.Tensor, first_subspace: int = 0, rows_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes [N, M] (int64) as in eval mode, level by level: what `freeze` stores. NO_CODE where a level is missing.

        Args:
            queries_NQ: queries, or the columns of them that hold some subspaces, from the first on: a column shard's.
            first_subspace: the subspace that the first column belongs to.
            rows_N: which rows these are, ascending; wanted where there are tiers.
        """
        residual_NDS, codes = self._grouped(self._in_own_dtype(queries_NQ)), []
        subspaces = slice(first_subspace, first_subspace + residual_NDS.shape[1])
        for level in self._levels(len(queries_NQ), rows_N):
            residual_NDS = residual_NDS[: level.num_rows]
            choice = level.choose(residual_NDS, None, level.codebook(subspaces))
            codes.append(choice.codes_ND)
            if level.index + 1 < self.config.num_levels:
                residual_NDS = residual_NDS - choose(choice.values_DKS, choice.codes_ND)
        return _side_by_side(codes)

    def decode(self, codes_NM: torch.Tensor) -> torch.Tensor:
        """Vectors [N, E] of codes: each group is the sum of its levels' values, in order (DPQ paper, eq. 2).

        Levels in which a row has NO_CODE add nothing to it.
        """
        values_MKS = self.stored_values() + 0.0  # never minus zero, as an artifact holds none
        by_level = codes_NM.chunk(self.config.num_levels, 1)
        vectors_NDS = choose(Level(self, 0).of(values_MKS), by_level[0])
        for index, codes_ND in enumerate(by_level[1:], 1):
            values_DKS = Level(self, index).of(values_MKS)
            if self.config.tiers:
                (has_N,) = (codes_ND[:, 0] != NO_CODE).nonzero(as_tuple=True)
                vectors_NDS = vectors_NDS.index_add(0, has_N, choose(values_DKS, codes_ND[has_N]))
            else:
                vectors_NDS = vectors_NDS + choose(values_DKS, codes_ND)
        return vectors_NDS.flatten(1)

    def _levels(self, num_rows: int, rows_N: torch.Tensor | None) -> Iterator[Level]:
        """Every level, with how many of some ascending rows, from the first on, have it."""
        counts = [num_rows] * self.config.num_levels
        if self.config.tiers:
            if rows_N is None:
                raise ConfigError("rows_N: got none with tiers, which are told by the row; give the rows, ascending")
            firsts = torch.tensor([tier.first_row for tier in self.tiers[1:]], device=rows_N.device)
            starts = torch.searchsorted(rows_N, firsts).tolist()
            for start, tier in zip(reversed(starts), reversed(self.tiers[1:]), strict=True):
                counts[tier.layout.num_levels :] = [start] * (len(counts) - tier.layout.num_levels)
        for index, count in enumerate(counts):
            yield Level(self, index, count)

    def _in_own_dtype(self, queries_NQ: torch.Tensor) -> torch.Tensor:
        """Queries as keys are, in training, in eval mode and for `freeze`: bfloat16 would choose other codes."""
        check_dtype("quantizer", "keys and values", self.values_MKS.dtype, torch.float32, torch.float64)
        return queries_NQ.to(self.values_MKS.dtype)

    def _grouped(self, queries_NQ: torch.Tensor) -> torch.Tensor:
        width = self.query_dim // self.config.num_subspaces
        return queries_NQ.view(len(queries_NQ), queries_NQ.shape[1] // width, width)


def _sum_of_levels(emitted: list[torch.Tensor]) -> torch.Tensor:
    """Vectors [N, D, S] of what each level emitted, of as many rows as the level before or fewer, added in order."""
    vectors_NDS, complete = emitted[0], []
    for emitted_NDS in emitted[1:]:
        if len(emitted_NDS) < len(vectors_NDS):
            complete.append(vectors_NDS[len(emitted_NDS) :])
            vectors_NDS = vectors_NDS[: len(emitted_NDS)]
        vectors_NDS = vectors_NDS + emitted_NDS
    return torch.cat([vectors_NDS, *reversed(complete)]) if complete else vectors_NDS


def _side_by_side(codes: list[torch.Tensor]) -> torch.Tensor:
    """Codes [N, M] of those of each level, filled up with NO_CODE where a level is of fewer rows than the first."""
    return torch.cat([functional.pad(c_ND, (0, 0, 0, len(codes[0]) - len(c_ND)), value=NO_CODE) for c_ND in codes], 1)
