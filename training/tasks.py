"""What a recipe adds to the trainer. In: a Source. Out: the model, the loss of a batch, the metrics of an artifact.

The trainer knows no recipe: it asks a `Task`. Metrics are measured on what a run leaves, the frozen artifact and the
saved weights beside it: each rank reads its own part of them, and the test split needs no way back to the best epoch's
weights. The module in eval mode would give the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec import EmbeddingStore
from dpq_rec.vocabulary import Vocabulary
from training.config import OptimisationOptions, RunConfig
from training.data.batches import Bag, Batch, eval_batches, train_batches
from training.data.dense import dense_statistics
from training.data.histories import Histories
from training.data.splits import TEST, VALIDATION
from training.evaluation.clicks import click_metrics
from training.evaluation.ranking import RetrievalMetrics
from training.evaluation.retrieval import Retrieval
from training.evaluation.served import ServedTables
from training.interaction_options import DLRMOptions, TwoTowerOptions
from training.models import (
    BY_CONFIGURATION,
    HISTORY,
    ITEM,
    NEGATIVE,
    USER,
    ClickThrough,
    TableKind,
    TwoTower,
    two_tower_features,
)
from training.parallel import shard
from training.source import open_source
from training.text_tasks import LanguageModelTask, TextClassificationTask

_logger = logging.getLogger(__name__)
SPLITS = {"validation": VALIDATION, "test": TEST}
_EVAL_BATCH = 16_384
_MIN_STEPS = 20  # of an epoch, on each rank


class Task(Protocol):
    """A recipe at work on its data.

    Attributes:
        chosen_by: the validation metric that says which epoch is best.
        lower_is_better: whether that metric falls as a model gets better.
        batch_size: examples of a step, as metrics.json shows it: less than asked for where the data are few.
        num_negatives: how many items a rank draws beside a batch.
        num_steps: of an epoch, on each rank.
        num_examples: that an epoch trains on, over all ranks.
        vocabularies: table -> the map from its ids to rows.
    """

    chosen_by: str
    lower_is_better: bool
    batch_size: int
    num_negatives: int
    num_steps: int
    num_examples: int
    vocabularies: Mapping[str, Vocabulary]

    def digest(self) -> str:
        """Of what is trained on: a run goes on with the same data alone."""

    def model(self) -> nn.Module:
        """The model, not distributed yet; its attribute `TABLES` is what names of tables' weights begin with."""

    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """The model as the ranks train it together, and the optimizer of all its parameters."""

    def learning_rate(self, epoch: int) -> float | None:
        """What all groups of the optimizer take in an epoch; None where each keeps to what it began with."""

    def train_batches(self, epoch: int) -> Iterator[Any]:
        """This rank's `num_steps` batches of an epoch."""

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> torch.Tensor:
        """Loss of this rank's batch, to be averaged over ranks; `generator` is the rank's own."""

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """Metrics of the artifact and weights in a folder on "validation" or "test"; every rank calls it.

        Raises:
            ConfigError: the split holds nothing to measure.
        """


