"""`Task`: what a recipe adds to the trainer. In: a RunConfig. Out: model, loss of a batch, metrics of an artifact.

The trainer knows no recipe: it asks a `Task`. Metrics are measured on what a run leaves, the frozen artifact and the
saved weights beside it: each rank reads its own part of them, and the test split needs no way back to the best epoch's
weights. The module in eval mode would give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec.nn import freeze
from dpq_rec.nn.model import TrainedTable, find_tables
from dpq_rec.vocabulary import Vocabulary


class Task(ABC):
    """Model, data, loss and metrics of a recipe; every rank makes it, of a RunConfig and the rank's device.

    Attributes:
        chosen_by: the validation metric that says which epoch is best.
        lower_is_better: whether that metric falls as a model gets better.
        is_refit: whether the validation split trains: no epoch is chosen by it, and the last one is kept.
        batch_size: examples of a step, as metrics.json shows it: fewer than configured where the data are few.
        num_negatives: how many items a rank draws beside a batch.
        num_steps: of an epoch, on each rank.
        num_examples: that an epoch trains on, over all ranks.
        vocabularies: table -> the map from its ids to rows.
        digest: of what is trained on: a run goes on with the same data alone.
    """

    chosen_by: str
    lower_is_better = False
    is_refit = False
    batch_size: int
    num_negatives = 0
    num_steps: int
    num_examples: int
    vocabularies: Mapping[str, Vocabulary]
    digest: str

    @abstractmethod
    def model(self) -> nn.Module:
        """The model, not distributed yet; its attribute `TABLES` is what names of tables' weights begin with."""

    @abstractmethod
    def distribute(self, model: nn.Module) -> tuple[nn.Module, KeyedOptimizer]:
        """The model as the ranks train it together, and the optimizer of all its parameters."""

    @abstractmethod
    def train_batches(self, epoch: int) -> Iterator[Any]:
        """This rank's `num_steps` batches of an epoch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> torch.Tensor:
        """Loss of this rank's batch, to be averaged over ranks; `generator` is the rank's own."""

    @abstractmethod
    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """Metrics of the artifact and weights in a folder on "validation" or "test"; every rank calls it.

        Raises:
            ConfigError: the split holds nothing to measure.
        """

    def tables(self, model: nn.Module) -> dict[str, TrainedTable]:
        """The tables of a distributed model, whose numbers are checked after every epoch."""
        return find_tables(model, list(self.vocabularies))

    def freeze(self, model: nn.Module, path: Path) -> None:
        """Write the artifact of a distributed model to a new folder; every rank calls it."""
        freeze(model, path, tables=list(self.vocabularies), vocabularies=self.vocabularies)
