"""The service as it is started by those who use it. In: an artifact. Out: a server in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_READY = re.compile(r"ready: http://127\.0\.0\.1:(\d+) grpc://127\.0\.0\.1:(\d+) ")
_STOP_SECONDS = 10


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
def running(artifact: Path, flags: Sequence[str] = (), *, core: int | None = None) -> Iterator[Running]:
    """A server of an artifact, on free ports, until the end of the block.

    Args:
        artifact: what it serves.
        flags: of `python -m service`, besides ports and artifact.
        core: that it runs on, if on one alone; the caller should then stay away from it.

    Raises:
        RuntimeError: it ended before it was ready.
    """
    command = [sys.executable, "-m", "service", "--artifact", str(artifact), "--http-port", "0", "--grpc-port", "0"]
    command += ["--drain-seconds", "0", "--log-level", "error", *flags]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if core is not None:
                os.sched_setaffinity(process.pid, {core})
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
