"""The trainer's own evaluation, for any artifact. In: a configuration and a folder. Out: metrics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from training.config import RunConfig
from training.parallel import choose_device, process_group
from training.tasks import TASKS, Task


class Judge:
    """A recipe's `Task` with its data open.

    Args:
        task: measures.
    """

    def __init__(self, task: Task) -> None:
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
            yield cls(TASKS[config.recipe](config, device))

    def measure(self, folder: Path, split: str) -> dict[str, float]:
        """See `Task.measure`."""
        return self.task.measure(folder, split)


def config_of(run: Path) -> RunConfig:
    """The configuration of a finished run."""
    return RunConfig.from_dict(json.loads((run / "metrics.json").read_text())["config"])
