"""`python -m dpq_rec.bench NAME ...`: each benchmark with options of its own, see NAME --help."""

import sys

from dpq_rec.bench.command import run

BENCHMARKS = {
    "decode": "rows to vectors, beside torch.index_select from the fp32 table",
    "search": "the best ids for a query, beside a matrix product and faiss",
}

if __name__ == "__main__":
    sys.exit(run("dpq_rec.bench", BENCHMARKS))
