"""Ids to vectors by feature: the drop-ins for TorchRec's collections. In: KeyedJaggedTensor.

Out: KeyedTensor (DPQEmbeddingBagCollection, pooled), or feature -> JaggedTensor (DPQEmbeddingCollection, not pooled).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import functional
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.collectives import rank
from dpq_rec.nn.tables import DPQTables, Looked
from dpq_rec.nn.tracing import leaf

TableConfig = TypeVar("TableConfig", bound=BaseEmbeddingConfig)
Configs = DPQConfig | Mapping[str, DPQConfig | None]  # for all tables, or by name; None leaves a table as it is

_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class DPQEmbeddingBagCollection(DPQTables, EmbeddingBagCollectionInterface):
    """TorchRec's EmbeddingBagCollection with tables that are trained to be frozen to a few bytes a row.

    >>> ebc = DPQEmbeddingBagCollection(tables=[EmbeddingBagConfig(...)], config=DPQConfig(num_subspaces=16))
    >>> pooled = ebc(features)          # KeyedJaggedTensor -> KeyedTensor, as before

    Training and sharding: see `DPQTables`.

    Args:
        tables: TorchRec's configs; SUM or MEAN pooling; tables of any embedding_dim.
        config: how tables are quantized: one for all, or one for each by name, None for a table that stays as it is;
            as does one that it would make no smaller, with a warning (`DPQConfig.quantize_small`).
        is_weighted: bags are sums weighted by the features' weights, which get gradients too; SUM pooling only.
        device: of the parameters.

    Raises:
        ConfigError: a combination that makes no sense.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        config: Configs,
        *,
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._configs, configs = _with_features(tables), configs_by_table(tables, config)
        for table in self._configs:
            if table.pooling not in _POOLING:
                raise ConfigError(f"table {table.name!r}: got pooling {table.pooling}, want SUM or MEAN")
            if is_weighted and table.pooling != PoolingType.SUM:
                raise ConfigError(f"table {table.name!r}: got pooling {table.pooling} with is_weighted, want SUM")
        super().__init__([t for t in self._configs if t.name in configs], configs, device)
        self._is_weighted = is_weighted
        self._embedding_names = get_embedding_names_by_table(self._configs)
        plain = [t for t in self._configs if t.name not in configs]
        self._plain_names = _names_by_table(plain)
        if plain:
            self.plain["bags"] = EmbeddingBagCollection(tables=plain, is_weighted=is_weighted, device=device)

    @leaf
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors [B, sum of E] of bags of ids.

        Raises:
            KeyError: a feature that a table serves is not there.
            IndexError: an id outside its table.
            ValueError: lengths that do not fit the ids.
            ConfigError: weights where none are taken or the reverse, or a batch size per feature.
        """
        bags = _jagged_by_feature(features, self._configs)
        if (features.weights_or_none() is not None) != self._is_weighted:
            got = "no per-sample weights" if self._is_weighted else "per-sample weights"
            raise ConfigError(f"features: got {got}, with is_weighted {self._is_weighted}: build the collection to fit")
        plain = self.plain["bags"](features) if self._plain_names else {}
        looked = self._look_up(_rows_by_table(bags, self.quantized_tables))
        pooled: list[torch.Tensor] = []
        for table in self._configs:
            if table.name in looked:
                pooled += self._pool(bags, table, looked[table.name])
            else:
                pooled += [plain[name] for name in self._plain_names[table.name]]
        return KeyedTensor(
            keys=[name for names in self._embedding_names for name in names],
            length_per_key=[t.embedding_dim for t in self._configs for _ in t.feature_names],
            values=torch.cat(pooled, dim=1),
        )

    def _pool(self, bags: Mapping[str, JaggedTensor], table: EmbeddingBagConfig, looked: Looked) -> list[torch.Tensor]:
        """Bags [B, E] of each feature that the table serves."""
        return [
            functional.embedding_bag(
                at_T,
                looked.vectors_NE,
                jagged.offsets(),
                mode=_POOLING[table.pooling],
                include_last_offset=True,
                per_sample_weights=jagged.weights() if self._is_weighted else None,
            )
            for at_T, jagged in _by_feature(bags, table, looked)
        ]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags are sums weighted by the features' weights."""
        return self._is_weighted


