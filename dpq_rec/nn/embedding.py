"""Ids to pooled vectors. In: KeyedJaggedTensor. Out: KeyedTensor. The drop-in for TorchRec's EmbeddingBagCollection.

The queries live in stock EmbeddingCollections, so that TorchRec's planner, sharders and fused optimizers find them.
Each forward asks for the query of every distinct id once, quantizes it once, and pools the result into the bags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.quantizer import Quantized, Quantizer

_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class _Distinct(NamedTuple):
    """The rows that a table is asked for, each once."""

    rows_N: torch.Tensor
    counts_N: torch.Tensor  # occurrences of each
    at_T: torch.Tensor  # position in rows_N of each occurrence


class DPQEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """TorchRec's EmbeddingBagCollection with tables that are trained to be frozen to a few bytes a row.

    >>> ebc = DPQEmbeddingBagCollection(tables=[EmbeddingBagConfig(...)], config=DPQConfig(num_subspaces=16))
    >>> pooled = ebc(features)          # KeyedJaggedTensor -> KeyedTensor, as before

    The penalty of DPQ-VQ needs no line in the training loop: whoever differentiates the output differentiates it too.
    Sharding and fused optimizers apply to the queries (`DistributedModelParallel` finds them); keys and values are data
    parallel. In training every rank must call forward equally often: batch statistics are summed over ranks. Keep
    data-parallel queries out of plans on CPU, where TorchRec's fail (FBGEMM #4586); stock plans are row-wise.

    Args:
        tables: TorchRec's configs; SUM or MEAN pooling; a table of any embedding_dim. Without an init_fn, queries start
            uniform in +-1/sqrt(E), on the scale of the keys.
        config: how tables are quantized: one for all, or one for each by name.
        is_weighted: only False: per-sample weights are refused.
        device: of the parameters.

    Raises:
        ConfigError: a combination that makes no sense.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        config: DPQConfig | Mapping[str, DPQConfig],
        *,
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if is_weighted:
            raise ConfigError("is_weighted: got True, want False: bags are summed or averaged, without weights")
        self._configs = list(tables)
        self._embedding_names = get_embedding_names_by_table(self._configs)
        self._device = device or torch.device("cpu")
        self.penalties: dict[str, torch.Tensor] = {}  # table -> penalty of the last forward in training, to be logged
        self.quantizers = nn.ModuleDict()
        by_dim: dict[str, list[EmbeddingConfig]] = {}
        for table in self._configs:
            if table.name in self.quantizers:
                raise ConfigError(f"tables: two are named {table.name!r}")
            if table.pooling not in _POOLING:
                raise ConfigError(f"table {table.name!r}: got pooling {table.pooling}, want SUM or MEAN")
            if table.data_type != DataType.FP32:
                raise ConfigError(f"table {table.name!r}: got data_type {table.data_type}, want FP32")
            chosen = config if isinstance(config, DPQConfig) else config.get(table.name)
            if chosen is None:
                raise ConfigError(f"config: got none for table {table.name!r}, want one for every table")
            self.quantizers[table.name] = Quantizer(table.embedding_dim, chosen, device)
            by_dim.setdefault(str(table.embedding_dim), []).append(_query_config(table))
        # TorchRec's EmbeddingCollection holds tables of one dimension.
        self.queries = nn.ModuleDict({dim: EmbeddingCollection(group, device) for dim, group in by_dim.items()})

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors [B, sum of E] of bags of ids.

        Raises:
            KeyError: a feature that a table serves is not there.
            IndexError: an id outside its table.
            ValueError: lengths that do not fit the ids.
        """
        bags = _bags_by_feature(features, self._configs)
        distinct = {table.name: _distinct(bags, table) for table in self._configs}
        vectors = {
            name: self._quantize(name, queries_NE, distinct[name].counts_N)
            for name, queries_NE in self._look_up_queries(distinct).items()
        }
        pooled = [_pool(bags, table, distinct[table.name], vectors[table.name]) for table in self._configs]
        return KeyedTensor(
            keys=[name for names in self._embedding_names for name in names],
            length_per_key=[t.embedding_dim for t in self._configs for _ in t.feature_names],
            values=torch.cat([values_BE for group in pooled for values_BE in group], dim=1),
        )

    def _look_up_queries(self, distinct: Mapping[str, _Distinct]) -> dict[str, torch.Tensor]:
        """Queries [N, E] of each table's distinct rows, from whichever rank holds them."""
        asked = {}
        for dim, collection in self.queries.items():
            names = [table.name for table in self._configs if str(table.embedding_dim) == dim]
            rows = [distinct[name].rows_N for name in names]
            lengths = torch.tensor([len(r) for r in rows], device=rows[0].device)
            keyed = KeyedJaggedTensor(keys=names, values=torch.cat(rows), lengths=lengths)
            asked[dim] = (names, collection(keyed))  # sharded collections answer later: ask all, then wait
        return {name: answer[name].values() for names, answer in asked.values() for name in names}

    def _quantize(self, name: str, queries_NE: torch.Tensor, counts_N: torch.Tensor) -> torch.Tensor:
        quantized: Quantized = self.quantizers[name](queries_NE, counts_N.to(queries_NE.dtype))
        if not self.training:
            return quantized.vectors_NE
        self.penalties[name] = quantized.penalty.detach()
        return _WithPenalty.apply(quantized.vectors_NE, quantized.penalty)

    def quantizer(self, table: str) -> Quantizer:
        """Keys and values of a table."""
        quantizer = self.quantizers[table]
        assert isinstance(quantizer, Quantizer), "quantizers holds nothing else"
        return quantizer

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags have weights: no."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the parameters were made."""
        return self._device


