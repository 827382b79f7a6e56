"""`python -m tests.benchmarks.library NAME ...`: each benchmark with options of its own, see NAME --help."""

import sys

from tests.benchmarks.command import run

BENCHMARKS = {
    "decode": "rows to vectors, beside torch.index_select from the fp32 table, and FBGEMM",
    "lookup": "ids to vectors, all that a caller waits for, beside writing as many bytes",
    "shapes": "rows to vectors from codes of several shapes",
    "growth": "rows to vectors from tables of 10^5 to 10^8 rows, and a picture of it",
    "find": "ids to rows, beside numpy.searchsorted and a dict",
    "search": "the best ids for a query, beside a matrix product and faiss",
}

if __name__ == "__main__":
    sys.exit(run("tests.benchmarks.library", BENCHMARKS))
