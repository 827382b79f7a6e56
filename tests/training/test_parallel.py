"""What ranks leave behind them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.command_line import ONE_THREAD, ROOT

TRAIN_AND_COUNT = """
import sys
from pathlib import Path
from pathlib import Path
from training.__main__ import main

assert main(sys.argv[1:]) == 0
names = [thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' names are read from Linux's /proc")
def test_no_thread_of_gloo_outlives_a_run(tmp_path):
    """One that lets go of a tensor while Python ends aborts the process, now and then: the last result is lost."""
    sizes = ["--num-users", "200", "--num-items", "50", "--num-interactions", "3000", "--embedding-dim", "8"]
    arguments = ["two-tower", "--data", "synthetic", *sizes, "--embedding", "full", "--epochs", "1", "--out", tmp_path]
    script = [sys.executable, "-c", TRAIN_AND_COUNT, *map(str, arguments)]
    ran = subprocess.run(script, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "[]"
