"""`python -m tests.benchmarks.training NAME ...`: each benchmark with options of its own, see NAME --help."""

import sys

from tests.benchmarks.command import run

BENCHMARKS = {
    "cost": "what DPQ adds to a training step and to memory, for each K and D, and a picture of it",
    "throughput": "examples a second of full and DPQ tables of millions of rows, on several ranks",
}

if __name__ == "__main__":
    sys.exit(run("tests.benchmarks.training", BENCHMARKS))
