"""Differentiable product quantization. In: queries_NE. Out: Quantized(codes_ND, vectors_NE, penalty).

A query is cut into D groups; in each group the nearest of K keys is chosen, and its value replaces the group (DPQ
paper, eq. 1 and 2). The choice has no gradient; the two methods put different ones in its place:

* DPQ-SX: in the backward pass the choice is a softmax of the scores (eq. 5). Keys and values are apart.
* DPQ-VQ: the gradient of the vector is given to the query as it is (eq. 7). Keys are the values, and a penalty draws
  each value to the queries that it stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dpq_rec.config import DPQConfig
from dpq_rec.nn.collectives import sum_over_ranks, world_size
from dpq_rec.nn.scores import Affine, Metric, ScoreNorm, encode, scores


class Quantized(NamedTuple):
    """What the quantizer makes of queries.

    Attributes:
        codes_ND: the chosen codes (int64).
        vectors_NE: their values; in training, gradients flow to queries, keys and values.
        penalty: scalar, to be minimised beside the loss (zero for DPQ-SX); averaged over ranks it is the mean over all
            occurrences on all ranks.
    """

    codes_ND: torch.Tensor
    vectors_NE: torch.Tensor
    penalty: torch.Tensor


class Quantizer(nn.Module):
    """Keys and values of one table, and how they are chosen and trained.

    Args:
        embedding_dim: E.
        config: method, D, K and the rest.
        device: of the parameters.

    Raises:
        ConfigError: num_subspaces does not divide embedding_dim.
    """

    def __init__(self, embedding_dim: int, config: DPQConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.metric: Metric = "dot" if config.method == "sx" else "euclidean"
        shape = (config.num_subspaces, config.num_codes, config.subspace_dim(embedding_dim))
        self.values_DKS = nn.Parameter(torch.empty(shape, device=device))
        self.own_keys_DKS = nn.Parameter(torch.empty(shape, device=device)) if config.method == "sx" else None
        self.score_norm = ScoreNorm(config.num_codes, self.metric, device) if config.batch_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys and values on the scale of queries that `DPQEmbeddingBagCollection` starts with."""
        bound = (self.values_DKS.shape[0] * self.values_DKS.shape[2]) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def keys_DKS(self) -> torch.Tensor:  # noqa: N802
        """What queries are compared with: keys of their own (DPQ-SX), or the values (DPQ-VQ)."""
        return self.values_DKS if self.own_keys_DKS is None else self.own_keys_DKS

    def forward(self, queries_NE: torch.Tensor, counts_N: torch.Tensor | None = None) -> Quantized:
        """Codes and vectors of queries.

        Args:
            queries_NE: raw vectors of distinct rows.
            counts_N: how often each row occurs in the batch; once each if not given. Weighs batch norm and penalty.
        """
        if not self.training:
            codes_ND = self.encode(queries_NE)
            return Quantized(codes_ND, self.decode(codes_ND), queries_NE.new_zeros(()))
        queries_NDS = self._grouped(queries_NE)
        if counts_N is None:
            counts_N = queries_NE.new_ones(len(queries_NE))
        if self.config.method == "sx":
            return self._softmax_approximation(queries_NDS, counts_N)
        return self._centroid_approximation(queries_NDS, counts_N)

    def encode(self, queries_NE: torch.Tensor) -> torch.Tensor:
        """Codes [N, D] (int64) as in eval mode: what `freeze` stores."""
        norm = self.score_norm
        return encode(
            self._grouped(queries_NE), self.keys_DKS, norm.running() if norm else self._identity(), self.metric
        )

    def decode(self, codes_ND: torch.Tensor) -> torch.Tensor:
        """Vectors [N, E] of codes: each group is the value of its code (DPQ paper, eq. 2)."""
        subspaces_D = torch.arange(codes_ND.shape[1], device=codes_ND.device)
        return self.values_DKS[subspaces_D, codes_ND].flatten(1)

    def _softmax_approximation(self, queries_NDS: torch.Tensor, counts_N: torch.Tensor) -> Quantized:
        """H = T(tau=1) - sg(T(tau=1) - T(tau=0)) (DPQ paper, eq. 5): hard forward, soft backward."""
        affine = self._affine(queries_NDS, counts_N)
        codes_ND = encode(queries_NDS, self.keys_DKS, affine, self.metric)
        logits_NDK = scores(queries_NDS, self.keys_DKS) * affine.scale_K + affine.shift_K
        weights_DNK = logits_NDK.softmax(-1).transpose(0, 1)
        soft_NE = torch.bmm(weights_DNK, self.values_DKS).transpose(0, 1).flatten(1)
        # The difference is exactly zero: forward gives the very bits of eval mode.
        vectors_NE = self.decode(codes_ND).detach() + (soft_NE - soft_NE.detach())
        return Quantized(codes_ND, vectors_NE, queries_NDS.new_zeros(()))

    def _centroid_approximation(self, queries_NDS: torch.Tensor, counts_N: torch.Tensor) -> Quantized:
        """H = Q - sg(Q - T(Q)) (DPQ paper, eq. 7), and the penalty |T(Q) - sg(Q)|^2 below it in the paper."""
        queries_NE = queries_NDS.flatten(1)
        with torch.no_grad():
            affine = self._affine(queries_NDS, counts_N)
        codes_ND = encode(queries_NDS, self.keys_DKS, affine, self.metric)
        values_NE = self.decode(codes_ND)
        errors_N = (values_NE - queries_NE.detach()).square().mean(-1)
        # Ranks average their gradients, and so their losses: this rank's share is scaled so that the average over ranks
        # is the mean over all occurrences.
        occurrences = sum_over_ranks(counts_N.sum()).clamp(min=1)
        penalty = self.config.penalty_weight * world_size() * (counts_N @ errors_N) / occurrences
        vectors_NE = values_NE.detach() + (queries_NE - queries_NE.detach())
        return Quantized(codes_ND, vectors_NE, penalty)

    def _affine(self, queries_NDS: torch.Tensor, counts_N: torch.Tensor) -> Affine:
        if self.score_norm is None:
            return self._identity()
        return self.score_norm(queries_NDS, self.keys_DKS, counts_N)

    def _identity(self) -> Affine:
        ones_K = self.values_DKS.new_ones(self.config.num_codes)
        return Affine(ones_K, torch.zeros_like(ones_K))

    def _grouped(self, queries_NE: torch.Tensor) -> torch.Tensor:
        return queries_NE.unflatten(1, (self.config.num_subspaces, -1))
