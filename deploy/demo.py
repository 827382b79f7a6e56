"""The main job end to end, on data it generates: train on two ranks, freeze, verify, serve, look up, export.

`make demo` runs it. Every step is the command that a user would type, shown before it runs; what comes back is checked
against the artifact, and what was measured is printed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow.parquet as pq

from dpq_rec import EmbeddingStore
from service.proto.dpq.v1 import embedding_pb2, embedding_pb2_grpc

OUT = Path("demo-run")
BIN = Path(sys.executable).parent
# What torchrun takes where it is unset, after a warning of five lines; more gain nothing on tables this small.
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def headline(text: str) -> str:
    """A line before a step, bold on a terminal."""
    return f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}"


def step(title: str, *command: str | Path, **environment: str) -> float:
    """Run a command, with more in its environment, and return the seconds it took; its output is shown."""
    shown = [*(f"{name}={value}" for name, value in environment.items()), shlex.join(map(str, command))]
    print(f"{headline(title)}\n$ {' '.join(shown)}", flush=True)
    began = time.monotonic()
    subprocess.run([BIN / command[0], *command[1:]], check=True, env={**os.environ, **environment})
    return time.monotonic() - began


@contextlib.contextmanager
def serving(artifact: Path) -> Iterator[tuple[str, str]]:
    """A server with two workers; its HTTP and gRPC addresses."""
    command = ["python", "-m", "service", "--artifact", str(artifact), "--workers", "2"]
    command += ["--http-port", "0", "--grpc-port", "0", "--drain-seconds", "0.2", "--log-level", "error"]
    print(f"{headline('Serve')}\n$ {shlex.join(command)}", flush=True)
    server = subprocess.Popen([BIN / command[0], *command[1:]], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        print(ready.strip())
        found = re.match(r"ready: http://(\S+) grpc://(\S+)", ready)
        if not found:
            raise SystemExit("demo: the server did not start")
        yield found[1], found[2]
    finally:
        server.terminate()
        server.wait(timeout=30)


def look_up_http(address: str, ids: list[int]) -> dict[str, object]:
    """The JSON reply for some items."""
    url, body = f"http://{address}/v1/tables/item_id/lookup", json.dumps({"ids": ids})
    print(f"{headline('Look up over HTTP')}\n$ curl {url} -H 'Content-Type: application/json' -d '{body}'")
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)  # type: ignore[no-any-return]


def look_up_grpc(address: str, ids: list[int]) -> np.ndarray:
    """The vectors of some items."""
    print(f"{headline('Look up over gRPC')}\n  EmbeddingServiceStub(channel).Lookup(...)")
    with grpc.insecure_channel(address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        reply = stub.Lookup(embedding_pb2.LookupRequest(table="item_id", ids=ids), timeout=10)
    return np.frombuffer(reply.vectors, "<f4").reshape(-1, reply.dim)


def main() -> None:
    """Run the whole path."""
    shutil.rmtree(OUT, ignore_errors=True)
    run, artifact = OUT / "run", OUT / "run" / "artifact"
    sizes = ["--num-users", "30000", "--num-items", "10000", "--num-interactions", "500000"]
    options = ["--embedding", "dpq-sx", "--epochs", "3", "--data", "synthetic", *sizes, "--out", run]
    train = ["torchrun", "--nproc-per-node", "2", "-m", "training", "two-tower", *options]
    seconds = {"train": step("Train on two ranks, freeze, measure", *train, **THREADS)}
    step("Look at the artifact", "dpq-rec", "inspect", artifact)
    seconds["verify"] = step("Verify every byte", "dpq-rec", "verify", artifact)

    store = EmbeddingStore.open(artifact)
    known = store.tables["item_id"].vocabulary.ids_of_rows(0, 2)[0].tolist()
    ids = [*known, -1]
    want = store.lookup("item_id", ids).vectors
    with serving(artifact) as (http_address, grpc_address):
        reply = look_up_http(http_address, ids)
        assert np.array_equal(np.array(reply["vectors"], np.float32), want), "HTTP returned other vectors"
        first = np.array(reply["vectors"], np.float32)[0, :4]
        print(f"  {len(want)} vectors of {reply['dim']}, the first begins {first}; missing: {reply['missing']}")
        assert np.array_equal(look_up_grpc(grpc_address, ids), want), "gRPC returned other vectors"
        print("  the same vectors")
    seconds["export"] = step("Export", "dpq-rec", "export", artifact, "--table", "item_id", "--out", OUT / "export")
    exported = pq.read_table(OUT / "export")
    rows = exported.slice(0, 2)
    assert rows["id"].to_pylist() == known
    assert np.array_equal(np.array(rows["vector"].to_pylist(), np.float32), want[:2]), "the export has other vectors"

    report(json.loads((run / "metrics.json").read_text()), seconds, exported.num_rows)


def report(metrics: dict[str, Any], seconds: dict[str, float], num_exported: int) -> None:
    """What was measured on the way."""
    total, quality = metrics["total"], metrics["metrics"]
    full, small, vocabularies = (total[f"{part}_bytes"] / 1e6 for part in ("full", "artifact", "vocabulary"))
    throughput = f"{metrics['examples_per_second']:,.0f} examples/s on {metrics['world_size']} ranks"
    print(f"""{headline("Measured")}
  tables      {total["num_embeddings"]:,} rows of {total["embedding_dim"]}: {full:.1f} MB became {small:.2f} MB
              ({total["compression_ratio"]:.1f} times smaller), vocabularies of {vocabularies:.2f} MB beside them
  training    {throughput}, {seconds["train"]:.0f} s in all
  test        recall@20 {quality["recall@20"]:.4f}, ndcg@20 {quality["ndcg@20"]:.4f}
  export      {num_exported:,} vectors in {seconds["export"]:.1f} s
  Every way to get a vector gave the same bits. It all lies in {OUT}/.""")


if __name__ == "__main__":
    main()