class DPQEmbeddingCollection(DPQTables, EmbeddingCollectionInterface):
    """TorchRec's EmbeddingCollection with tables that are trained to be frozen to a few bytes a row.

    Training and sharding: see `DPQTables`.

    Args:
        tables: TorchRec's configs, of any embedding_dim, which may differ (upstream's may not).
        config: as in DPQEmbeddingBagCollection.
        need_indices: hand the ids out again, as the weights of each JaggedTensor.
        device: of the parameters.

    Raises:
        ConfigError: a combination that makes no sense.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        config: Configs,
        *,
        need_indices: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._configs, configs = _with_features(tables), configs_by_table(tables, config)
        super().__init__([t for t in self._configs if t.name in configs], configs, device)
        self._need_indices = need_indices
        self._embedding_names = get_embedding_names_by_table(self._configs)
        plain: dict[str, list[EmbeddingConfig]] = {}
        for table in self._configs:
            if table.name not in configs:
                plain.setdefault(str(table.embedding_dim), []).append(table)
        self._plain_names = {k: v for group in plain.values() for k, v in _names_by_table(group).items()}
        for dim, group in plain.items():
            self.plain[dim] = EmbeddingCollection(tables=group, device=device)

    @leaf
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Vectors [T, E] of the ids of each feature; `feature@table` where a feature is served by several tables.

        Raises:
            KeyError: a feature that a table serves is not there.
            IndexError: an id outside its table.
            ValueError: lengths that do not fit the ids.
            ConfigError: a batch size per feature.
        """
        jagged = _jagged_by_feature(features, self._configs)
        plain = {dim: collection(features) for dim, collection in self.plain.items()}
        looked = self._look_up(_rows_by_table(jagged, self.quantized_tables))
        out: dict[str, JaggedTensor] = {}
        for table, names in zip(self._configs, self._embedding_names, strict=True):
            if table.name in looked:
                vectors_NE = looked[table.name].vectors_NE
                vectors = [
                    vectors_NE.index_select(0, at_T) for at_T, _ in _by_feature(jagged, table, looked[table.name])
                ]
            else:
                answer = plain[str(table.embedding_dim)]
                vectors = [answer[name].values() for name in self._plain_names[table.name]]
            for name, feature, vectors_TE in zip(names, table.feature_names, vectors, strict=True):
                ids = jagged[feature].values() if self._need_indices else None
                out[name] = JaggedTensor(values=vectors_TE, lengths=jagged[feature].lengths(), weights=ids)
        return out

    def of_node(self, node: Any) -> dict[str, Any]:
        """A dict, as stock collections return while they are traced, so that callers can go through it."""
        return {name: node[name] for names in self._embedding_names for name in names}

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The tables' configs."""
        return self._configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """The keys of the output, by table."""
        return self._embedding_names

    def need_indices(self) -> bool:
        """Whether the ids are handed out again."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """E, where all tables have the same.

        Raises:
            ConfigError: they have not.
        """
        dims = {table.embedding_dim for table in self._configs}
        if len(dims) > 1:
            raise ConfigError(f"embedding_dim: the tables have {sorted(dims)}; ask embedding_configs() for each")
        return dims.pop()


def configs_by_table(tables: Sequence[BaseEmbeddingConfig], config: Configs) -> dict[str, DPQConfig]:
    """The config of each table that is to be quantized: of those that are named, the ones that become smaller.

    Raises:
        ConfigError: two tables of a name, a table that the mapping does not name or the reverse, or none to quantize.
    """
    names = [table.name for table in tables]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"tables: two are named {', '.join(map(repr, sorted(twice)))}")
    given = dict.fromkeys(names, config) if isinstance(config, DPQConfig) else dict(config)
    if unknown := set(given) - set(names):
        raise ConfigError(f"config: got {', '.join(sorted(unknown))}; the tables: {', '.join(names)}")
    for name in names:
        if name not in given:
            raise ConfigError(f"config: got none for table {name!r}, want one, or None for a table that stays as it is")
    configs = {name: chosen for name, chosen in given.items() if chosen is not None}
    if not configs:
        raise ConfigError("config: got no table to quantize; TorchRec's own collection does that")
    return without_small(configs, {table.name: (table.num_embeddings, table.embedding_dim) for table in tables})


def without_small(configs: Mapping[str, DPQConfig], shapes: Mapping[str, tuple[int, int]]) -> dict[str, DPQConfig]:
    """The configs of tables that they make smaller; a warning for each other table, which stays plain.

    Args:
        configs: table -> how it is to be quantized.
        shapes: table -> V and E.
    """
    small = {name: why for name, config in configs.items() if (why := config.why_plain(*shapes[name]))}
    for name, why in small.items() if rank() == 0 else ():
        warnings.warn(f"table {name!r} stays plain: {why}; quantize_small=True quantizes it", stacklevel=3)
    return {name: config for name, config in configs.items() if name not in small}


def _with_features(tables: Sequence[TableConfig]) -> list[TableConfig]:
    """A table that names no feature serves the one of its own name, as upstream."""
    return [t if t.feature_names else dataclasses.replace(t, feature_names=[t.name]) for t in tables]


def _names_by_table(tables: Sequence[BaseEmbeddingConfig]) -> dict[str, list[str]]:
    """What a stock collection of these tables names its outputs."""
    names: Any = get_embedding_names_by_table(list(tables))
    return {table.name: own for table, own in zip(tables, names, strict=True)}


def _jagged_by_feature(features: KeyedJaggedTensor, tables: Sequence[BaseEmbeddingConfig]) -> dict[str, JaggedTensor]:
    """Each feature's ids and bags; TorchRec checks none of this itself."""
    wanted = {name for table in tables for name in table.feature_names}
    if missing := wanted - set(features.keys()):
        raise KeyError(f"features: got {features.keys()}, want {', '.join(sorted(missing))} too")
    if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
        raise ConfigError("features: got a batch size per feature, want one batch size for all")
    if (features.lengths() < 0).any():
        raise ValueError(f"features: got a length of {int(features.lengths().min())}, want 0 or more")
    if int(features.offsets()[-1]) != len(features.values()):
        got = f"lengths of {int(features.offsets()[-1])} ids in all"
        raise ValueError(f"features: {got}, but {len(features.values())} ids")
    return features.to_dict()


def _rows_by_table(
    jagged: Mapping[str, JaggedTensor], tables: Sequence[BaseEmbeddingConfig]
) -> dict[str, torch.Tensor]:
    return {table.name: torch.cat([jagged[name].values() for name in table.feature_names]) for table in tables}


def _by_feature(
    jagged: Mapping[str, JaggedTensor], table: BaseEmbeddingConfig, looked: Looked
) -> list[tuple[torch.Tensor, JaggedTensor]]:
    """For each feature of a table: where its ids' vectors are, and its bags."""
    features = [jagged[name] for name in table.feature_names]
    return list(zip(looked.at_T.split([len(f.values()) for f in features]), features, strict=True))
