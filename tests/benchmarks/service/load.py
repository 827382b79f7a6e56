"""Latency against rate. In: rates, kinds of ids. Out: percentiles over HTTP and gRPC, lines of results, a picture.

Requests come at a fixed rate, so that slow replies are counted (`open_loop`), to one worker on a core of its own. Ids
are drawn uniformly, by a power law, or half of them are one hot key.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dpq_rec.errors import ConfigError
from service.proto.dpq.v1 import embedding_pb2 as pb
from tests.benchmarks.record import add_results_flag, append, head, line_of
from tests.benchmarks.service.clients import grpc_client, http_client
from tests.benchmarks.service.open_loop import Latencies, at_rate
from tests.benchmarks.service.product import Running, running
from tests.benchmarks.service.setting import (
    TABLE,
    BenchConfig,
    cores,
    draw_ids,
    make_artifact,
    make_ids,
    use_second_core,
)

PROTOCOLS = ("http", "grpc")
KINDS = ("uniform", "power law", "hot key")
PACKAGES = ("dpq-rec", "numpy", "uvicorn", "grpcio")
_NUM_REQUESTS = 512  # different ones, asked in turn
_NUM_CONNECTIONS = 32
_WARM_UP_SECONDS = 0.5


def draw(kind: str, ids_V: NDArray[np.int64], num_ids: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Ids of one request [N] (int64)."""
    ids_N = draw_ids("hot" if kind == "power law" else "uniform", ids_V, num_ids, generator)
    if kind == "hot key":
        ids_N[generator.random(num_ids) < 0.5] = ids_V[0]
    return ids_N


def http_request(ids_N: NDArray[np.int64]) -> bytes:
    """A lookup, bytes in and bytes out, as it goes over the wire."""
    body = ids_N.astype("<i8").tobytes()
    binary = "application/octet-stream"
    head = (
        f"POST /v1/tables/{TABLE}/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Type: {binary}\r\nAccept: {binary}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def load(
    server: Running, protocol: str, batches: list[NDArray[np.int64]], per_second: float, seconds: float
) -> Latencies:
    """Ask a server for batches of ids, in turn, so many times a second."""
    async with contextlib.AsyncExitStack() as stack:
        if protocol == "http":
            requests = [http_request(ids_N) for ids_N in batches]
            client = http_client("127.0.0.1", server.http_port, requests, _NUM_CONNECTIONS)
            ask = await stack.enter_async_context(client)
        else:
            messages = [pb.LookupRequest(table=TABLE, ids=ids_N.tolist()) for ids_N in batches]
            ask = await stack.enter_async_context(grpc_client("127.0.0.1", server.grpc_port, messages))
        await at_rate(ask, per_second, _WARM_UP_SECONDS)
        return await at_rate(ask, per_second, seconds)


def measure(config: BenchConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line of figures for each protocol, kind of ids and rate."""
    cases = [(protocol, kind, rate) for rate in options.rates for protocol in options.protocols for kind in KINDS]
    generator, ids_V = np.random.default_rng(0), make_ids(config)
    batches = {kind: [draw(kind, ids_V, config.num_ids, generator) for _ in range(_NUM_REQUESTS)] for kind in KINDS}
    sizes = ("num_ids", "num_embeddings", "embedding_dim", "num_subspaces", "num_codes")
    settings = {name: getattr(config, name) for name in sizes}
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        artifact = make_artifact(config, ids_V, Path(folder) / "artifact")
        with running(artifact, ["--workers", "1"], core=cores()[0]) as server:
            use_second_core()
            for protocol, kind, rate in tqdm(cases, unit="load", leave=False):
                found = asyncio.run(load(server, protocol, batches[kind], rate, options.seconds))
                yield {"protocol": protocol, "ids": kind, "seconds": options.seconds, **settings, **found.summary()}


def report(lines: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    columns = ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "most_ms", "client_late_ms")
    rows = ["| protocol | ids | asked a second | refused | p50 | p90 | p99 | p99.9 | most | client late (ms) |"]
    rows.append("|---" * 10 + "|")
    for line in lines:
        names = f"| {line['protocol']} | {line['ids']} | {line['asked_per_second']:,.0f} | {line['num_refused']} "
        rows.append(names + "".join(f"| {line[column]:.2f} " for column in columns) + "|")
    return "\n".join([head(lines[0]), "", *rows])


def draw_plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Latency against rate, a panel for each protocol and kind of ids."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    protocols = [protocol for protocol in PROTOCOLS if any(line["protocol"] == protocol for line in lines)]
    figure, axes = plt.subplots(
        len(protocols), len(KINDS), figsize=(11, 3.2 * len(protocols)), sharey=True, squeeze=False, layout="constrained"
    )
    for row, protocol in enumerate(protocols):
        for column, kind in enumerate(KINDS):
            axis, here = axes[row][column], [s for s in lines if (s["protocol"], s["ids"]) == (protocol, kind)]
            for percentile in ("p50", "p99", "p99.9"):
                points = [(line["asked_per_second"], line[f"{percentile}_ms"]) for line in here]
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=percentile)
            axis.set(yscale="log", title=f"{protocol}, {kind} ids", xlabel="requests a second")
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel("latency, ms")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main(flags: list[str]) -> None:
    """Measure, print, draw, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.service load", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[200, 500, 1000, 1500, 2000], help="requests a second, of each load"
    )
    parser.add_argument("--seconds", type=float, default=5, help="of each load")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="default: both")
    parser.add_argument("--num-ids", type=int, default=256, help="in a request")
    parser.add_argument("--num-embeddings", type=int, default=1_000_000, help="rows of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency against rate")
    add_results_flag(parser)
    options = parser.parse_args(flags)
    if min(*options.rates, options.seconds) <= 0:
        raise ConfigError("--rates, --seconds: want more than 0")
    cores()
    config = BenchConfig(num_embeddings=options.num_embeddings, num_ids=options.num_ids)
    lines = [line_of("load", measured, PACKAGES) for measured in measure(config, options)]
    append(options.results, lines)
    print(report(lines))
    if options.plot is not None:
        draw_plot(lines, options.plot)
