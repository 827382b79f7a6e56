"""Lookups over gRPC, call by call and as a stream. In: flags. Out: ids a second for 64, 256 and 4,096 ids, and ratios.

The server with asyncio, which the product has, beside the one with threads. The client, which pays for a call as the
server does, sends and takes bytes alone, so that it is not what is measured.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from service.proto.dpq.v1 import embedding_pb2 as pb
from tests.benchmarks.record import append, line_of
from tests.benchmarks.rounds import POPULARITIES, Popularity
from tests.benchmarks.service.processes import Ports, running_server
from tests.benchmarks.service.setting import (
    TABLE,
    BenchConfig,
    draw_ids,
    make_artifact,
    make_ids,
    parse,
    use_second_core,
)
from tests.benchmarks.service.turns import Figures, report, summary, take_turns

PACKAGES = ("dpq-rec", "numpy", "grpcio", "protobuf", "uvloop")
SIZES = (64, 256, 4096)
_SERVICE = "/dpq.v1.EmbeddingService/"
_NUM_REQUESTS = 64  # that take turns
_STREAMS, _AHEAD = 2, 8  # streams at a time, and requests of each that are under way
_OPTIONS = [("grpc.max_receive_message_length", -1)]

Caller = Callable[[grpc.aio.Channel, list[bytes], float], Awaitable[int]]


async def call_by_call(channel: grpc.aio.Channel, requests: list[bytes], end: float) -> int:
    """Replies until a time, to calls eight of which are under way."""
    lookup = channel.unary_unary(f"{_SERVICE}Lookup")

    async def keep_calling(first: int) -> int:
        num_replies = 0
        while time.perf_counter() < end:
            await lookup(requests[(first + num_replies) % len(requests)])
            num_replies += 1
        return num_replies

    return sum(await asyncio.gather(*map(keep_calling, range(_AHEAD))))


async def as_streams(channel: grpc.aio.Channel, requests: list[bytes], end: float) -> int:
    """Replies until a time, of streams."""
    lookup = channel.stream_stream(f"{_SERVICE}StreamLookup")

    async def keep_streaming() -> int:
        stream, num_replies = lookup(), 0
        for request in requests[:_AHEAD]:
            await stream.write(request)
        while time.perf_counter() < end:
            await stream.read()
            num_replies += 1
            await stream.write(requests[num_replies % len(requests)])
        stream.cancel()
        return num_replies

    return sum(await asyncio.gather(*(keep_streaming() for _ in range(_STREAMS))))


def ask(port: int, caller: Caller, requests: list[bytes], config: BenchConfig) -> Figures:
    """Replies and ids a second."""
    num_ids = len(pb.LookupRequest.FromString(requests[0]).ids)

    async def run() -> int:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", _OPTIONS) as channel:
            return await caller(channel, requests, time.perf_counter() + config.seconds)

    num_replies = asyncio.run(run())
    return {"per_second": num_replies / config.seconds, "ids_per_second": num_replies * num_ids / config.seconds}


def measure(config: BenchConfig, popularity: Popularity, ports: Ports, ids_V: NDArray[np.int64]) -> dict[str, Any]:
    """Settings and figures of one kind of ids."""
    generator = np.random.default_rng()
    contenders: dict[str, Callable[[], Figures]] = {}
    baselines = {}
    for num_ids in SIZES:
        ids_NI = draw_ids(popularity, ids_V, _NUM_REQUESTS * num_ids, generator).reshape(-1, num_ids).tolist()
        requests = [pb.LookupRequest(table=TABLE, ids=ids_I).SerializeToString() for ids_I in ids_NI]
        for name, port, caller in (
            (f"asyncio, calls of {num_ids:,} ids", ports.grpc, call_by_call),
            (f"threads, calls of {num_ids:,} ids", ports.threaded, call_by_call),
            (f"asyncio, streams of {num_ids:,} ids", ports.grpc, as_streams),
            (f"threads, streams of {num_ids:,} ids", ports.threaded, as_streams),
        ):
            contenders[name] = functools.partial(ask, port, caller, requests, config)
            baselines[name] = f"asyncio, calls of {num_ids:,} ids"
    rounds = take_turns(contenders, config.num_rounds, f"{popularity} ids")
    return {"ids": popularity, "workers": 1, **vars(config), "contenders": summary(rounds, baselines)}


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    config, results = parse("grpc", __doc__.split("\n")[0], flags)
    ids_V = make_ids(config)
    use_second_core()
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        artifact = make_artifact(config, ids_V, Path(folder) / "artifact")
        with running_server(artifact) as (ports, _):
            for popularity in POPULARITIES:
                line = line_of("grpc", measure(config, popularity, ports, ids_V), PACKAGES)
                append(results, [line])
                print(report(line), end="\n\n")
