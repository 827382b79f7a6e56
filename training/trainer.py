"""One run, whatever its recipe: a task -> epochs -> the best epoch's artifact -> metrics.json.

Every epoch ends with a freeze, and its metrics are measured on the artifact: what is reported is what will be served.
Epochs of the warm-up, before tables are quantized, have nothing to freeze and no metrics. A refit trains on the
validation split too: no epoch is measured on it, and the last one counts as the best.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from tqdm import tqdm

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.files import replace_file
from dpq_rec.nn.finite import Numbers, check_finite
from dpq_rec.nn.model import check_tables
from training.checkpoint import (
    ARTIFACT,
    CHECKPOINTS,
    METRICS,
    Checkpoints,
    Progress,
    claim_folder,
    dense_weights,
    finished_results,
    write_json,
)
from training.config import RunConfig
from training.distributed import add_up, choose_device, on_rank_0, process_group, stored
from training.evaluation.code_stats import code_stats
from training.models.dlrm import DLRMTask
from training.models.language_model import LanguageModelTask
from training.models.text_classification import TextClassificationTask
from training.models.two_tower import TwoTowerTask
from training.results import results
from training.schedule import begin_epoch, set_rates
from training.task import Task
from training.tensorboard import TENSORBOARD, TensorBoard, summary_writer

TASKS: dict[str, type[Task]] = {
    "two-tower": TwoTowerTask,
    "dlrm": DLRMTask,
    "language-model": LanguageModelTask,
    "text-classification": TextClassificationTask,
}
_logger = logging.getLogger(__name__)
_LARGEST = 1e16  # in a plain table: products of two such vectors are far from what overflows
_SHOWN_STEPS = 20  # the loss is looked at, and shown as the mean of so many


@contextlib.contextmanager
def _at(epoch: int, step: int) -> Iterator[None]:
    """Say in an error where the run stood."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"epoch {epoch}, step {step}: {error}") from error


def train(config: RunConfig, task: type[Task] | None = None) -> dict[str, Any]:
    """Run a configuration, or go on with it where DIR holds a part of it; every rank calls it.

    Where DIR holds the whole of it, nothing is read but metrics.json.

    Args:
        config: what to run.
        task: in the place of the recipe's own, such as a subclass of it that makes other tables. DIR does not say
            which: keep their runs apart.

    Returns:
        What metrics.json holds (contract 2).

    Raises:
        ConfigError: settings, data or DIR that make no sense.
        MissingDependencyError: tensorboard is not installed.
    """
    summary_writer()  # every rank looks for it before one waits for another
    device = choose_device(config)
    with process_group(device), contextlib.ExitStack() as claims:  # of rank 0

        def claim() -> None:
            claims.enter_context(claim_folder(config, dist.get_world_size()))

        on_rank_0(claim)
        return finished_results(Path(config.run.out)) or Run(config, device, task).finish()


