"""What the recipes over interactions, two-tower and dlrm, share. In: a configuration. Out: tables, batches of rows."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec.nn import DPQEmbeddingBagCollection
from training.config import EmbeddingOptions, RunConfig
from training.data.batches import Batch, train_batches
from training.data.interactions import TEST, VALIDATION
from training.distributed import shard
from training.source import ITEM, USER, Source
from training.task import Task

_logger = logging.getLogger(__name__)
SPLITS = {"validation": VALIDATION, "test": TEST}
_META = torch.device("meta")
_MIN_STEPS = 20  # of an epoch, on each rank


def make_tables(
    features: Mapping[str, Sequence[str]],
    num_embeddings: Mapping[str, int],
    options: EmbeddingOptions,
    device: torch.device = _META,
) -> nn.Module:
    """The tables, plain or DPQ, named by their columns; values of a feature are averaged.

    A table that DPQ makes no smaller stays plain.

    On the meta device they take no memory until they are sharded, so that no rank ever holds a whole one.

    Args:
        features: table -> the features that it serves.
        num_embeddings: table -> rows.
        options: of the tables.
        device: of the parameters.
    """
    tables = bag_configs(features, num_embeddings, options)
    configs = options.dpq_by_table({name: num_embeddings[name] for name in features})
    if not any(configs.values()):
        return EmbeddingBagCollection(tables=tables, device=device)
    return DPQEmbeddingBagCollection(tables, configs, device=device)


def bag_configs(
    features: Mapping[str, Sequence[str]], num_embeddings: Mapping[str, int], options: EmbeddingOptions
) -> list[EmbeddingBagConfig]:
    """TorchRec's configs of the tables; see `make_tables`."""
    bound = options.embedding_dim**-0.5
    return [
        EmbeddingBagConfig(
            name=name,
            embedding_dim=options.embedding_dim,
            num_embeddings=num_embeddings[name],
            feature_names=list(served),
            pooling=PoolingType.SUM if name in (USER, ITEM) else PoolingType.MEAN,  # an id is a bag of one
            init_fn=partial(nn.init.uniform_, a=-bound, b=bound),
        )
        for name, served in features.items()
    ]


class InteractionTask(Task):
    """A recipe over interactions: the ranks share out the tables, and each trains on batches of its own."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.is_refit = config.data.refit
        self.source = Source(config)
        self.vocabularies, self.digest = self.source.vocabularies, self.source.digest()
        # Little data would give an epoch of a few steps.
        most = max(1, self.source.counts.train // (_MIN_STEPS * dist.get_world_size()))
        self.batch_size = min(most, config.optimisation.batch_size)
        self.num_negatives = self.negatives_of(self.batch_size)
        self.num_steps = self.source.counts.train // (self.batch_size * dist.get_world_size())
        self.num_examples = self.num_steps * self.batch_size * dist.get_world_size()
        self._log_smaller_batches()

    def negatives_of(self, batch_size: int) -> int:
        """How many items a rank draws beside so many examples."""
        return 0

    def _log_smaller_batches(self) -> None:
        wanted = self.config.optimisation.batch_size
        drawn = self.negatives_of(wanted)
        if self.batch_size < wanted and dist.get_rank() == 0:
            cut = f", with {self.num_negatives} negatives, not {drawn}" if self.num_negatives < drawn else ""
            num_examples = self.source.counts.train
            _logger.info("batches of %d, not %d%s: there are %d examples", self.batch_size, wanted, cut, num_examples)

    def make_tables(self, features: Mapping[str, Sequence[str]]) -> nn.Module:
        """The model's tables, as `make_tables` has them; to train tables of another kind, override it and `freeze`.

        Args:
            features: table -> the features that it serves.

        Returns:
            A module with the interface of TorchRec's EmbeddingBagCollection.
        """
        return make_tables(features, self.source.num_embeddings, self.config.embedding)

    @abstractmethod
    def by_user(self, folder: Path, split: str) -> dict[str, NDArray[Any]]:
        """What `measure` measures, of each of this rank's users or examples."""

    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """See `Task.distribute`."""
        return shard(model, self.config.optimisation, self.device)

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """See `Task.train_batches`."""
        return train_batches(
            self.source.interactions,
            self.source.vocabularies,
            batch_size=self.batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            seed=self.config.run.seed,
            epoch=epoch,
        )
