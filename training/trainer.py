"""One run, whatever its recipe: a task -> epochs -> the best epoch's artifact -> metrics.json.

Every epoch ends with a freeze, and its metrics are measured on the artifact: what is reported is what will be served.
Epochs of a full phase, before tables are quantized, have nothing to freeze and no metrics. A refit trains on the
validation split too: no epoch is measured on it, and the last one counts as the best.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from tqdm import tqdm

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.files import naming
from dpq_rec.nn.find import check_tables, find_tables
from dpq_rec.nn.finite import Numbers, check_finite
from training.board import TENSORBOARD, Board, summary_writer
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
from training.evaluation.code_stats import code_stats
from training.models import BY_CONFIGURATION, TableKind
from training.parallel import add_up, choose_device, on_rank_0, process_group, stored
from training.phases import enter
from training.rates import Rates, Schedule
from training.results import Used, results
from training.tasks import TASKS

_logger = logging.getLogger(__name__)
_LARGEST = 1e16  # in a plain table: products of two such vectors are far from what overflows
_SHOWN_STEPS = 20  # the loss is looked at, and shown as the mean of so many


@contextlib.contextmanager
def _at(epoch: int, step: int) -> Iterator[None]:
    """Say in a refusal where the run stood."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"epoch {epoch}, step {step}: {error}") from error


def train(config: RunConfig, kind: TableKind = BY_CONFIGURATION) -> dict[str, Any]:
    """Run a configuration, or go on with it where DIR holds a part of it; every rank calls it.

    Where DIR holds the whole of it, nothing is read but metrics.json.

    Args:
        config: what to run.
        kind: tables other than those of the configuration; DIR does not say which: keep their runs apart.

    Returns:
        What metrics.json holds (contract 2).

    Raises:
        ConfigError: settings, data or DIR that make no sense.
        MissingDependencyError: tensorboard is not installed.
    """
    summary_writer()  # every rank looks for it before one waits for another
    device = choose_device(config)
    with process_group(device):
        claim = on_rank_0(lambda: claim_folder(config, dist.get_world_size()))
        try:
            return finished_results(Path(config.run.out)) or Run(config, device, kind).finish()
        finally:
            if claim is not None:
                claim.close()


