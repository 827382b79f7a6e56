"""Differentiable product quantization. In: queries_NQ. Out: Quantized(codes_NM, vectors_NE, codebook_loss).

A query is cut into D groups; in each group the nearest of K keys is chosen, and its value replaces the group (DPQ
paper, eq. 1 and 2). With residual levels, level l chooses for what the query has left when the values of the levels
before it are taken away, and a vector is the sum over levels. Where a table has tiers, rows from a boundary on have the
first levels only: in ascending rows, a level is of those at the front. The choice has no gradient; the two methods put
different ones in its place:

* DPQ-SX: in the backward pass the choice is a softmax of the scores (eq. 5).
* DPQ-VQ: the gradient of the vector is given to the query as it is (eq. 7). Keys are the values, and a codebook
  loss draws each value to the queries that it stands for; or it is their running mean (`upkeep`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.choice import Compared, choose, softmax_choice
from dpq_rec.nn.codebook_loss import codebook_loss
from dpq_rec.nn.finite import check_dtype, check_finite, read_by, sample
from dpq_rec.nn.kmeans import centroids, check_faiss
from dpq_rec.nn.recompute import Codebook, FirstRuns, recomputing
from dpq_rec.nn.scores import Affine, Score, ScoreNorm, directions, encode
from dpq_rec.nn.tracing import refuse_scripting, refused_elsewhere
from dpq_rec.nn.upkeep import Revival, RunningMeans, sums_by_code

NO_CODE = -1


class Quantized(NamedTuple):
    """What the quantizer makes of queries.

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
    """Keys and values of one table, and how they are chosen and trained.

    `values_MKS` are the values [L*D, K, S], or [L, K, S] where the subspaces share them: what the artifact holds, but
    for rounding to its dtype. `own_keys_MKS` are keys apart from the values, or None.

    Args:
        embedding_dim: E.
        config: method, D, K and the rest.
        device: of the parameters.
        num_embeddings: V; wanted where the config has tiers.

    Attributes:
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
        self.score: Score = "euclidean" if config.resolved_metric == "euclidean" else "dot"
        num_groups = config.num_levels * (1 if config.share_subspaces else config.num_subspaces)
        value_shape = (num_groups, config.num_codes, config.subspace_dim(embedding_dim))
        key_shape = (*value_shape[:2], self.query_dim // config.num_subspaces)
        learned = config.ema_decay is None
        fp32: Any = {"dtype": torch.float32, "device": device}  # whatever torch's default dtype is
        self.values_MKS = nn.Parameter(torch.empty(value_shape, **fp32), requires_grad=learned)
        self.own_keys_MKS = None if config.keys_are_values else nn.Parameter(torch.empty(key_shape, **fp32))
        norms = [ScoreNorm(config.num_codes, self.score, device) for _ in range(config.num_levels)]
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
        self._forget()

    def resize(self, num_embeddings: int) -> None:
        """Tell it that its table has so many rows now: tiers keep theirs, and rows that are new are of the last one."""
        kept = [(tier.first_row, tier.layout.num_levels) for tier in self.tiers[1:] if tier.first_row < num_embeddings]
        # A hundredth of a row more for each: shares rise, and come to the same rows, where tiers have none too.
        shares = tuple(((row + at / 100) / num_embeddings, levels) for at, (row, levels) in enumerate(kept, 1))
        self.config = replace(self.config, tiers=shares)
        self.tiers = self.config.tiers_of(num_embeddings)

    def _forget(self) -> None:
        """Statistics anew; keys and values stay."""
        for keeper in (*self.score_norms, self.running_means, self.revival):
            if keeper is not None:
                keeper.reset_parameters()

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
        check_faiss()
        queries_NQ = self._in_own_dtype(queries_NQ)
        check_finite([sample(self, queries_NQ, rows_N, "quantizer")])
        self._forget()
        was_training, rest_NDS = self.training, self._grouped(queries_NQ)
        self.train()  # for the sample's statistics of the scores
        try:
            for number, num_rows in enumerate(self._rows_by_level(len(queries_NQ), rows_N)):
                if num_rows:
                    rest_NDS = self._start_level(number, rest_NDS[:num_rows], seed + number)
        finally:
            self.train(was_training)

    def _start_level(self, number: int, rest_NDS: torch.Tensor, seed: int) -> torch.Tensor:
        """Place a level's keys and values; what they leave over of the queries."""
        config, groups = self.config, self._groups(number)
        spherical = config.resolved_metric == "cosine"
        found_GKS = centroids(rest_NDS, config.num_codes, shared=config.share_subspaces, spherical=spherical, seed=seed)
        (self.values_MKS if self.own_keys_MKS is None else self.own_keys_MKS).data[groups] = found_GKS
        ones_N = rest_NDS.new_ones(len(rest_NDS))
        codes_ND = self._compare(number, rest_NDS, ones_N, self._codebook(number)).codes_ND
        values_GKS = self.values_MKS.data[groups]
        if found_GKS.shape != values_GKS.shape:
            return rest_NDS
        counts_GK, sums_GKS = sums_by_code(codes_ND, rest_NDS, ones_N, found_GKS.shape)
        means_GKS = sums_GKS / counts_GK.clamp(min=1)[..., None]
        if self.own_keys_MKS is not None:
            values_GKS[counts_GK > 0] = means_GKS[counts_GK > 0]
        elif spherical:  # as long as its queries are along it, which leaves the choice as it is
            lengths_GK = (means_GKS * found_GKS).sum(-1)
            values_GKS[lengths_GK > 0] *= lengths_GK[lengths_GK > 0][:, None]
        if self.running_means is not None:
            self.running_means.begin(groups, counts_GK, values_GKS)
        return rest_NDS - choose(self._of_level(self.stored_values(), number), codes_ND)

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
            counts_N: how often each row occurs in the batch; once each if not given. Weighs batch norm and the
                codebook loss.
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
            check_finite(read_by(self, queries_NQ, rows_N, "quantizer"))
        like = queries_NQ.detach() if rows_N is None else rows_N
        run = None if self.first_runs is None else self.first_runs.of(self, like, counts_N)
        rest_NDS, vectors_NDS, loss = self._grouped(queries_NQ), None, queries_NQ.new_zeros(())
        codes: list[torch.Tensor] = []
        done: list[torch.Tensor] = []  # vectors of rows that have no more levels, the last rows first
        for number, num_rows in enumerate(self._rows_by_level(len(queries_NQ), rows_N)):
            if vectors_NDS is not None and num_rows < len(vectors_NDS):
                done.append(vectors_NDS[num_rows:])
                rest_NDS, vectors_NDS = rest_NDS[:num_rows], vectors_NDS[:num_rows]
            if self.revival is not None and not recomputing():
                self._revive(number, rest_NDS.detach())
            codebook = self._codebook(number)
            codebook = codebook if run is None else run.codebook(number, codebook)
            level = self._compare(number, rest_NDS, counts_N[:num_rows], codebook)
            if self.config.method == "sx":
                emitted_NDS = softmax_choice(
                    level,
                    score=self.score,
                    temperature=self.config.temperature,
                    hard_values=self.config.hard_values,
                )
            else:
                chosen_NDS = choose(level.values_DKS, level.codes_ND)
                loss = loss + codebook_loss(self.config, chosen_NDS, rest_NDS, counts_N)
                emitted_NDS = chosen_NDS if self.config.value_gradient else chosen_NDS.detach()
            self._keep_up(number, level.codes_ND, rest_NDS.detach(), counts_N[:num_rows])
            codes.append(level.codes_ND)
            vectors_NDS = emitted_NDS if vectors_NDS is None else vectors_NDS + emitted_NDS
            if number + 1 < self.config.num_levels:
                rest_NDS = rest_NDS - emitted_NDS.detach()
        assert vectors_NDS is not None, "there is one level at least"
        vectors_NE = (torch.cat([vectors_NDS, *reversed(done)]) if done else vectors_NDS).flatten(1)
        if self.config.method == "vq":  # H = Q - sg(Q - T(Q)) (DPQ paper, eq. 7): the difference is exactly zero
            vectors_NE = vectors_NE + (queries_NQ - queries_NQ.detach())
        return Quantized(_side_by_side(codes), vectors_NE, loss)

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
        rest_NDS, codes = self._grouped(self._in_own_dtype(queries_NQ)), []
        subspaces = slice(first_subspace, first_subspace + rest_NDS.shape[1])
        for number, num_rows in enumerate(self._rows_by_level(len(queries_NQ), rows_N)):
            rest_NDS = rest_NDS[:num_rows]
            level = self._compare(number, rest_NDS, None, self._codebook(number, subspaces))
            codes.append(level.codes_ND)
            if number + 1 < self.config.num_levels:
                rest_NDS = rest_NDS - choose(level.values_DKS, level.codes_ND)
        return _side_by_side(codes)

    def decode(self, codes_NM: torch.Tensor) -> torch.Tensor:
        """Vectors [N, E] of codes: each group is the sum of its levels' values, in order (DPQ paper, eq. 2).

        Levels in which a row has NO_CODE add nothing to it.
        """
        values_MKS = self.stored_values() + 0.0  # never minus zero, as an artifact holds none
        by_level = codes_NM.chunk(self.config.num_levels, 1)
        vectors_NDS = choose(self._of_level(values_MKS, 0), by_level[0])
        for number, codes_ND in enumerate(by_level[1:], 1):
            if self.config.tiers:
                (has_N,) = (codes_ND[:, 0] != NO_CODE).nonzero(as_tuple=True)
                chosen_PDS = choose(self._of_level(values_MKS, number), codes_ND[has_N])
                vectors_NDS = vectors_NDS.index_add(0, has_N, chosen_PDS)
            else:
                vectors_NDS = vectors_NDS + choose(self._of_level(values_MKS, number), codes_ND)
        return vectors_NDS.flatten(1)

    def _codebook(self, number: int, subspaces: slice = slice(None)) -> Codebook:
        """A level's values and keys."""
        values_MKS: torch.Tensor = self.stored_values()
        values_DKS = self._of_level(values_MKS, number)[subspaces]
        keys_DKX = values_DKS
        if self.own_keys_MKS is not None:
            keys_DKX = self._of_level(self.own_keys_MKS, number)[subspaces]
        # What moves by use may do so before this forward's backward, which must find what was compared; and FSDP frees
        # its weights, which it cannot while numpy looks at them.
        if self._is_fsdp_managed_module or (self.training and self.first_runs is not None):
            values_DKS, keys_DKX = values_DKS.clone(), keys_DKX.clone()
        return Codebook(values_DKS, keys_DKX)

    def _compare(
        self, number: int, rest_NDS: torch.Tensor, counts_N: torch.Tensor | None, codebook: Codebook
    ) -> Compared:
        """Choose the codes of a level; the batch's own statistics count where `counts_N` is given."""
        queries_NDS, keys_DKS = rest_NDS, codebook.keys_DKX
        if self.config.resolved_metric == "cosine":
            queries_NDS, keys_DKS = directions(queries_NDS), directions(keys_DKS)
        affine = self._affine(number, queries_NDS, keys_DKS, counts_N)
        codes_ND = encode(queries_NDS, keys_DKS, affine, self.score)
        return Compared(queries_NDS, keys_DKS, codebook.values_DKS, affine, codes_ND)

    def _affine(
        self, number: int, queries_NDS: torch.Tensor, keys_DKS: torch.Tensor, counts_N: torch.Tensor | None
    ) -> Affine:
        if not self.config.batch_norm:
            ones_K = keys_DKS.new_ones(self.config.num_codes)
            return Affine(ones_K, torch.zeros_like(ones_K))
        norm = self.score_norms[number]
        assert isinstance(norm, ScoreNorm), "score_norms holds nothing else"
        if counts_N is None:
            return norm.running()
        with torch.set_grad_enabled(self.config.method == "sx" and torch.is_grad_enabled()):
            return norm(queries_NDS, keys_DKS, counts_N)

    def _keep_up(self, number: int, codes_ND: torch.Tensor, rest_NDS: torch.Tensor, counts_N: torch.Tensor) -> None:
        """What moves by use rather than by gradients: once for a forward, however often it runs."""
        if recomputing():
            return
        groups = self._groups(number)
        if self.running_means is not None:
            self.running_means.update(self.values_MKS.data[groups], groups, codes_ND, rest_NDS, counts_N)
        if self.revival is not None:
            self.revival.note_use(groups, codes_ND)

    @torch.no_grad()
    def _revive(self, number: int, rest_NDS: torch.Tensor) -> None:
        """Place codes that were idle for long on queries of this batch: the same ones on every rank."""
        assert self.revival is not None, "called where there is one"
        groups = self._groups(number)
        group_P, code_P = self.revival.due(groups)
        drawn_PDS = self.revival.draw(rest_NDS, len(code_P))
        if not len(drawn_PDS):
            return
        places_P = torch.arange(len(code_P), device=code_P.device)
        subspace_P = places_P % self.config.num_subspaces if self.config.share_subspaces else group_P - groups.start
        # Through `data`: a forward whose backward is still to come holds copies (see `_compare`).
        if self.own_keys_MKS is None:
            self.values_MKS.data[group_P, code_P] = drawn_PDS[places_P, subspace_P]
        else:  # the query keeps the value that it has, now from a code nearer to it
            now_P = self._compare(number, drawn_PDS, None, self._codebook(number)).codes_ND[places_P, subspace_P]
            self.values_MKS.data[group_P, code_P] = self.values_MKS.data[group_P, now_P]
            self.own_keys_MKS.data[group_P, code_P] = drawn_PDS[places_P, subspace_P]
        self.revival.idle_MK[group_P, code_P] = 0
        if self.running_means is not None:
            self.running_means.forget(group_P, code_P)

    def _rows_by_level(self, num_rows: int, rows_N: torch.Tensor | None) -> list[int]:
        """How many of some ascending rows, from the first on, have each level."""
        counts = [num_rows] * self.config.num_levels
        if not self.config.tiers:
            return counts
        if rows_N is None:
            raise ConfigError("rows_N: got none with tiers, which are told by the row; give the rows, ascending")
        firsts = torch.tensor([tier.first_row for tier in self.tiers[1:]], device=rows_N.device)
        starts = torch.searchsorted(rows_N, firsts).tolist()
        for start, tier in zip(reversed(starts), reversed(self.tiers[1:]), strict=True):
            counts[tier.layout.num_levels :] = [start] * (len(counts) - tier.layout.num_levels)
        return counts

    def _groups(self, number: int) -> slice:
        """A level's part of what is [M, K, ...]."""
        per_level = len(self.values_MKS) // self.config.num_levels
        return slice(number * per_level, (number + 1) * per_level)

    def _of_level(self, tensor_MKS: torch.Tensor, number: int) -> torch.Tensor:
        """A level's keys or values [D, K, S]; the same for every subspace where they are shared."""
        return tensor_MKS[self._groups(number)].expand(self.config.num_subspaces, -1, -1)

    def _in_own_dtype(self, queries_NQ: torch.Tensor) -> torch.Tensor:
        """Queries as keys are, in training, in eval mode and for `freeze`: bfloat16 would choose other codes."""
        check_dtype("quantizer", "keys and values", self.values_MKS.dtype, torch.float32, torch.float64)
        return queries_NQ.to(self.values_MKS.dtype)

    def _grouped(self, queries_NQ: torch.Tensor) -> torch.Tensor:
        width = self.query_dim // self.config.num_subspaces
        return queries_NQ.view(len(queries_NQ), queries_NQ.shape[1] // width, width)


def _side_by_side(codes: list[torch.Tensor]) -> torch.Tensor:
    """Codes [N, M] of those of each level, filled up with NO_CODE where a level is of fewer rows than the first."""
    filled = []
    for codes_ND in codes:
        missing = len(codes[0]) - len(codes_ND)
        filled.append(functional.pad(codes_ND, (0, 0, 0, missing), value=NO_CODE) if missing else codes_ND)
    return torch.cat(filled, 1)
