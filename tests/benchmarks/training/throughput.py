"""Examples per second, peak memory and bytes of the same job with plain, DPQ-SX and DPQ-VQ tables.

    python -m tests.benchmarks.training throughput --out bench-run --num-users 1000000 --num-items 1000000

The three are trained in alternation, each round a fresh run of `torchrun -m training` on the same generated data, since
timings on one machine drift. A line of JSON for each run goes to the results file; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.benchmarks.machine import where_and_when
from tests.benchmarks.training import PACKAGES
from training.data.synthetic import SyntheticConfig, generate

EMBEDDINGS = ("full", "dpq-sx", "dpq-vq")


def main(flags: list[str]) -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.training throughput",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results.jsonl")
    parser.add_argument("--num-users", type=int, default=1_000_000, help="users")
    parser.add_argument("--num-items", type=int, default=1_000_000, help="items")
    parser.add_argument("--num-interactions", type=int, default=2_200_000, help="one epoch of so many is a run")
    parser.add_argument("--ranks", type=int, default=2, help="processes of torchrun")
    parser.add_argument("--batch-size", type=int, default=4096, help="examples a rank takes per step")
    parser.add_argument("--num-negatives", type=int, default=2048, help="negatives a rank draws per step")
    parser.add_argument("--num-codes", type=int, default=32, help="K")
    parser.add_argument("--num-subspaces", type=int, default=16, help="D")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    options = parser.parse_args(flags)
    data = options.out / "data"
    sizes = {name: getattr(options, name) for name in ("num_users", "num_items", "num_interactions")}
    generate(SyntheticConfig(**sizes, num_held_out_users=2000), data)
    results = []
    for number, embedding in tqdm([(n, e) for n in range(options.rounds) for e in EMBEDDINGS], unit="run"):
        results.append(run(options, data, embedding, number))
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    print(table(results))


def run(options: argparse.Namespace, data: Path, embedding: str, number: int) -> dict[str, Any]:
    """One epoch of one kind of table; what metrics.json says of it, and where it ran."""
    out = options.out / f"{embedding}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    command += ["-m", "training", "two-tower", "--data", str(data), "--out", str(out), "--embedding", embedding]
    for name in ("batch_size", "num_negatives", *(() if embedding == "full" else ("num_codes", "num_subspaces"))):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with (options.out / f"{embedding}-{number}.log").open("w") as log:
        subprocess.run([*command, "--epochs", "1"], check=True, stdout=log, stderr=subprocess.STDOUT)
    metrics = json.loads((out / "metrics.json").read_text())
    shutil.rmtree(out / "checkpoints")
    kept = (
        "embedding",
        "world_size",
        "examples_per_second",
        "peak_memory_bytes",
        "seconds",
        "total",
        "tables",
        "config",
    )
    return {
        **{name: metrics[name] for name in kept},
        **where_and_when(PACKAGES),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Medians, as Markdown."""
    lines = [
        "| tables | examples/s | of full | peak memory a rank | tables on disk | ratio | vocabularies |",
        "|---|---|---|---|---|---|---|",
    ]
    speed = {e: statistics.median(r["examples_per_second"] for r in results if r["embedding"] == e) for e in EMBEDDINGS}
    for embedding in EMBEDDINGS:
        of_it = [result for result in results if result["embedding"] == embedding]
        total = of_it[0]["total"]
        peak = statistics.median(result["peak_memory_bytes"] for result in of_it)
        lines.append(
            f"| {embedding} | {speed[embedding]:,.0f} | {speed[embedding] / speed['full']:.2f} | {peak / 1e6:,.0f} MB "
            f"| {total['artifact_bytes'] / 1e6:.1f} MB | {total['compression_ratio']:.1f} "
            f"| {total['vocabulary_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)
