"""`python -m tests.benchmarks.service NAME ...`: each benchmark with options of its own, see NAME --help."""

import sys

from tests.benchmarks.command import run

BENCHMARKS = {
    "http": "lookups over HTTP, beside constant bytes from the same server and FastAPI's own JSON",
    "grpc": "lookups over gRPC, call by call and as a stream, beside gRPC's server with threads",
    "redis": "lookups over HTTP, beside Redis MGET of the fp32 vectors: requests, memory, a Python client",
    "load": "latency against rate, over HTTP and gRPC",
    "start": "seconds to ready, and a worker's memory",
}

if __name__ == "__main__":
    sys.exit(run("tests.benchmarks.service", BENCHMARKS))
