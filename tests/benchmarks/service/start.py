"""How soon a server is ready, and what memory a worker takes. In: sizes. Out: figures, lines of results.

A small artifact and a large one, in turn. Memory is what the kernel counts: a page that processes share counts once,
divided among them; anonymous is what no file stands behind.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tests.benchmarks.record import add_results_flag, append, head, line_of
from tests.benchmarks.service.product import Running, running
from tests.benchmarks.service.setting import TABLE, BenchConfig, make_artifact, make_ids

PACKAGES = ("dpq-rec", "numpy", "fastapi", "uvicorn", "grpcio")
_SMALL_ROWS = 1_000
_NUM_LOOKUPS = 200
_BINARY = "application/octet-stream"


def measure(config: BenchConfig, num_rounds: int) -> dict[str, Any]:
    """Medians over the rounds of seconds to ready, and of a worker's memory after some lookups, of both sizes."""
    seconds: dict[str, list[float]] = {"small": [], "large": []}
    memory: dict[str, list[dict[str, float]]] = {"small": [], "large": []}
    configs = {"small": replace(config, num_embeddings=_SMALL_ROWS), "large": config}
    ids_V = {name: make_ids(of_it) for name, of_it in configs.items()}
    with tempfile.TemporaryDirectory(prefix="dpq-rec-bench-") as folder:
        artifacts = {name: make_artifact(of_it, ids_V[name], Path(folder) / name) for name, of_it in configs.items()}
        for _ in tqdm(range(num_rounds), unit="round", leave=False):
            for name, artifact in artifacts.items():
                with running(artifact, ["--workers", "2"]) as server:
                    seconds[name].append(server.seconds_to_ready)
                    _look_up(server, ids_V[name])
                    memory[name] += [memory_of(pid) for pid in children_of(server.pid)]
    return {
        "num_embeddings": config.num_embeddings,
        "embedding_dim": config.embedding_dim,
        "num_subspaces": config.num_subspaces,
        "num_codes": config.num_codes,
        "small_num_embeddings": _SMALL_ROWS,
        "num_rounds": num_rounds,
        "seconds_to_ready": {name: statistics.median(of_it) for name, of_it in seconds.items()},
        "worker_megabytes": {
            name: {kind: statistics.median(found[kind] for found in of_it) for kind in of_it[0]}
            for name, of_it in memory.items()
        },
    }


def _look_up(server: Running, ids_V: NDArray[np.int64]) -> None:
    """Random lookups, so that workers hold what they hold in service."""
    url = f"http://127.0.0.1:{server.http_port}/v1/tables/{TABLE}/lookup"
    generator, headers = np.random.default_rng(0), {"Content-Type": _BINARY, "Accept": _BINARY}
    # Each over a connection of its own: the workers take them in turn.
    with httpx.Client(headers=headers, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        for _ in range(_NUM_LOOKUPS):
            client.post(url, content=generator.choice(ids_V, 256).astype("<i8").tobytes()).raise_for_status()


def children_of(pid: int) -> list[int]:
    """Processes that a process started (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory_of(pid: int) -> dict[str, float]:
    """Megabytes of a process, shared pages divided among those who share them: anonymous, and of files (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"anonymous": kilobytes["Pss_Anon"] / 1e3, "files": (kilobytes["Pss"] - kilobytes["Pss_Anon"]) / 1e3}


def report(line: dict[str, Any]) -> str:
    """The figures of a line, and what is needed to judge them."""
    sizes = {"small": line["small_num_embeddings"], "large": line["num_embeddings"]}
    texts = [head(line), f"2 workers, medians of {line['num_rounds']} rounds"]
    for name, rows in sizes.items():
        memory = line["worker_megabytes"][name]
        texts.append(
            f"{rows:>12,} rows: ready after {line['seconds_to_ready'][name]:.2f} s; a worker has "
            f"{memory['anonymous']:.0f} MB of its own, {memory['files']:.0f} MB of files"
        )
    return "\n".join(texts)


def main(flags: list[str]) -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.service start", description=__doc__.split("\n")[0])
    parser.add_argument("--num-embeddings", type=int, default=10_000_000, help="rows of the large table (default: 10M)")
    parser.add_argument("--num-rounds", type=int, default=5, help="servers of each size (default: 5)")
    add_results_flag(parser)
    options = parser.parse_args(flags)
    line = line_of("start", measure(BenchConfig(num_embeddings=options.num_embeddings), options.num_rounds), PACKAGES)
    append(options.results, [line])
    print(report(line))
