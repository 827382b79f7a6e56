"""The trainer's own evaluation, for any artifact. In: a configuration and a folder. Out: metrics, in all or by user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist

from training.checkpoint import METRICS
from training.config import RunConfig
from training.distributed import choose_device, process_group
from training.models.interactions import InteractionTask
from training.recipes import load, with_changes
from training.task import Task
from training.trainer import TASKS

BY_USER = "by_user.npz"


class Judge:
    """A recipe's `Task` with its data open, on one rank.

    Args:
        task: measures.
    """

    def __init__(self, task: Task) -> None:
        assert dist.get_world_size() == 1, "of several ranks each would have a part of the users"
        self.task = task

    @classmethod
    @contextlib.contextmanager
    def of(cls, config: RunConfig) -> Iterator[Judge]:
        """A judge of runs of a configuration, while it is open.

        Raises:
            ConfigError: as the task, of data that cannot be read.
        """
        device = choose_device(config)
        with process_group(device):
            make_task: Callable[..., Task] = TASKS[config.recipe]
            yield cls(make_task(config, device))

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`."""
        return self.task.measure(folder, split)

    def save_by_user(self, folder: Path, split: str) -> None:
        """Leave BY_USER in a folder: what its metrics are made of, for `bootstrap`. Recipes over text leave nothing.

        Retrieval: `user_ids_U`, and an array [U] under each metric's name. Click-through: `user_rows_N`, `logits_N`
        and `labels_N`.
        """
        if isinstance(self.task, InteractionTask):
            np.savez_compressed(folder / BY_USER, allow_pickle=False, **self.task.by_user(folder, split))


def config_of(run: Path, data: Path | None = None) -> RunConfig:
    """The configuration of a finished run.

    Args:
        run: its folder.
        data: where its data are now; where they were, if not given.

    Raises:
        ConfigError: it cannot be read, or the data are not there.
    """
    return with_changes(load(str(run / METRICS)), {} if data is None else {"data": str(data)})