def _query_config(table: EmbeddingBagConfig) -> EmbeddingConfig:
    """The table's queries: as its config says, but for TorchRec's default init, which shrinks as the table grows."""
    init_fn = table.init_fn
    upstream = {"a": table.get_weight_init_min(), "b": table.get_weight_init_max()}
    limits = (table.weight_init_min, table.weight_init_max)
    if limits == (None, None) and isinstance(init_fn, partial) and init_fn.keywords == upstream:
        bound = table.embedding_dim**-0.5
        init_fn = partial(nn.init.uniform_, a=-bound, b=bound)
    return EmbeddingConfig(
        name=table.name,
        embedding_dim=table.embedding_dim,
        num_embeddings=table.num_embeddings,
        feature_names=[table.name],
        init_fn=init_fn,
    )


def _bags_by_feature(features: KeyedJaggedTensor, tables: Sequence[EmbeddingBagConfig]) -> dict[str, JaggedTensor]:
    """Each feature's ids and bags; TorchRec checks none of this itself."""
    wanted = {name for table in tables for name in table.feature_names}
    if missing := wanted - set(features.keys()):
        raise KeyError(f"features: got {features.keys()}, want {', '.join(sorted(missing))} too")
    if features.weights_or_none() is not None:
        raise ConfigError("features: got per-sample weights, which bags do not take")
    if features.variable_stride_per_key():
        raise ConfigError("features: got a batch size per feature, want one batch size for all")
    if int(features.offsets()[-1]) != len(features.values()):
        got = f"lengths of {int(features.offsets()[-1])} ids in all"
        raise ValueError(f"features: {got}, but {len(features.values())} ids")
    return features.to_dict()


def _distinct(bags: Mapping[str, JaggedTensor], table: EmbeddingBagConfig) -> _Distinct:
    rows_T = torch.cat([bags[name].values() for name in table.feature_names])
    rows_N, at_T, counts_N = torch.unique(rows_T, return_inverse=True, return_counts=True)
    if len(rows_N) and not (int(rows_N[0]) >= 0 and int(rows_N[-1]) < table.num_embeddings):  # unique sorts
        got = f"ids from {int(rows_N[0])} to {int(rows_N[-1])}"
        raise IndexError(f"table {table.name!r}: got {got}, want 0 to {table.num_embeddings - 1}")
    return _Distinct(rows_N, counts_N, at_T)


def _pool(
    bags: Mapping[str, JaggedTensor], table: EmbeddingBagConfig, distinct: _Distinct, vectors_NE: torch.Tensor
) -> list[torch.Tensor]:
    """Bags [B, E] of each feature that the table serves."""
    jagged = [bags[name] for name in table.feature_names]
    at_features = distinct.at_T.split([len(j.values()) for j in jagged])
    return [
        functional.embedding_bag(at_T, vectors_NE, j.offsets(), mode=_POOLING[table.pooling], include_last_offset=True)
        for at_T, j in zip(at_features, jagged, strict=True)
    ]


class _WithPenalty(torch.autograd.Function):
    """The vectors as they are; backward, the penalty gets the gradient that it would have as a summand of the loss."""

    @staticmethod
    def forward(ctx: Any, vectors_NE: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        return vectors_NE.view_as(vectors_NE)

    @staticmethod
    def backward(ctx: Any, gradient_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_NE, gradient_NE.new_ones(())
