"""Ids to vectors by feature: the drop-ins for TorchRec's collections. In: KeyedJaggedTensor.

Out: KeyedTensor (DPQEmbeddingBagCollection, pooled), or feature -> JaggedTensor (DPQEmbeddingCollection, not pooled).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
from dpq_rec.nn.tables import DPQTables
from dpq_rec.nn.tracing import leaf

Configs = DPQConfig | Mapping[str, DPQConfig | None]  # for all tables, or by name; None leaves a table as it is

_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class _Collection(DPQTables):
    """What the two collections share: tables by TorchRec's configs, some of which may stay in stock collections."""

    def __init__(
        self, stock: type, tables: Sequence[Any], config: Configs, device: torch.device | None, **options: bool
    ) -> None:
        # A table that names no feature serves the one of its own name, as upstream.
        tables = [t if t.feature_names else dataclasses.replace(t, feature_names=[t.name]) for t in tables]
        configs = configs_by_table(tables, config)
        super().__init__([t for t in tables if t.name in configs], configs, device)
        self._configs: list[Any] = tables
        self._embedding_names: list[list[str]] = get_embedding_names_by_table(tables)
        self._plain_outputs: dict[str, tuple[str, list[str]]] = {}  # table -> its place in `plain`, and names there
        plain: dict[str, list[Any]] = {}
        for table in tables:
            if table.name not in configs:  # a stock EmbeddingCollection holds tables of one dimension
                place = "bags" if stock is EmbeddingBagCollection else str(table.embedding_dim)
                plain.setdefault(place, []).append(table)
        for place, group in plain.items():
            self.plain[place] = stock(tables=group, device=device, **options)
            for table, names in zip(group, get_embedding_names_by_table(group), strict=True):
                self._plain_outputs[table.name] = place, names

    def _outputs(
        self, features: KeyedJaggedTensor, jagged: Mapping[str, JaggedTensor]
    ) -> Iterator[tuple[str, JaggedTensor, torch.Tensor]]:
        """Name of each output, the ids of its feature, and their vectors [T, E] or bags [B, E]."""
        plain: dict[str, Any] = {place: collection(features) for place, collection in self.plain.items()}
        looked_up = self._look_up(
            {t.name: torch.cat([jagged[name].values() for name in t.feature_names]) for t in self.quantized_tables}
        )
        for table, names in zip(self._configs, self._embedding_names, strict=True):
            ids = [jagged[feature] for feature in table.feature_names]
            if table.name in looked_up:
                vectors_NE, at_T = looked_up[table.name]
                by_feature = zip(ids, at_T.split([len(each.values()) for each in ids]), strict=True)
                found = [self._of_feature(table, each, vectors_NE, at_T) for each, at_T in by_feature]
            else:
                place, of_place = self._plain_outputs[table.name]
                found = [plain[place][name] for name in of_place]
                found = [each.values() if isinstance(each, JaggedTensor) else each for each in found]
            yield from zip(names, ids, found, strict=True)

    def _of_feature(self, table: Any, ids: JaggedTensor, vectors_NE: torch.Tensor, at_T: torch.Tensor) -> torch.Tensor:
        """The output of ids whose vectors are at these positions: the vectors, unless a subclass pools them."""
        return vectors_NE.index_select(0, at_T)


