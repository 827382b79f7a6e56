"""One torchrun for each number of ranks, both at once, for all tests here, in however many processes they run."""

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 200
WORLD_SIZES = (1, 2)


@dataclass
class Run:
    """What a run left: `folder` with artifacts and weights, and `report`, see worker.py."""

    folder: Path
    report: dict


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Number of ranks -> Run. A rank that fails ends its run, and every test here shows what it said."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which the processes of pytest-xdist share
    failed = base / "ranks_failed.txt"
    with (base / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process runs them, another one waits for what they leave
        if not failed.exists():
            failed.write_text(_run(base))
    if failed.read_text():
        pytest.fail(failed.read_text(), pytrace=False)
    folders = {world_size: _folder(base, world_size) for world_size in WORLD_SIZES}
    return {size: Run(folder, json.loads((folder / "report.json").read_text())) for size, folder in folders.items()}


def _folder(base, world_size):
    return base / f"ranks{world_size}"


def _run(base):
    """Run all ranks; what those said that failed."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    started = {world_size: _start(world_size, _folder(base, world_size)) for world_size in WORLD_SIZES}
    try:
        for world_size, process in started.items():
            try:
                said, _ = process.communicate(timeout=deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                return f"{world_size} ranks: not done in {TIMEOUT_SECONDS} seconds"
            if process.returncode != 0:
                return f"{world_size} ranks:\n{_of_the_workers(said)}"
    finally:
        for process in started.values():
            process.terminate()  # torchrun takes its ranks with it
            process.wait()
    return ""


def _start(world_size, folder):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.Popen(
        [*command, "--module", "tests.distributed.worker", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _of_the_workers(said):
    """Without torchrun's own traceback, which says that a worker failed and not why."""
    return "\n".join(line for line in said.splitlines() if line.startswith("[rank")) or said
