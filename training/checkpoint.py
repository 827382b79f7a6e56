"""A run's resumable state. In: model, optimizers, progress. Out: DIR/checkpoints/epoch-NNNN, and the way back.

torch.distributed.checkpoint writes every rank's shards; DIR is one folder that all ranks see. A checkpoint counts once
its folder has its final name, so a run that is killed while it writes goes on from the one before.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec import ConfigError
from dpq_rec.files import replace_file
from training.config import RunConfig
from training.distributed import on_rank_0
from training.options import SYNTHETIC
from training.tensorboard import TENSORBOARD

CONFIG, CHECKPOINTS, METRICS, ARTIFACT = "config.json", "checkpoints", "metrics.json", "artifact"
_LOCK = ".lock"
_MAY_CHANGE = {"run.out", "run.device"}  # settings that do not change what is trained


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands after an epoch.

    Attributes:
        data: digest of what is trained on.
        epoch: epochs that are done.
        best_epoch: the one with the best validation metric, 0 before the first; the last one where none is measured.
        best_metric: that metric; None before the first, and where none is measured.
        train_seconds: time spent on training steps alone.
        seconds: time spent on everything, before this process too.
        examples: examples trained on, over all ranks.
        history: one entry an epoch, as metrics.json shows it.
    """

    data: str = ""
    epoch: int = 0
    best_epoch: int = 0
    best_metric: float | None = None
    train_seconds: float = 0.0
    seconds: float = 0.0
    examples: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def update_best(self, metric: float | None, *, lower_is_better: bool) -> None:
        """Make the epoch that is done the best one if its metric is better, or if it has none."""
        best = self.best_metric
        if metric is None or best is None or (metric < best if lower_is_better else metric > best):
            self.best_epoch, self.best_metric = self.epoch, metric


def claim_folder(config: RunConfig, world_size: int) -> IO[str]:
    """Make DIR this run's, or find that it is already. Rank 0 alone calls it.

    A run that left no checkpoint, artifact or metrics has trained nothing worth keeping: other settings take its place.

    Returns:
        An open file; while it is open, no other process can claim DIR.

    Raises:
        ConfigError: DIR belongs to another configuration, to a run that is going on, or holds something else.
    """
    out = Path(config.run.out)
    if out.is_dir() and not (out / CONFIG).is_file() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty and holds no run; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    claim = (out / _LOCK).open("w")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise ConfigError(f"--out: a run is going on in {out}; wait for it, stop it, or name another folder") from None
    wanted = {**config.as_dict(), "world_size": world_size}
    found = json.loads((out / CONFIG).read_text()) if (out / CONFIG).is_file() else wanted
    here, there = dict(_settings(json.loads(json.dumps(wanted)))), dict(_settings(found))
    # What is off or empty may have been no option yet when the run began.
    names = [name for name in {**here, **there} if (here.get(name) or None) != (there.get(name) or None)]
    differing = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names if name not in _MAY_CHANGE
    ]
    has_trained = find_checkpoints(out / CHECKPOINTS) or (out / METRICS).exists() or (out / ARTIFACT).exists()
    if differing and has_trained:
        claim.close()
        raise ConfigError(f"--out: {out} belongs to another run ({'; '.join(differing)}); name another folder")
    if differing:
        for name in (SYNTHETIC, TENSORBOARD):
            shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / CONFIG, wanted)
    return claim


def _settings(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting under the name that says where it stands: data.num_users."""
    for name, value in content.items():
        if isinstance(value, dict) and name != "per_table":  # in it, off is something else than not there
            yield from _settings(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def finished_results(out: Path) -> dict[str, Any] | None:
    """What metrics.json of a finished run holds, on every rank; None where the run is not finished."""
    path = out / METRICS
    found: dict[str, Any] | None = on_rank_0(lambda: json.loads(path.read_text()) if path.exists() else None)
    return found


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"epoch-\d{4,}", p.name))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The whole file or none of it."""
    replace_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


class _Writer(dcp.FileSystemWriter):
    """Tells why a file could not be written: torch.save's own error hides that the disk is full."""

    def write_data(self, *arguments: Any) -> Any:
        """See `StorageWriter.write_data`."""
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: DIR/checkpoints.
        model: wrapped in DistributedModelParallel.
        optimizer: of all its parameters.
        data: digest of what is trained on.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: KeyedOptimizer, data: str) -> None:
        self.folder, self.model, self.optimizer, self.data = folder, model, optimizer, data

    def save(self, progress: Progress) -> None:
        """Write the state after an epoch; every rank calls it. On an error the checkpoint before is left as it was.

        Raises:
            ConfigError: the disk is full, or cannot be written to.
        """
        aside, final = self.folder / ".writing", self.folder / f"epoch-{progress.epoch:04d}"
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        try:
            dcp.save(self._state(), storage_writer=_Writer(aside))
            on_rank_0(lambda: write_json(aside / "progress.json", dataclasses.asdict(progress)))
            on_rank_0(lambda: self._put(aside, final))
        except (CheckpointException, ConfigError) as error:
            on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if not isinstance(first, OSError | ConfigError):
                raise
            before = find_checkpoints(self.folder)
            left = f"{before[-1].name} is there" if before else "there is none before it"
            fix = "make room, or mend what it says, and start the run again with the same --out"
            raise ConfigError(f"--out: {final} could not be written: {first}; {left}: {fix}") from error

    def _put(self, aside: Path, final: Path) -> None:
        """Make a checkpoint that is whole the last one."""
        aside.rename(final)
        for old in find_checkpoints(self.folder)[:-1]:
            shutil.rmtree(old)

    def load_latest(self) -> Progress:
        """Bring model and optimizer to the last checkpoint; a new run's progress where there is none.

        Raises:
            ConfigError: the checkpoint is of other data.
        """
        found = find_checkpoints(self.folder)
        if not found:
            return Progress(data=self.data)
        progress = Progress(**json.loads((found[-1] / "progress.json").read_text()))
        if progress.data != self.data:
            raise ConfigError(f"--data: the data have changed since epoch {progress.epoch}; name another --out")
        state = self._state()
        dcp.load(state, checkpoint_id=str(found[-1]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return progress

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def dense_weights(model: nn.Module, tables: str) -> dict[str, torch.Tensor]:
    """What the artifact does not hold: every weight and buffer whose name does not begin as those of the tables do."""
    state = model.state_dict()
    return {k: v.detach().cpu().contiguous() for k, v in state.items() if not k.startswith(tables)}