class DPQEmbeddingBagCollection(_Collection, EmbeddingBagCollectionInterface):
    """TorchRec's EmbeddingBagCollection with tables that are trained to be frozen to a few bytes a row.

    Two tables, of vectors of 8 and of 4 numbers; `item` serves two features. A row of either becomes 4 codes of 3 bits:
    2 bytes, instead of 32 and 16.

    >>> items = EmbeddingBagConfig(name="item", num_embeddings=900, embedding_dim=8, feature_names=["item", "seen"])
    >>> users = EmbeddingBagConfig(name="user", num_embeddings=500, embedding_dim=4, feature_names=["user"])
    >>> ebc = DPQEmbeddingBagCollection([items, users], DPQConfig(num_subspaces=4, num_codes=8))
    >>> features = KeyedJaggedTensor(  # of two examples: bags of 1 and 0, 2 and 1, 1 and 1 ids
    ...     keys=["item", "seen", "user"],
    ...     values=torch.tensor([7, 42, 7, 7, 3, 3]),
    ...     lengths=torch.tensor([1, 0, 2, 1, 1, 1]),
    ... )
    >>> pooled = ebc(features)
    >>> pooled.keys(), pooled.values().shape
    (['item', 'seen', 'user'], torch.Size([2, 20]))
    >>> torch.equal(pooled["item"][0], pooled["seen"][1]), pooled["item"][1].tolist()
    (True, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])

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
        for table in tables:
            if table.pooling not in _POOLING:
                raise ConfigError(f"table {table.name!r}: got pooling {table.pooling}, want SUM or MEAN")
            if is_weighted and table.pooling != PoolingType.SUM:
                raise ConfigError(f"table {table.name!r}: got pooling {table.pooling} with is_weighted, want SUM")
        super().__init__(EmbeddingBagCollection, tables, config, device, is_weighted=is_weighted)
        self._is_weighted = is_weighted

    @leaf
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors [B, sum of E] of bags of ids.

        Raises:
            KeyError: a feature that a table serves is not there.
            IndexError: an id outside its table.
            ValueError: lengths that do not fit the ids.
            ConfigError: weights where none are taken or the reverse, or a batch size per feature.
        """
        jagged = _jagged_by_feature(features, self._configs)
        if (features.weights_or_none() is not None) != self._is_weighted:
            got = "no per-sample weights" if self._is_weighted else "per-sample weights"
            raise ConfigError(f"features: got {got}, with is_weighted {self._is_weighted}: build the collection to fit")
        return KeyedTensor(
            keys=[name for names in self._embedding_names for name in names],
            length_per_key=[t.embedding_dim for t in self._configs for _ in t.feature_names],
            values=torch.cat([bags_BE for _, _, bags_BE in self._outputs(features, jagged)], dim=1),
        )

    def _of_feature(
        self, table: EmbeddingBagConfig, ids: JaggedTensor, vectors_NE: torch.Tensor, at_T: torch.Tensor
    ) -> torch.Tensor:
        return functional.embedding_bag(
            at_T,
            vectors_NE,
            ids.offsets(),
            mode=_POOLING[table.pooling],
            include_last_offset=True,
            per_sample_weights=ids.weights() if self._is_weighted else None,
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags are sums weighted by the features' weights."""
        return self._is_weighted


class DPQEmbeddingCollection(_Collection, EmbeddingCollectionInterface):
    """TorchRec's EmbeddingCollection with tables that are trained to be frozen to a few bytes a row.

    Two texts, of the words 9 and 31 and of the word 9:

    >>> words = EmbeddingConfig(name="word", num_embeddings=900, embedding_dim=8, feature_names=["text"])
    >>> ec = DPQEmbeddingCollection([words], DPQConfig(num_subspaces=4, num_codes=8))
    >>> texts = KeyedJaggedTensor(keys=["text"], values=torch.tensor([9, 31, 9]), lengths=torch.tensor([2, 1]))
    >>> vectors_TE = ec(texts)["text"].values()
    >>> vectors_TE.shape, torch.equal(vectors_TE[0], vectors_TE[2])
    (torch.Size([3, 8]), True)

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
        super().__init__(EmbeddingCollection, tables, config, device)
        self._need_indices = need_indices

    @leaf
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Vectors [T, E] of the ids of each feature; `feature@table` where a feature is served by several tables.

        Raises:
            KeyError: a feature that a table serves is not there.
            IndexError: an id outside its table.
            ValueError: lengths that do not fit the ids.
            ConfigError: a batch size per feature.
        """
        return {
            name: JaggedTensor(vectors_TE, lengths=ids.lengths(), weights=ids.values() if self._need_indices else None)
            for name, ids, vectors_TE in self._outputs(features, _jagged_by_feature(features, self._configs))
        }

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
