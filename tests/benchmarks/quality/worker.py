"""One case, in a process of its own. In: a case as JSON. Out: OUT/name/line.json, a line of results/quality.jsonl.

    python -m tests.benchmarks.quality.worker CASE.json --data DATA --out OUT

A case that was killed goes on from its last checkpoint. What lies under OUT stays on the machine: artifacts, logs, and
metrics by user.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpq_rec import ConfigError, DpqRecError
from tests.benchmarks.machine import where_and_when
from tests.benchmarks.quality import baselines, post_training
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.judge import Judge, config_of
from tests.benchmarks.quality.sizes import Shape, bytes_of
from tests.benchmarks.training import PACKAGES
from training.checkpoint import CHECKPOINTS, METRICS, write_json
from training.config import RunConfig
from training.recipes import RECIPES, with_changes
from training.trainer import train

LINE, RUN = "line.json", "run"
_BY_CONFIGURATION = ("full", "dpq-sx", "dpq-vq")
# What a line holds of a run's metrics.json: what tables and pictures are made of. The case says how it was made.
_MEASURED = (
    *("metrics", "validation", "bytes", "full_bytes", "best_epoch"),
    *("seconds", "examples_per_second", "peak_memory_bytes"),
)
_VERSIONS = (*PACKAGES, "faiss-cpu", "tensorly-torch")


def work(case: Case, data: Path, out: Path) -> dict[str, Any]:
    """Do a case, or go on with it.

    Args:
        case: what to do.
        data: folder of data sets.
        out: folder of cases.

    Returns:
        The line of results.

    Raises:
        ConfigError: settings that make no sense; or the full run to be compressed is not there.
    """
    folder = out / case.name
    folder.mkdir(parents=True, exist_ok=True)
    found = _train(case, data, folder) if not case.of else _compress(case, data, out)
    line = {
        **{name: found[name] for name in _MEASURED if name in found},
        "seed": case.seed,
        "dataset": case.dataset,
        "method": case.method,
        "stage": case.stage,
        "ratio": found["full_bytes"] / found["bytes"],
        "case": case.as_dict(),
        **where_and_when(_VERSIONS),
    }
    write_json(folder / LINE, line)
    return line


def _train(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    run = folder / RUN
    config = config_of_case(case, data, run)
    task = None
    if case.method not in _BY_CONFIGURATION:
        assert case.ratio is not None, "the plan gives one to every baseline that is trained"
        task = baselines.composed_task(case.recipe, case.method, case.settings, case.ratio)
    found = train(config, task)
    if case.stage == "final":
        with Judge.of(config) as judge:
            judge.save_by_user(run, "test")
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    num_bytes = {name: table["artifact_bytes"] for name, table in found["tables"].items()}
    if task is not None:
        num_bytes = _planned_bytes(case, found["tables"])
    best = found["history"][found["best_epoch"] - 1]
    validation = {name: best[name] for name in found["metrics"]}
    full_bytes = found["total"]["full_bytes"]
    return {**found, "bytes": sum(num_bytes.values()), "full_bytes": full_bytes, "validation": validation}


def config_of_case(case: Case, data: Path, run: Path) -> RunConfig:
    """The run of a case that is trained.

    Raises:
        ConfigError: flags that make no sense.
    """
    embedding = case.method if case.method in _BY_CONFIGURATION else "full"
    if case.flags.get("refit"):
        raise ConfigError(f"{case.name}: got --refit, which leaves no validation metrics to choose by; leave it out")
    changes = {"embedding": embedding, "epochs": case.epochs, "seed": case.seed, **case.flags}
    return with_changes(RECIPES[case.recipe](str(data / case.dataset), str(run)).as_dict(), changes)


def _planned_bytes(case: Case, tables: Mapping[str, Any]) -> dict[str, int]:
    """What the tables of a baseline take; the tests hold them to what it stores."""
    assert case.ratio is not None, "see _train"
    shapes: dict[str, Shape] = {name: (t["num_embeddings"], t["embedding_dim"]) for name, t in tables.items()}
    sizes = baselines.sizes_of(case.method, case.settings, case.ratio, shapes)
    return {name: bytes_of(shapes[name], size) for name, size in sizes.items()}


def _compress(case: Case, data: Path, out: Path) -> dict[str, Any]:
    full, folder = out / case.of / RUN, out / case.name / RUN
    if not (full / METRICS).exists():
        raise ConfigError(f"{case.name}: got no run in {full}; do {case.of} with this --out first, again if need be")
    compressed = post_training.compress(full, case.method, case.settings, case.ratio)
    post_training.leave(full, folder, compressed.tables)
    with Judge.of(config_of(full, data / case.dataset)) as judge:
        metrics = {split: judge.measure(folder, split) for split in ("validation", "test")}
        if case.stage != "trial":
            judge.save_by_user(folder, "test")
    found: dict[str, Any] = json.loads((full / METRICS).read_text())
    return {
        "metrics": metrics["test"],
        "validation": metrics["validation"],
        "seconds": compressed.seconds,
        "best_epoch": found["best_epoch"],
        "bytes": sum(stored.num_bytes for stored in compressed.tables.values()),
        "full_bytes": found["total"]["full_bytes"],
    }


def main() -> int:
    """Do the case of a file; 0, or 2 for settings or data that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("case", type=Path, help="file with the case as JSON")
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of cases")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torchrec and FBGEMM, which the user cannot mend
            line = work(Case.from_dict(json.loads(options.case.read_text())), options.data, options.out)
    except DpqRecError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"validation": line["validation"], "ratio": line["ratio"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
