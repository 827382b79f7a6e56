"""Lookups over HTTP beside Redis MGET of the fp32 vectors. In: flags. Out: requests a second, memory, ratios.

Redis holds each vector as its bytes under the row's number. redis-benchmark draws uniform keys of its own, new ones for
each request, as ours has; hot ones it cannot draw, so that both are asked for the same hot ids throughout. The Python
clients each have one connection: redis-py with hiredis, and `dpq_rec.client`; both end with an array of vectors.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.client import CodesClient
from dpq_rec.wire import CODES
from service.http_bodies import BINARY
from service.supervisor import bind
from tests.benchmarks.record import append, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity, draw_rows
from tests.benchmarks.service.http import LOOKUP, binary_of
from tests.benchmarks.service.processes import Measured, Requests, processor_seconds, run_wrk, running_server
from tests.benchmarks.service.setting import (
    TABLE,
    BenchConfig,
    cores,
    make_artifact,
    make_ids,
    need,
    parse,
    use_second_core,
)
from tests.benchmarks.service.turns import Figures, report, summary, take_turns

PACKAGES = ("dpq-rec", "numpy", "redis", "hiredis", "uvicorn", "uvloop", "httptools")
_NUM_BODIES = 512
_CHUNK_ROWS = 20_000
_CLIENT_SECONDS = 1.0
_SEED = 1
_RANDOM_KEY = "__rand_int__"  # redis-benchmark's word for 12 random digits


@contextlib.contextmanager
def running_redis(store: EmbeddingStore, ids_V: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Redis on the first core, with the vector of row r under the key r in 12 digits: its port and its process."""
    with bind("127.0.0.1", 0, shared=False) as free:
        port = free.getsockname()[1]
    command = [need("redis-server", "redis-server"), "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        ["taskset", "-c", str(cores()[0]), *command], stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir()
    )
    try:
        with redis.Redis(port=port) as filler:
            _wait_for(filler)
            for start in range(0, len(ids_V), _CHUNK_ROWS):
                vectors = store.lookup(TABLE, ids_V[start : start + _CHUNK_ROWS]).vectors
                filler.mset({_key(start + at): vector.tobytes() for at, vector in enumerate(vectors)})
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _wait_for(client: redis.Redis) -> None:
    end = time.monotonic() + 10
    while True:
        with contextlib.suppress(redis.ConnectionError):
            client.ping()
            return
        if time.monotonic() > end:
            raise ConfigError("redis-server: got no answer in 10 s")
        time.sleep(0.05)


def _key(row: int) -> str:
    return f"{row:012d}"


def run_redis_benchmark(server: tuple[int, int], keys: list[str], config: BenchConfig) -> Figures:
    """What `Measured` has, of MGET; `server` is a port and a process."""
    port, pid = server
    num_requests = _REQUESTS_A_SECOND * config.seconds
    command = ["taskset", "-c", str(cores()[1]), need("redis-benchmark", "redis-tools"), "-p", str(port), "--csv"]
    command += ["-n", str(num_requests), "-c", str(config.num_connections), "-r", str(config.num_embeddings)]
    before = processor_seconds(pid)
    said = subprocess.run([*command, "MGET", *keys], capture_output=True, text=True, check=True).stdout
    taken = processor_seconds(pid) - before
    numbers = [float(number) for number in re.findall(r'"([\d.]+)"', said.splitlines()[-1])]
    per_second, _, _, p50, _, p99, _ = numbers[-7:]  # rps, then average, least, p50, p95, p99 and most, in milliseconds
    return Measured(per_second, p50 / 1e3, p99 / 1e3, taken / num_requests)._asdict()


_REQUESTS_A_SECOND = 5_000  # about as many as there will be


def clock(ask: Callable[[NDArray[np.int64]], object], draw: Callable[[], NDArray[np.int64]]) -> Figures:
    """Calls a second of one client, for a second."""
    taken, calls, end = 0.0, 0, time.perf_counter() + _CLIENT_SECONDS
    while time.perf_counter() < end:
        rows_N = draw()
        started = time.perf_counter()
        ask(rows_N)
        taken += time.perf_counter() - started
        calls += 1
    return {"per_second": calls / taken}


def measure(
    config: BenchConfig,
    popularity: Popularity,
    server: tuple[int, int],
    redis_server: tuple[int, int],
    ids_V: NDArray[np.int64],
) -> dict[str, Any]:
    """Settings and figures of one kind of ids; of each server the port and the process."""
    generator = np.random.default_rng(_SEED)
    draw = functools.partial(draw_rows, popularity, len(ids_V), config.num_ids, generator)
    rows_RN = np.stack([draw() for _ in range(_NUM_BODIES if popularity == "uniform" else 1)])
    keys = [_RANDOM_KEY] * config.num_ids if popularity == "uniform" else [_key(row) for row in rows_RN[0].tolist()]
    binary = binary_of(ids_V[rows_RN])

    def load(path: str, accept: str) -> Callable[[], Figures]:
        requests = Requests(path, {"Content-Type": BINARY, "Accept": accept}, binary)
        return lambda: run_wrk(*server, requests, config)._asdict()

    with redis.Redis(port=redis_server[0]) as theirs, CodesClient(f"http://127.0.0.1:{server[0]}") as ours:

        def mget(rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
            found: Any = theirs.mget([_key(row) for row in rows_N.tolist()])
            return np.frombuffer(b"".join(found), np.float32).reshape(len(rows_N), -1)

        contenders = {
            "redis": lambda: run_redis_benchmark(redis_server, keys, config),
            "float32": load(LOOKUP, BINARY),
            "float16": load(f"{LOOKUP}?dtype=float16", BINARY),
            "codes": load(LOOKUP, CODES),
            "redis-py": lambda: clock(mget, draw),
            "client of codes": lambda: clock(lambda rows_N: ours.lookup(TABLE, ids_V[rows_N]), draw),
        }
        baselines = dict.fromkeys(("float32", "float16", "codes"), "redis") | {"client of codes": "redis-py"}
        rounds = take_turns(contenders, config.num_rounds, f"{popularity} ids")
    return {"ids": popularity, "workers": 1, **vars(config), "contenders": summary(rounds, baselines)}


def memory(store: EmbeddingStore, redis_port: int) -> dict[str, Any]:
    """Bytes of the table and its ids as they are mapped, and what Redis says that it uses."""
    table = store.tables[TABLE]
    with redis.Redis(port=redis_port) as theirs:
        used: Any = theirs.info("memory")
    ours = table.artifact_bytes + table.vocabulary_bytes
    return {"bytes": ours, "redis_bytes": used["used_memory"], "times": used["used_memory"] / ours}


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    config, results = parse("redis", __doc__.split("\n")[0], flags)
    for program, package in (("redis-server", "redis-server"), ("redis-benchmark", "redis-tools"), ("wrk", "wrk")):
        need(program, package)
    use_second_core()
    ids_V = make_ids(config)
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        artifact = make_artifact(config, ids_V, Path(folder) / "artifact")
        store = EmbeddingStore.open(artifact)
        with running_redis(store, ids_V) as redis_server, running_server(artifact) as (ports, pid):
            for popularity in POPULARITIES:
                measured = measure(config, popularity, (ports.http, pid), redis_server, ids_V)
                line = line_of("redis", measured | {"memory": memory(store, redis_server[0])}, PACKAGES)
                append(results, [line])
                print(report(line))
                print(
                    "  memory: {bytes:,} bytes, Redis {redis_bytes:,}: {times:.1f} times\n".format_map(line["memory"])
                )
