"""One run: interactions -> vocabularies -> epochs -> the best epoch's artifact -> metrics.json.

Every epoch ends with a freeze, and its metrics are measured on the artifact: what is reported is what will be served.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

from dpq_rec import ConfigError, EmbeddingStore, Int64Vocabulary
from dpq_rec.artifact import Table, sizes
from dpq_rec.nn import freeze
from training.batches import train_batches
from training.checkpoint import CHECKPOINTS, Checkpoints, Progress, claim_folder, dense_weights, write_json
from training.config import SYNTHETIC, RunConfig
from training.interactions import Interactions
from training.models import ITEM, USER, TwoTower, two_tower_features
from training.parallel import add_up, array_from_rank_0, choose_device, on_rank_0, process_group, shard
from training.retrieval import Retrieval
from training.synthetic import SyntheticConfig, generate
from training.vocabularies import count_ids

_logger = logging.getLogger(__name__)
_MIN_STEPS = 20  # of an epoch, on each rank
_CHOSEN_BY = "ndcg@10"  # the validation metric that says which epoch is best


def train(config: RunConfig) -> dict[str, Any]:
    """Run a configuration, or go on with it where DIR holds a part of it; every rank calls it.

    Returns:
        What metrics.json holds (contract 2).

    Raises:
        ConfigError: settings, data or DIR that make no sense.
    """
    device = choose_device(config.device)
    with process_group(device):
        claim = on_rank_0(lambda: claim_folder(config, dist.get_world_size()))
        try:
            return Run(config, device).finish()
        finally:
            if claim is not None:
                claim.close()


class Run:
    """A run in progress: its data, its model, and where it stands."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.out = config, device, Path(config.out)
        self.started = time.monotonic()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.interactions = Interactions.open(self._data())
        self.vocabularies = {name: self._vocabulary(name) for name in (USER, ITEM)}
        num_embeddings = {name: len(v.ids_U) for name, v in self.vocabularies.items()}
        num_examples = self._count_examples()
        self.batch_size = self._fitting_batch_size(num_examples)
        self.num_steps = num_examples // (self.batch_size * self.world_size)
        torch.manual_seed(config.seed)
        model = TwoTower(config, num_embeddings, device)
        torch.manual_seed(config.seed + self.rank)  # shards start anew, and those of two ranks must not start alike
        self.model, self.optimizer = shard(model, config, device)
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, self.model, self.optimizer)
        self.retrieval = Retrieval(self.interactions, self.vocabularies, config)

    def finish(self) -> dict[str, Any]:
        """Train what is left to train, and write what a run leaves."""
        progress = self.checkpoints.load_latest()
        if progress.epoch and self.rank == 0:
            _logger.info("going on after epoch %d of %s", progress.epoch, self.out)
        while progress.epoch < self.config.epochs and progress.epoch - progress.best_epoch < self.config.patience:
            self._epoch(progress)
        return self._leave(progress)

    def _data(self) -> Path:
        if self.config.data != SYNTHETIC:
            return Path(self.config.data)
        c, path = self.config, self.out / SYNTHETIC
        sizes: dict[str, Any] = {
            "num_users": c.num_users,
            "num_items": c.num_items,
            "num_interactions": c.num_interactions,
        }
        on_rank_0(lambda: generate(SyntheticConfig(**sizes, seed=c.seed), path))
        return path

    def _vocabulary(self, name: str) -> Int64Vocabulary:
        """Rows by falling frequency in the training split; rank 0 reads for all."""
        return Int64Vocabulary.from_ids(array_from_rank_0(lambda: count_ids(self.interactions, name).ids_U.to_numpy()))

    def _count_examples(self) -> int:
        counts = self.interactions.count_splits()
        if not (counts.validation and counts.test):
            got = f"{counts.validation} validation and {counts.test} test rows"
            raise ConfigError(f"data: got {got}, want some of each; without a column `split`, users need three rows")
        return counts.train

    def _fitting_batch_size(self, num_examples: int) -> int:
        """What was asked for, or less where little data would give an epoch of a few steps."""
        most = max(1, num_examples // (_MIN_STEPS * self.world_size))
        if most < self.config.batch_size and self.rank == 0:
            _logger.info("batches of %d, not %d: there are %d examples", most, self.config.batch_size, num_examples)
        return min(most, self.config.batch_size)

    def _epoch(self, progress: Progress) -> None:
        progress.epoch += 1
        began = time.monotonic()
        loss = train_epoch(self, progress.epoch)
        progress.train_seconds += time.monotonic() - began
        progress.examples += self.num_steps * self.batch_size * self.world_size
        candidate = self._candidate(progress.epoch)
        self._freeze(candidate)
        metrics = self.retrieval.measure(EmbeddingStore.open(candidate / "artifact"), "validation")
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics})
        if self.rank == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            _logger.info("epoch %d: loss %.4f, validation %s", progress.epoch, loss, shown)
        superseded = self._candidate(progress.best_epoch)
        if metrics[_CHOSEN_BY] > progress.best_metric:
            progress.best_epoch, progress.best_metric = progress.epoch, metrics[_CHOSEN_BY]
        else:
            superseded = candidate
        progress.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        self.checkpoints.save(progress)
        if self.rank == 0:  # after the checkpoint: a run that is killed goes on with what it names
            shutil.rmtree(superseded, ignore_errors=True)

    def _candidate(self, epoch: int) -> Path:
        return self.out / CHECKPOINTS / f"candidate-{epoch:04d}"

    def _freeze(self, folder: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        dist.barrier()
        freeze(self.model, folder / "artifact", vocabularies=self.vocabularies)
        weights = dense_weights(self.model)
        if self.rank == 0:
            save_file(weights, folder / "model.safetensors")

    def _leave(self, progress: Progress) -> dict[str, Any]:
        """Move the best epoch's artifact and weights to their place, and measure the artifact on the test split."""
        best = self._candidate(progress.best_epoch)
        if self.rank == 0 and best.exists():
            for name in ("artifact", "model.safetensors"):
                if (best / name).exists():
                    (best / name).rename(self.out / name)
            best.rmdir()
        dist.barrier()
        store = EmbeddingStore.open(self.out / "artifact")
        test = self.retrieval.measure(store, "test")
        peak = _peak_memory_bytes(self.device)
        tables = {name: _sizes([table]) for name, table in store.tables.items()}
        result = {
            "recipe": self.config.recipe,
            "embedding": self.config.embedding,
            "seed": self.config.seed,
            "world_size": self.world_size,
            "config": self.config.as_dict(),
            "metrics": test,
            "tables": tables,
            "total": _sizes(store.tables.values()),
            "examples_per_second": progress.examples / max(progress.train_seconds, 1e-9),
            "seconds": progress.seconds + time.monotonic() - self.started,
            "best_epoch": progress.best_epoch,
            "peak_memory_bytes": peak,
            "history": progress.history,
        }
        if self.rank == 0:
            write_json(self.out / "metrics.json", result)
        return result


def train_epoch(run: Run, epoch: int) -> float:
    """One pass over the training split; the mean loss over all ranks.

    Raises:
        ConfigError: the training diverged.
    """
    config, device = run.config, run.device
    generator = torch.Generator().manual_seed(hash((config.seed, epoch, run.rank)) % 2**63)
    num_items = len(run.vocabularies[ITEM].ids_U)
    num_negatives = min(config.num_negatives, run.batch_size)
    batches = train_batches(
        run.interactions,
        run.vocabularies,
        batch_size=run.batch_size,
        rank=run.rank,
        world_size=run.world_size,
        seed=config.seed,
        epoch=epoch,
    )
    run.model.train()
    total = torch.zeros((), device=device)
    bar = tqdm(
        batches, f"epoch {epoch}/{config.epochs}", run.num_steps, disable=run.rank != 0, unit="step", file=sys.stderr
    )
    for step, batch in enumerate(bar):
        users_B, items_B = (torch.from_numpy(batch.bags[name].rows_T).to(device) for name in (USER, ITEM))
        negatives_N = torch.randint(num_items, (num_negatives,), generator=generator).to(device)
        loss = train_step(run.model, run.optimizer, users_B, items_B, negatives_N)
        total += loss
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    (sum_of_losses,) = add_up([float(total)])
    if not math.isfinite(sum_of_losses):
        raise ConfigError(f"epoch {epoch}: the loss is {sum_of_losses}; try a lower --learning-rate")
    return sum_of_losses / (run.num_steps * run.world_size)


def train_step(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    users_B: torch.Tensor,
    items_B: torch.Tensor,
    negatives_N: torch.Tensor,
) -> torch.Tensor:
    """Forward, backward (which updates the tables), and the dense parameters' step; this rank's loss."""
    optimizer.zero_grad()
    loss = model(two_tower_features(users_B, items_B, negatives_N), items_B, negatives_N)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _sizes(tables: Collection[Table]) -> dict[str, Any]:
    """As `sizes`, and the width that the tables share."""
    dims = {table.manifest.embedding_dim for table in tables}
    return {**sizes(tables), "embedding_dim": dims.pop() if len(dims) == 1 else None}


def _peak_memory_bytes(device: torch.device) -> int:
    """The largest of any rank: resident memory, or what CUDA allocated."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    largest = torch.tensor([own])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
