"""One torchrun for each number of ranks, both at once, for all tests here."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 200


@dataclass
class Run:
    """What a run left: `folder` with artifacts and weights, and `report`, see worker.py."""

    folder: Path
    report: dict


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Number of ranks -> Run. A rank that fails ends its run, and every test here shows what it said."""
    folders = {world_size: tmp_path_factory.mktemp(f"ranks{world_size}") for world_size in (1, 2)}
    started = {world_size: _start(world_size, folder) for world_size, folder in folders.items()}
    try:
        for world_size, process in started.items():
            said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
            if process.returncode != 0:
                pytest.fail(f"{world_size} ranks:\n{_of_the_workers(said)}", pytrace=False)
    finally:
        for process in started.values():
            process.terminate()  # torchrun takes its ranks with it
            process.wait()
    reports = {world_size: folder / "report.json" for world_size, folder in folders.items()}
    return {size: Run(folders[size], json.loads(path.read_text())) for size, path in reports.items()}


def _start(world_size, folder):
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
