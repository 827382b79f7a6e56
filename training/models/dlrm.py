"""DLRM, click-through: TorchRec's model, as it is, around the tables.

In: a DLRMConfig. Out: a `Task`: batches, the loss, AUC and normalised entropy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from dpq_rec import EmbeddingStore
from training.data.batches import Batch, eval_batches
from training.data.dense import dense_statistics
from training.evaluation.clicks import click_metrics
from training.evaluation.served import ServedTables
from training.models.interactions import SPLITS, InteractionTask
from training.recipes.dlrm import DLRMConfig, DLRMOptions
from training.source import USER

_EVAL_BATCH = 16_384


class ClickThrough(nn.Module):
    """DLRM (Naumov et al., 2019) over vectors of ids and categorical features and over standardised dense features.

    Args:
        options: of the recipe.
        tables: pooled vectors by column; anything with TorchRec's interface of an EmbeddingBagCollection.
        means_F: of the dense features in the training split (float64: float32 has too few digits for large numbers that
            lie close together), and
        deviations_F: their standard deviations, more than 0. Both are buffers: the saved model takes features
            as they come.
        device: of the weights.
    """

    TABLES = "dlrm.sparse_arch.embedding_bag_collection."  # what the names of the tables' weights begin with

    def __init__(
        self,
        options: DLRMOptions,
        tables: EmbeddingBagCollection,
        means_F: torch.Tensor,
        deviations_F: torch.Tensor,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.means_F: torch.Tensor
        self.deviations_F: torch.Tensor
        self.register_buffer("means_F", means_F.to(device))
        self.register_buffer("deviations_F", deviations_F.to(device))
        self.dlrm = DLRM(
            embedding_bag_collection=tables,
            dense_in_features=max(1, len(means_F)),
            dense_arch_layer_sizes=[*options.dense_layers, tables.embedding_bag_configs()[0].embedding_dim],
            over_arch_layer_sizes=[*options.over_layers, 1],
            dense_device=device,
        )

    def forward(self, features: KeyedJaggedTensor, dense_BF: torch.Tensor) -> torch.Tensor:
        """Logits [B] of the label being 1.

        Args:
            features: rows by column.
            dense_BF: the dense features as they come (float64, or what they fit in).
        """
        standard_BF = ((dense_BF - self.means_F) / self.deviations_F).float()
        if not dense_BF.shape[1]:  # DLRM wants one at least: without any, its dense part is a vector that is learned
            standard_BF = standard_BF.new_ones(len(dense_BF), 1)
        return self.dlrm(standard_BF, features).squeeze(1)


class DLRMTask(InteractionTask):
    """Recipe dlrm."""

    chosen_by = "auc"

    def __init__(self, config: DLRMConfig, device: torch.device) -> None:
        self.options = config.model
        super().__init__(config, device)
        self.statistics = dense_statistics(self.source.interactions)

    def model(self) -> ClickThrough:
        """See `Task.model`."""
        return self._around(self.make_tables({name: [name] for name in self.source.vocabularies}))

    def _around(self, tables: nn.Module) -> ClickThrough:
        means_F, deviations_F = (torch.from_numpy(each) for each in self.statistics)
        return ClickThrough(self.options, tables, means_F, deviations_F, self.device)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Task.loss`: binary cross-entropy."""
        assert batch.labels_B is not None, "labels were requested"
        labels_B = torch.from_numpy(batch.labels_B).to(self.device)
        return functional.binary_cross_entropy_with_logits(self._logits(model, batch), labels_B)

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        features = KeyedJaggedTensor(
            keys=list(batch.bags),
            values=torch.from_numpy(np.concatenate([bag.rows_T for bag in batch.bags.values()])).to(self.device),
            lengths=torch.from_numpy(np.concatenate([bag.lengths for bag in batch.bags.values()])).to(self.device),
        )
        return model(features, torch.from_numpy(batch.dense_BF).to(self.device))

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`: AUC and normalised entropy."""
        found = self.by_user(folder, split)
        return click_metrics(torch.from_numpy(found["logits_N"]), torch.from_numpy(found["labels_N"]))

    @torch.no_grad()
    def by_user(self, folder: Path, split: str) -> dict[str, NDArray[Any]]:
        """See `InteractionTask.by_user`: `logits_N` and `labels_N` (float32) of N examples.

        `user_rows_N` are the rows of their users (int64), -1 where one has none.
        """
        served = self._around(ServedTables(EmbeddingStore.open(folder / "artifact"), list(self.source.vocabularies)))
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
        logits, labels, users = list[Any](), list[Any](), list[Any]()
        for batch in batches:
            if not batch.num_examples:  # fewer rows left than ranks: TorchRec splits no empty batch
                continue
            logits.append(self._logits(served, batch).cpu().numpy())
            labels.append(batch.labels_B)
            rows_B = np.full(batch.num_examples, -1)
            rows_B[batch.bags[USER].lengths > 0] = batch.bags[USER].rows_T
            users.append(rows_B)
        return {
            "logits_N": np.concatenate([np.empty(0, np.float32), *logits]),
            "labels_N": np.concatenate([np.empty(0, np.float32), *labels]),
            "user_rows_N": np.concatenate([np.empty(0, np.int64), *users]),
        }
