"""A server to measure. In: sizes. Out: an artifact of random codes, and a server of it in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec import CodeLayout, Int64Vocabulary, TableContents, pack_codes, write_artifact
from dpq_rec.errors import ConfigError

TABLE = "item_id"
_CHUNK_ROWS = 1 << 17
_READY = re.compile(r"ready: http://127\.0\.0\.1:(\d+) grpc://127\.0\.0\.1:(\d+) ")
_STOP_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The table that is served: V rows of E numbers, D groups of K codes; ids are integers that are no rows."""

    num_embeddings: int = 1_000_000
    embedding_dim: int = 64
    num_subspaces: int = 16
    num_codes: int = 256

    def __post_init__(self) -> None:
        if self.num_embeddings < 1:
            raise ConfigError(f"num_embeddings: got {self.num_embeddings}, want 1 or more")

    def ids(self) -> NDArray[np.int64]:
        """The id of each row [V] (int64): spread over 64 bits, in no order."""
        rows_V = np.arange(1, self.num_embeddings + 1, dtype=np.uint64)
        return (rows_V * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)  # an odd factor: no two are equal


def write_random_artifact(config: TableConfig, path: Path, seed: int = 0) -> Path:
    """An artifact with one table of random codes and values.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    generator = np.random.default_rng(seed)
    layout = CodeLayout(num_subspaces=config.num_subspaces, num_codes=config.num_codes)
    width = config.embedding_dim // config.num_subspaces

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, config.num_embeddings, _CHUNK_ROWS):
            shape = (min(_CHUNK_ROWS, config.num_embeddings - start), config.num_subspaces)
            yield pack_codes(generator.integers(0, config.num_codes, shape, np.uint16), layout)

    contents = TableContents(
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        vocabulary=Int64Vocabulary.from_ids(config.ids()),
        layout=layout,
        values=generator.standard_normal((config.num_subspaces, config.num_codes, width), np.float32),
        chunks=chunks(),
    )
    return write_artifact(path, {TABLE: contents})


class Running(NamedTuple):
    """A server that is ready.

    Attributes:
        http_port: of 127.0.0.1.
        grpc_port: likewise.
        pid: of the process that started the workers.
        seconds_to_ready: from its start to its ready line.
    """

    http_port: int
    grpc_port: int
    pid: int
    seconds_to_ready: float


@contextlib.contextmanager
def running(artifact: Path, flags: Sequence[str] = (), *, cpus: set[int] | None = None) -> Iterator[Running]:
    """A server of an artifact, on free ports, until the end of the block.

    Args:
        artifact: what it serves.
        flags: of `python -m service`, besides ports and artifact.
        cpus: that it runs on; the caller should then stay away from them.

    Raises:
        RuntimeError: it ended before it was ready.
    """
    command = [sys.executable, "-m", "service", "--artifact", str(artifact), "--http-port", "0", "--grpc-port", "0"]
    command += ["--drain-seconds", "0", "--log-level", "error", *flags]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if cpus is not None and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(process.pid, cpus)
            assert process.stdout is not None
            ready = _READY.match(process.stdout.readline())
            if ready is None:
                raise RuntimeError(f"the server ended before it was ready, with code {process.wait()}")
            yield Running(int(ready[1]), int(ready[2]), process.pid, time.perf_counter() - start)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            process.kill()


def two_cpus() -> tuple[set[int] | None, set[int] | None]:
    """CPUs for a server and for who asks it, apart from each other; None for both where there is one or no telling."""
    if not hasattr(os, "sched_getaffinity") or len(cpus := sorted(os.sched_getaffinity(0))) < 2:
        return None, None
    return {cpus[0]}, set(cpus[1:])
