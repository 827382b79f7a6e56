"""What is trained on, the same on every rank. In: DataOptions. Out: Source(interactions, columns, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dpq_rec import ConfigError
from dpq_rec.vocabulary import Vocabulary, load_vocabulary
from training.config import SYNTHETIC, RunConfig
from training.data.files import IDS
from training.data.interactions import Interactions
from training.data.splits import SplitCounts
from training.data.synthetic import SyntheticConfig, generate
from training.data.vocabularies import ColumnVocabulary, VocabularyPolicy, build_vocabulary
from training.parallel import on_rank_0


class Source(NamedTuple):
    """Interactions, and what was counted in them.

    Attributes:
        interactions: the data.
        columns: user_id, item_id and each categorical feature -> its vocabulary and how often each row occurs.
        counts: rows of each split.
    """

    interactions: Interactions
    columns: dict[str, ColumnVocabulary]
    counts: SplitCounts

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """Column -> the map from its values to rows."""
        return {name: column.vocabulary for name, column in self.columns.items()}

    @property
    def num_embeddings(self) -> Mapping[str, int]:
        """Column -> rows of its table."""
        return {name: column.num_embeddings for name, column in self.columns.items()}


def open_source(config: RunConfig) -> Source:
    """Open the data, or generate them, and count; every rank calls it.

    Raises:
        ConfigError: the data cannot be read, lack a column, or have no validation or test rows.
    """
    path = Path(config.data.path)
    if config.data.path == SYNTHETIC:
        path = Path(config.run.out) / SYNTHETIC
        on_rank_0(lambda: generate(_population(config), path))
    interactions = Interactions.open(path, features=config.data.features, label=config.recipe == "dlrm")
    counts = interactions.count_splits()
    if not (counts.validation and counts.test):
        got = f"{counts.validation} validation and {counts.test} test rows"
        raise ConfigError(f"data: got {got}, want some of each; without a column `split`, users need three rows")
    columns = {}
    for name in (*IDS, *interactions.categorical_features):
        policy = config.data.vocabulary if name in IDS else VocabularyPolicy()
        columns[name] = _from_rank_0(interactions, name, policy)
    return Source(interactions, columns, counts)


def distinct_values(source: Source, name: str) -> ColumnVocabulary:
    """The exact vocabulary of a column: its own where each of its values has a row; every rank calls it."""
    own = source.columns[name]
    if len(getattr(own.vocabulary, "rows_U", ())) == own.num_embeddings:
        return own
    return _from_rank_0(source.interactions, name, VocabularyPolicy())


def _population(config: RunConfig) -> SyntheticConfig:
    data = config.data
    sizes: dict[str, Any] = {
        "num_users": data.num_users,
        "num_items": data.num_items,
        "num_interactions": data.num_interactions,
    }
    wanted = {"with_clicks": config.recipe == "dlrm", "string_ids": data.string_ids}
    return SyntheticConfig(**sizes, **wanted, seed=config.run.seed)


def _from_rank_0(interactions: Interactions, name: str, policy: VocabularyPolicy) -> ColumnVocabulary:
    """A column's vocabulary: rank 0 reads for all."""
    built = on_rank_0(lambda: build_vocabulary(interactions, name, policy))
    if dist.get_world_size() == 1:
        assert built is not None, "this is rank 0"
        return built
    tensors: Mapping[str, NDArray[Any]] = {} if built is None else built.vocabulary.tensors()
    described = [(key, tensor.dtype.str, tensor.shape) for key, tensor in tensors.items()]
    box = [None if built is None else (built.vocabulary.kind, built.num_embeddings, described)]
    dist.broadcast_object_list(box, 0)
    assert box[0] is not None, "rank 0 has sent it"
    kind, num_embeddings, described = box[0]
    received = {key: _broadcast(tensors.get(key), dtype, shape) for key, dtype, shape in described}
    counts_V = _broadcast(None if built is None else built.counts_V, "<i8", (num_embeddings,))
    return built or ColumnVocabulary(load_vocabulary(kind, num_embeddings, received), counts_V)


def _broadcast(array: NDArray[Any] | None, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that rank 0 has, on every rank: as bytes, since not every dtype travels."""
    content = np.empty(shape, dtype) if array is None else np.array(array)
    dist.broadcast(torch.from_numpy(content.reshape(-1).view(np.uint8)), 0)
    return content
