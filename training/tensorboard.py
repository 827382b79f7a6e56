"""TensorBoard output of a run. In: numbers and the step they belong to. Out: event files in DIR/tensorboard.

Rank 0 writes. A run that goes on after a checkpoint tells TensorBoard to forget what was written after that step: it
comes again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpq_rec import CodeLayout
from dpq_rec.errors import MissingDependencyError
from dpq_rec.files import naming

TENSORBOARD = "tensorboard"


def summary_writer() -> Any:
    """TensorBoard's class of writers.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard, which training writes for,", "train") from error
    return SummaryWriter


class TensorBoard:
    """The event files of a run.

    Args:
        folder: DIR/tensorboard.
        num_steps_done: steps before this process began.
        is_writer: whether this rank writes; on others all calls do nothing.
    """

    def __init__(self, folder: Path, num_steps_done: int, *, is_writer: bool) -> None:
        self._folder, self._writer = folder, None
        if is_writer:
            with naming(folder):
                self._writer = summary_writer()(str(folder), purge_step=num_steps_done + 1)

    @contextlib.contextmanager
    def closing(self) -> Iterator[TensorBoard]:
        """Close the files after the block; an error that ended it matters more than that they cannot be written."""
        try:
            yield self
        except BaseException:
            with contextlib.suppress(OSError):
                self._call("close")
            raise
        self._call("close")

    def numbers(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Show numbers as `group/name` after a step."""
        for name, value in values.items():
            self._call("add_scalar", f"{group}/{name}", value, step)

    def codes(self, table: str, layout: CodeLayout, stats: Mapping[str, Sequence[float] | None], step: int) -> None:
        """Show the `code_stats` of a table, one line for each level and subspace."""
        for name, values_M in stats.items():
            shown = "changed_codes" if name == "changed" else name
            for m, value in enumerate(values_M or ()):
                level, subspace = divmod(m, layout.num_subspaces)
                self._call("add_scalar", f"{shown}/{table}/level{level}_subspace{subspace:03d}", value, step)

    def flush(self) -> None:
        """Write what is still held."""
        self._call("flush")

    def _call(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            with naming(self._folder):
                getattr(self._writer, method)(*arguments)
