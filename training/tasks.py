"""What a recipe adds to the trainer. In: a Source. Out: the model, the loss of a batch, the metrics of an artifact.

The trainer knows no recipe: it asks a `Task`. Metrics are measured on what a run leaves, the frozen artifact and the
saved weights beside it: each rank reads its own part of them, and the test split needs no way back to the best epoch's
weights. The module in eval mode would give the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from dpq_rec import EmbeddingStore
from training.config import DLRMOptions, RunConfig, TwoTowerOptions
from training.data.batches import Batch, eval_batches
from training.data.dense import dense_statistics
from training.data.splits import TEST, VALIDATION
from training.evaluation.clicks import click_metrics
from training.evaluation.retrieval import Retrieval
from training.evaluation.served import ServedTables
from training.models import (
    BY_CONFIGURATION,
    ITEM,
    NEGATIVE,
    USER,
    ClickThrough,
    TableKind,
    TwoTower,
    two_tower_features,
)
from training.source import Source

SPLITS = {"validation": VALIDATION, "test": TEST}
_EVAL_BATCH = 16_384


class Task(Protocol):
    """A recipe at work on its data.

    Attributes:
        chosen_by: the validation metric that says which epoch is best; the larger the better.
    """

    chosen_by: str

    def model(self) -> nn.Module:
        """The model, not sharded yet; its attribute `TABLES` is what names of tables' weights begin with."""

    def num_negatives(self, batch_size: int) -> int:
        """How many items a rank draws beside a batch."""

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Mean loss of this rank's batch; `generator` is the rank's own."""

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """Metrics of the artifact and weights in a folder on "validation" or "test"; every rank calls it.

        Raises:
            ConfigError: the split holds nothing to measure.
        """


class RetrievalTask:
    """Recipe two-tower."""

    chosen_by = "ndcg@10"

    def __init__(
        self, config: RunConfig, source: Source, device: torch.device, kind: TableKind = BY_CONFIGURATION
    ) -> None:
        assert isinstance(config.model, TwoTowerOptions), "the configuration is checked"
        self.kind = kind
        self.config, self.options, self.source, self.device = config, config.model, source, device
        self.retrieval = Retrieval(source, config.model)

    def model(self) -> TwoTower:
        """See `Task.model`."""
        features = {USER: [USER], ITEM: [ITEM] if self.options.negatives == "in-batch" else [ITEM, NEGATIVE]}
        tables = self.kind.make(features, self.source.num_embeddings, self.config.embedding)
        counts_V = torch.from_numpy(self.source.columns[ITEM].counts_V)
        return TwoTower(self.options, tables, (counts_V / counts_V.sum()).float(), self.device)

    def num_negatives(self, batch_size: int) -> int:
        """See `Task.num_negatives`."""
        return 0 if self.options.negatives == "in-batch" else min(self.options.num_negatives, batch_size)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`."""
        users_B, items_B = (torch.from_numpy(batch.bags[name].rows_T).to(self.device) for name in (USER, ITEM))
        num_items, num_negatives = self.source.num_embeddings[ITEM], self.num_negatives(len(users_B))
        negatives_N = torch.randint(num_items, (num_negatives,), generator=generator).to(self.device)
        return model(two_tower_features(users_B, items_B, negatives_N), items_B, negatives_N)

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: recall and ndcg at 10 and 20."""
        return self.retrieval.measure(EmbeddingStore.open(folder / "artifact"), SPLITS[split])


class ClickTask:
    """Recipe dlrm."""

    chosen_by = "auc"

    def __init__(
        self, config: RunConfig, source: Source, device: torch.device, kind: TableKind = BY_CONFIGURATION
    ) -> None:
        assert isinstance(config.model, DLRMOptions), "the configuration is checked"
        self.kind = kind
        self.config, self.options, self.source, self.device = config, config.model, source, device
        self.statistics = dense_statistics(source.interactions)

    def model(self) -> ClickThrough:
        """See `Task.model`."""
        features = {name: [name] for name in self.source.columns}
        tables = self.kind.make(features, self.source.num_embeddings, self.config.embedding)
        return self._around(tables)

    def _around(self, tables: nn.Module) -> ClickThrough:
        means_F, deviations_F = (torch.from_numpy(each).float() for each in self.statistics[:2])
        return ClickThrough(self.options, tables, means_F, deviations_F, self.device)

    def num_negatives(self, batch_size: int) -> int:
        """See `Task.num_negatives`."""
        return 0

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`: binary cross-entropy."""
        assert batch.labels_B is not None, "the data were asked for labels"
        labels_B = torch.from_numpy(batch.labels_B).to(self.device)
        return functional.binary_cross_entropy_with_logits(self._logits(model, batch), labels_B)

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        features = KeyedJaggedTensor(
            keys=list(batch.bags),
            values=torch.from_numpy(np.concatenate([bag.rows_T for bag in batch.bags.values()])).to(self.device),
            lengths=torch.from_numpy(np.concatenate([bag.lengths_B for bag in batch.bags.values()])).to(self.device),
        )
        return model(features, torch.from_numpy(batch.dense_BF).to(self.device))

    @torch.no_grad()
    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: AUC and normalised entropy."""
        served = self._around(ServedTables(EmbeddingStore.open(folder / "artifact"), list(self.source.columns)))
        served.load_state_dict(load_file(folder / "model.safetensors"))
        served.eval()
        batches = eval_batches(
            self.source.interactions,
            self.source.vocabularies,
            SPLITS[split],
            batch_size=_EVAL_BATCH,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        logits, labels = [torch.empty(0)], [torch.empty(0)]
        for batch in batches:
            if not batch.num_examples:  # fewer rows left than ranks: TorchRec splits no empty batch
                continue
            logits.append(self._logits(served, batch).cpu())
            labels.append(torch.from_numpy(batch.labels_B))
        return click_metrics(torch.cat(logits), torch.cat(labels))


TASKS: dict[str, type[RetrievalTask] | type[ClickTask]] = {"two-tower": RetrievalTask, "dlrm": ClickTask}