class Run:
    """A run in progress: its data, its model, and where it stands."""

    def __init__(self, config: RunConfig, device: torch.device, task: type[Task] | None = None) -> None:
        self.config, self.out = config, Path(config.run.out)
        self.started = time.monotonic()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        make_task: Callable[..., Task] = task or TASKS[config.recipe]
        self.device, self.task = device, make_task(config, device)
        self.num_steps = self.task.num_steps
        torch.manual_seed(config.run.seed)
        model = self.task.model()
        self.tables = str(model.TABLES)
        torch.manual_seed(config.run.seed + self.rank)  # shards start anew, and two ranks' must not start alike
        self.model, self.optimizer = self.task.distribute(model)
        # Before a checkpoint is loaded, which brings the rates of its last step.
        self.first_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, stored(self.model), self.optimizer, self.task.digest)

    def finish(self) -> dict[str, Any]:
        """Train what is left to train, and write what a run leaves."""
        progress = self.checkpoints.load_latest()
        if progress.epoch and self.rank == 0:
            _logger.info("going on after epoch %d of %s", progress.epoch, self.out)
        num_steps_done = progress.epoch * self.num_steps
        with TensorBoard(self.out / TENSORBOARD, num_steps_done, is_writer=self.rank == 0).closing() as board:
            while progress.epoch < self.config.optimisation.epochs and not self._stops_early(progress):
                self._epoch(progress, board)
        return self._keep_best(progress)

    def _stops_early(self, progress: Progress) -> bool:
        """Whether the last `patience` epochs, of those that are measured, brought no better one."""
        patience = self.config.optimisation.patience
        best = max(progress.best_epoch, self.config.full_epochs)
        return patience is not None and progress.epoch - best >= patience

    def _epoch(self, progress: Progress, board: TensorBoard) -> None:
        progress.epoch += 1
        with _at(progress.epoch, 0):
            begin_epoch(self.model, self.optimizer, self.config, progress.epoch)
        began = time.monotonic()
        loss = self._train(progress.epoch, board)
        progress.train_seconds += time.monotonic() - began
        progress.examples += self.task.num_examples
        if progress.epoch > self.config.full_epochs:
            with _at(progress.epoch, self.num_steps):
                self._evaluate(progress, loss, board)
        else:  # no codes yet, that could be frozen and measured
            progress.history.append({"epoch": progress.epoch, "loss": loss, "codes": {}})
            if self.rank == 0:
                _logger.info("epoch %d: loss %.4f, not quantized", progress.epoch, loss)
        board.flush()
        progress.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        self.checkpoints.save(progress)
        if self.rank == 0:  # after the checkpoint: a run that is killed goes on with what it names
            self._remove_candidates(progress.epoch, progress.best_epoch)

    def _evaluate(self, progress: Progress, loss: float, board: TensorBoard) -> None:
        """Freeze what the epoch has made, and measure that, where validation rows are left to measure on."""
        candidate = self._candidate(progress.epoch)
        self._freeze(candidate)
        is_refit = self.task.is_refit
        metrics = {} if is_refit else self.task.measure(candidate, "validation")
        codes = self._count_codes(progress.epoch, board)
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics, "codes": codes})
        chosen_by = None if is_refit else metrics[self.task.chosen_by]
        progress.update_best(chosen_by, lower_is_better=self.task.lower_is_better)
        if self.rank == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            _logger.info("epoch %d: loss %.4f, %s", progress.epoch, loss, f"validation {shown}" if shown else "refit")
        board.numbers("validation", metrics, progress.epoch * self.num_steps)

    def _train(self, epoch: int, board: TensorBoard) -> float:
        """One pass over the training split; the mean loss over all ranks.

        Raises:
            ConfigError: the training diverged.
        """
        seed = hash((self.config.run.seed, epoch, self.rank)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout: a run that goes on draws as one that was not disturbed
        done = (epoch - 1) * self.num_steps
        self.model.train()
        total, shown = torch.zeros((), device=self.device), 0.0
        num_bad = torch.zeros((), dtype=torch.int64, device=self.device)  # steps since the loss is not finite
        title = f"epoch {epoch}/{self.config.optimisation.epochs}"
        bar = tqdm(
            self.task.train_batches(epoch), title, self.num_steps, disable=self.rank != 0, unit="step", file=sys.stderr
        )
        for step, batch in enumerate(bar, 1):
            factor = self.config.optimisation.rate_factor(done + step - 1, self.num_steps, self.config.full_epochs)
            set_rates(self.optimizer, self.first_rates, factor)
            self.optimizer.zero_grad()
            with _at(epoch, step):
                loss = self.task.loss(self.model, batch, generator)
            loss.backward()  # updates the tables too
            self.optimizer.step()
            total += loss.detach()
            num_bad += ~total.isfinite()
            if step % _SHOWN_STEPS == 0 or step == self.num_steps:
                self._check_loss(epoch, step, num_bad)
            if step % _SHOWN_STEPS == 0 and self.rank == 0:
                mean, shown = (float(total) - shown) / _SHOWN_STEPS, float(total)
                bar.set_postfix(loss=f"{mean:.4f}")
                board.numbers("train", {"loss": mean}, done + step)
        with _at(epoch, self.num_steps):
            self._check_weights()
        (sum_of_losses,) = add_up([float(total)])
        return sum_of_losses / (self.num_steps * self.world_size)

    def _check_loss(self, epoch: int, step: int, num_bad: torch.Tensor) -> None:
        """Raises ConfigError for a loss that is not finite on some rank, since `num_bad` steps; every rank calls it."""
        worst = num_bad.cpu()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if worst:
            with _at(epoch, step - int(worst) + 1):
                self._check_weights()
                raise ConfigError("the loss is not finite; try a lower --learning-rate")

    def _check_weights(self) -> None:
        """Raises ConfigError for tables or other weights that are not finite; every rank calls it before a save."""
        check_tables(self.task.tables(self.model), largest_vector=_LARGEST)
        weights = dense_weights(stored(self.model), self.tables).items()
        check_finite([Numbers(f"weight {name!r}", "numbers", weight) for name, weight in weights])

    def _candidate(self, epoch: int) -> Path:
        return self.out / CHECKPOINTS / f"candidate-{epoch:04d}"

    def _remove_candidates(self, *kept: int) -> None:
        for folder in (self.out / CHECKPOINTS).glob("candidate-*"):
            if folder not in map(self._candidate, kept):
                shutil.rmtree(folder)

    def _freeze(self, folder: Path) -> None:
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a run that was killed
        self.task.freeze(self.model, folder / "artifact")
        weights = dense_weights(stored(self.model), self.tables)
        on_rank_0(lambda: replace_file(folder / "model.safetensors", save(weights)))

    def _count_codes(self, epoch: int, board: TensorBoard) -> dict[str, Any]:
        """How the epoch's artifact uses its codes, and how many differ from the epoch before; {} on other ranks."""
        if self.rank != 0:
            return {}
        before = self._candidate(epoch - 1) / "artifact"
        earlier = EmbeddingStore.open(before).tables if before.exists() else {}
        counted = {}
        for name, table in EmbeddingStore.open(self._candidate(epoch) / "artifact").tables.items():
            if table.manifest.has_codes:
                counted[name] = code_stats(table, earlier.get(name))
                board.codes(name, table.manifest.layout, counted[name], epoch * self.num_steps)
        return counted

    def _keep_best(self, progress: Progress) -> dict[str, Any]:
        """Move the best epoch's artifact and weights to their place, and measure them on the test split."""
        best = self._candidate(progress.best_epoch)
        if self.rank == 0:
            for name in (ARTIFACT, "model.safetensors"):
                if (best / name).exists():
                    (best / name).rename(self.out / name)
            self._remove_candidates()
        dist.barrier()
        test = self.task.measure(self.out, "test")
        progress.seconds += time.monotonic() - self.started
        store = EmbeddingStore.open(self.out / ARTIFACT)
        found = results(self.config, store, progress, test, self.task, self.device)
        on_rank_0(lambda: write_json(self.out / METRICS, found))
        return found