class _InteractionTask:
    """What the two recipes over interactions share; every rank makes it."""

    lower_is_better = False

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert isinstance(config.optimisation, OptimisationOptions), "the configuration is checked"
        self.config, self.optimisation, self.device = config, config.optimisation, device
        self.source = open_source(config)
        self.vocabularies, self.digest = self.source.vocabularies, self.source.digest
        # Little data would give an epoch of a few steps.
        most = max(1, self.source.counts.train // (_MIN_STEPS * dist.get_world_size()))
        self.batch_size = min(most, self.optimisation.batch_size)
        self.num_negatives = self._negatives_of(self.batch_size)
        self.num_steps = self.source.counts.train // (self.batch_size * dist.get_world_size())
        self.num_examples = self.num_steps * self.batch_size * dist.get_world_size()
        self._tell_what_is_cut()

    def _negatives_of(self, batch_size: int) -> int:
        """How many items a rank draws beside so many examples."""
        return 0

    def _tell_what_is_cut(self) -> None:
        asked, drawn = self.optimisation.batch_size, self._negatives_of(self.optimisation.batch_size)
        if self.batch_size < asked and dist.get_rank() == 0:
            cut = f", with {self.num_negatives} negatives, not {drawn}" if self.num_negatives < drawn else ""
            num_examples = self.source.counts.train
            _logger.info("batches of %d, not %d%s: there are %d examples", self.batch_size, asked, cut, num_examples)

    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """See `Task.distribute`."""
        return shard(model, self.optimisation, self.device)

    def learning_rate(self, epoch: int) -> float | None:
        """See `Task.learning_rate`."""
        return None

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


class RetrievalTask(_InteractionTask):
    """Recipe two-tower."""

    chosen_by = "ndcg@10"

    def __init__(self, config: RunConfig, device: torch.device, kind: TableKind = BY_CONFIGURATION) -> None:
        assert isinstance(config.model, TwoTowerOptions), "the configuration is checked"
        self.options, self.kind = config.model, kind
        super().__init__(config, device)
        self.histories = None
        if self.options.history:
            self.histories = Histories(self.source.interactions, self.source.vocabularies)
            self.vocabularies = {ITEM: self.source.vocabularies[ITEM]}
        self.retrieval = Retrieval(self.source, config.model, self.histories)

    def model(self) -> TwoTower:
        """See `Task.model`."""
        drawn = [] if self.options.negatives == "in-batch" else [NEGATIVE]
        by_rows, by_history = {USER: [USER], ITEM: [ITEM, *drawn]}, {ITEM: [ITEM, *drawn, HISTORY]}
        features = by_history if self.options.history else by_rows
        tables = self.kind.make(features, self.source.num_embeddings, self.config.embedding)
        counts_V = torch.from_numpy(self.source.columns[ITEM].counts_V)
        return TwoTower(self.options, tables, (counts_V / counts_V.sum()).float(), self.device)

    def _negatives_of(self, batch_size: int) -> int:
        return 0 if self.options.negatives == "in-batch" else min(self.options.num_negatives or batch_size, batch_size)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`."""
        users, items = batch.bags[USER].rows_T, batch.bags[ITEM].rows_T
        items_B = torch.from_numpy(items).to(self.device)
        num_items, num_negatives = self.source.num_embeddings[ITEM], self._negatives_of(len(items))
        negatives_N = torch.randint(num_items, (num_negatives,), generator=generator).to(self.device)
        told_by: torch.Tensor | Bag
        if self.histories is None:
            told_by = torch.from_numpy(users).to(self.device)
        else:
            told_by = self.histories.draw(users, items, self.options.history, generator)
        return model(two_tower_features(told_by, items_B, negatives_N), items_B, negatives_N)

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: recall and ndcg at 10 and 20."""
        return self.retrieval.measure(EmbeddingStore.open(folder / "artifact"), SPLITS[split])

    def by_user(self, folder: Path, split: str) -> RetrievalMetrics:
        """What `measure` measures, of each of this rank's users."""
        return self.retrieval.by_user(EmbeddingStore.open(folder / "artifact"), SPLITS[split])


class ClickTask(_InteractionTask):
    """Recipe dlrm."""

    chosen_by = "auc"

    def __init__(self, config: RunConfig, device: torch.device, kind: TableKind = BY_CONFIGURATION) -> None:
        assert isinstance(config.model, DLRMOptions), "the configuration is checked"
        self.options, self.kind = config.model, kind
        super().__init__(config, device)
        self.statistics = dense_statistics(self.source.interactions)

    def model(self) -> ClickThrough:
        """See `Task.model`."""
        features = {name: [name] for name in self.source.columns}
        tables = self.kind.make(features, self.source.num_embeddings, self.config.embedding)
        return self._around(tables)

    def _around(self, tables: nn.Module) -> ClickThrough:
        means_F, deviations_F = (torch.from_numpy(each) for each in self.statistics[:2])
        return ClickThrough(self.options, tables, means_F, deviations_F, self.device)

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

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: AUC and normalised entropy."""
        scored = self.score(folder, split)
        return click_metrics(scored.logits_N, scored.labels_N)

    @torch.no_grad()
    def score(self, folder: Path, split: str) -> ScoredClicks:
        """What `measure` measures, of each of this rank's examples."""
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
        logits, labels, users = [torch.empty(0)], [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
        for batch in batches:
            if not batch.num_examples:  # fewer rows left than ranks: TorchRec splits no empty batch
                continue
            logits.append(self._logits(served, batch).cpu())
            labels.append(torch.from_numpy(batch.labels_B))
            users.append(_user_rows(batch))
        return ScoredClicks(torch.cat(logits), torch.cat(labels), torch.cat(users))


class ScoredClicks(NamedTuple):
    """N examples: logits and labels (float32), and the row of each one's user (int64), -1 where it has none."""

    logits_N: torch.Tensor
    labels_N: torch.Tensor
    user_rows_N: torch.Tensor


def _user_rows(batch: Batch) -> torch.Tensor:
    rows_B = np.full(batch.num_examples, -1)
    rows_B[batch.bags[USER].lengths_B > 0] = batch.bags[USER].rows_T
    return torch.from_numpy(rows_B)


TASKS: dict[str, Callable[..., Task]] = {
    "two-tower": RetrievalTask,
    "dlrm": ClickTask,
    "language-model": LanguageModelTask,
    "text-classification": TextClassificationTask,
}
