"""`python -m training` as several test modules call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training.__main__ import main
from training.command_line import parse

ROOT = Path(__file__).resolve().parents[2]
HERE = {"data": ".", "out": "run"}  # what every recipe needs
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make minutes of seconds


def parsed(text):
    """The configuration of a recipe and its flags, on data that are there."""
    data = "." if text.startswith(("language", "text")) else "synthetic"
    return parse([*text.split(), "--data", data, "--out", "run"])


def command(*arguments, ranks=2, restarts=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, "--max-restarts", str(restarts), "-m", "training", *map(str, arguments)]


def run(*arguments, ranks=2):
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False
    )


def alone(*arguments):
    """One rank, in this process: its exit code."""
    return main([str(argument) for argument in arguments])


def plain(shown):
    """What tyro shows, in one line, without the boxes that it draws."""
    return " ".join(shown.translate(dict.fromkeys(map(ord, "│─╭╮╰╯"), " ")).split())


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())
