"""`python -m service.bench NAME ...`: each benchmark with options of its own, see NAME --help."""

import sys

from dpq_rec.bench.command import run

BENCHMARKS = {
    "load": "latency against rate, over HTTP and gRPC",
    "start": "seconds to ready, and a worker's memory",
}

if __name__ == "__main__":
    sys.exit(run("service.bench", BENCHMARKS))