class Run:
    """A run in progress: its data, its model, and where it stands."""

    def __init__(self, config: RunConfig, device: torch.device, kind: TableKind = BY_CONFIGURATION) -> None:
        self.config, self.out, self.kind = config, Path(config.run.out), kind
        self.started = time.monotonic()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        make_task = TASKS[config.recipe]
        self.device = device
        self.task = make_task(config, device) if kind is BY_CONFIGURATION else make_task(config, device, kind)
        self.num_steps = self.task.num_steps
        torch.manual_seed(config.run.seed)
        model = self.task.model()
        self.tables = str(model.TABLES)
        torch.manual_seed(config.run.seed + self.rank)  # shards start anew, and two ranks' must not start alike
        self.model, self.optimizer = self.task.distribute(model)
        schedule = Schedule.of(config, self.num_steps)
        self.rates = Rates(self.optimizer, schedule)  # before a checkpoint is loaded, with the last step's
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, stored(self.model), self.optimizer, self.task.digest())

    def finish(self) -> dict[str, Any]:
        """Train what is left to train, and write what a run leaves."""
        progress = self.checkpoints.load_latest()
        if progress.epoch and self.rank == 0:
            _logger.info("going on after epoch %d of %s", progress.epoch, self.out)
        with Board(self.out / TENSORBOARD, progress.epoch * self.num_steps, is_writer=self.rank == 0) as board:
            while progress.epoch < self.config.optimisation.epochs and not self._is_past_hope(progress):
                self._epoch(progress, board)
        return self._leave(progress)

    def _is_past_hope(self, progress: Progress) -> bool:
        """Whether `patience` epochs that could be the best were none."""
        patience = self.config.optimisation.patience
        best = max(progress.best_epoch, self.config.full_epochs)
        return patience is not None and progress.epoch - best >= patience

    def _epoch(self, progress: Progress, board: Board) -> None:
        progress.epoch += 1
        with _at(progress.epoch, 0):
            enter(self.model, self.optimizer, self.config, progress.epoch)
        began = time.monotonic()
        loss = self._train(progress.epoch, board)
        progress.train_seconds += time.monotonic() - began
        progress.examples += self.task.num_examples
        if progress.epoch > self.config.full_epochs:
            with _at(progress.epoch, self.num_steps):
                self._judge(progress, loss, board)
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

    def _judge(self, progress: Progress, loss: float, board: Board) -> None:
        """Freeze what the epoch has made, and measure that, where validation rows are left to measure on."""
        candidate = self._candidate(progress.epoch)
        self._freeze(candidate)
        is_refit = self.config.is_refit
        metrics = {} if is_refit else self.task.measure(candidate, "validation")
        codes = self._count_codes(progress.epoch, board)
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics, "codes": codes})
        chosen_by = None if is_refit else metrics[self.task.chosen_by]
        progress.note(chosen_by, lower_is_better=self.task.lower_is_better)
        if self.rank == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            _logger.info("epoch %d: loss %.4f, %s", progress.epoch, loss, f"validation {shown}" if shown else "refit")
        board.numbers("validation", metrics, progress.epoch * self.num_steps)

    def _train(self, epoch: int, board: Board) -> float:
        """One pass over the training split; the mean loss over all ranks.

        Raises:
            ConfigError: the training diverged.
        """
        seed = hash((self.config.run.seed, epoch, self.rank)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout: a run that goes on draws as one that was not disturbed
        rate, done = self.task.learning_rate(epoch), (epoch - 1) * self.num_steps
        self.model.train()
        total, shown = torch.zeros((), device=self.device), 0.0
        num_bad = torch.zeros((), dtype=torch.int64, device=self.device)  # steps since the loss is not finite
        title = f"epoch {epoch}/{self.config.optimisation.epochs}"
        bar = tqdm(
            self.task.train_batches(epoch), title, self.num_steps, disable=self.rank != 0, unit="step", file=sys.stderr
        )
        for step, batch in enumerate(bar, 1):
            self.rates.set(done + step - 1, rate)
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
        """Refuse a loss that is not finite on any rank, for `num_bad` steps by now; every rank calls it."""
        worst = num_bad.cpu()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if worst:
            with _at(epoch, step - int(worst) + 1):
                self._check_weights()
                raise ConfigError("the loss is not finite; try a lower --learning-rate")

    def _check_weights(self) -> None:
        """Refuse tables and other weights that are not finite, before they are saved; every rank calls it."""
        if self.kind is BY_CONFIGURATION:
            tables = find_tables(self.model, list(self.task.vocabularies))
            check_tables(tables, largest_vector=_LARGEST)
        weights = dense_weights(stored(self.model), self.tables).items()
        check_finite([Numbers(f"weight {name!r}", "numbers", weight) for name, weight in weights])

    def _candidate(self, epoch: int) -> Path:
        return self.out / CHECKPOINTS / f"candidate-{epoch:04d}"

    def _remove_candidates(self, *kept: int) -> None:
        for folder in (self.out / CHECKPOINTS).glob("candidate-*"):
            if folder not in map(self._candidate, kept):
                shutil.rmtree(folder)

    def _freeze(self, folder: Path) -> None:
        vocabularies = self.task.vocabularies
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        dist.barrier()
        self.kind.freeze(self.model, folder / "artifact", tables=list(vocabularies), vocabularies=vocabularies)
        weights = dense_weights(stored(self.model), self.tables)
        on_rank_0(lambda: _write_weights(folder / "model.safetensors", weights))

    def _count_codes(self, epoch: int, board: Board) -> dict[str, Any]:
        """How the epoch's artifact uses its codes, and how many differ from the epoch before; {} on other ranks."""
        if self.rank != 0:
            return {}
        before = self._candidate(epoch - 1) / "artifact"
        earlier = EmbeddingStore.open(before).tables if before.exists() else {}
        counted = {}
        for name, table in EmbeddingStore.open(self._candidate(epoch) / "artifact").tables.items():
            if table.manifest.has_codes:
                stats = code_stats(table, earlier.get(name))
                board.codes(name, table.manifest.layout, stats, epoch * self.num_steps)
                counted[name] = stats.as_dict()
        return counted

    def _leave(self, progress: Progress) -> dict[str, Any]:
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
        used = Used(self.device, self.task.batch_size, self.task.num_negatives)
        found = results(self.config, EmbeddingStore.open(self.out / ARTIFACT), progress, test, used)
        on_rank_0(lambda: write_json(self.out / METRICS, found))
        return found


def _write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """The whole file or none of it; save_file's own error names no path."""
    try:
        with naming(path):
            path.write_bytes(save(weights))
    except OSError:
        path.unlink(missing_ok=True)
        raise
