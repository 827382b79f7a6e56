"""What DPQ costs in training: step time and peak memory beside plain tables, for each K and D (DPQ paper, figure 4).

    python -m tests.benchmarks.training cost --out cost-run

Each K and D has a process in which plain, DPQ-SX and DPQ-VQ tables take steps in turns, since timings on one machine
drift: their ratio is the cost. Memory is the peak of processes that train one kind of table each. One line of JSON for
each K and D is added to results/cost.jsonl, and results/cost.png is drawn of this run's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tests.benchmarks.machine import where_and_when
from tests.benchmarks.training import PACKAGES
from training.config import RunConfig
from training.data.batches import Batch, train_batches
from training.data.synthetic import SyntheticConfig, generate
from training.distributed import choose_device, process_group
from training.models.two_tower import TwoTowerTask
from training.recipes import RECIPES, with_changes
from training.results import peak_memory_bytes
from training.source import Source

RESULTS = Path(__file__).parents[1] / "results"
NUM_CODES, NUM_SUBSPACES = (8, 32, 128, 256), (8, 16, 32)
METHODS = ("dpq-sx", "dpq-vq")
_WARM_UP_STEPS = 3
_NUM_NEGATIVES = 2048  # a step; at most as many as its examples


class Case(NamedTuple):
    """One kind of tables, and how it is trained."""

    embedding: str
    num_codes: int
    num_subspaces: int
    data: str
    batch_size: int
    num_steps: int

    @property
    def config(self) -> RunConfig:
        """The run that has them."""
        changes: dict[str, Any] = {"embedding": self.embedding, "batch-size": self.batch_size}
        changes["num-negatives"] = min(_NUM_NEGATIVES, self.batch_size)
        if self.embedding != "full":
            changes |= {"num-codes": self.num_codes, "num-subspaces": self.num_subspaces}
        return with_changes(RECIPES["two-tower"](self.data, "unused").as_dict(), changes)


def main(flags: list[str]) -> None:
    """Measure, add the lines, draw the picture."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.training cost",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the generated data")
    parser.add_argument("--num-users", type=int, default=100_000, help="users")
    parser.add_argument("--num-items", type=int, default=100_000, help="items")
    parser.add_argument("--batch-size", type=int, default=4096, help="examples of a step")
    parser.add_argument("--steps", type=int, default=15, help="steps of each kind of tables that are timed")
    options = parser.parse_args(flags)
    num_interactions = max(400_000, 2 * options.num_users, options.batch_size * (options.steps + 2 * _WARM_UP_STEPS))
    sizes = {"num_users": options.num_users, "num_items": options.num_items, "num_interactions": num_interactions}
    data = generate(SyntheticConfig(**sizes, num_held_out_users=1000), options.out / "data")
    results, grid = [], list(itertools.product(NUM_CODES, NUM_SUBSPACES))
    with tqdm(total=len(grid) * (1 + len(METHODS)) + 1, unit="process") as bar:
        full = Case("full", 0, 0, str(data), options.batch_size, options.steps)
        memory = {"full": _alone(peak_memory, full)}
        bar.update()
        for num_codes, num_subspaces in grid:
            cases = [full._replace(embedding=e, num_codes=num_codes, num_subspaces=num_subspaces) for e in METHODS]
            seconds = _alone(step_seconds, [full, *cases])
            bar.update()
            for case in cases:
                memory[case.embedding] = _alone(peak_memory, case)
                bar.update()
            line = {"num_codes": num_codes, "num_subspaces": num_subspaces, "seconds": seconds, "memory": dict(memory)}
            results.append({**line, **sizes, "batch_size": options.batch_size, **where_and_when(PACKAGES)})
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "cost.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in results)
    draw(results, RESULTS / "cost.png")
    print(table(results))


def _alone(work: Callable[[Any], Any], argument: Any) -> Any:
    """work(argument) in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_quieten) as pool:
        return pool.submit(work, argument).result()


def _quieten() -> None:
    """Without the deprecations inside torchrec, which the user cannot mend; with one thread, as a rank has."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def step_seconds(cases: Sequence[Case]) -> dict[str, float]:
    """Median seconds of a step of each kind of tables; they take turns."""
    device = choose_device(cases[0].config)
    with process_group(device):
        steps = {case.embedding: _stepper(case, device) for case in cases}
        seconds: dict[str, list[float]] = {embedding: [] for embedding in steps}
        for _ in range(_WARM_UP_STEPS + cases[0].num_steps):
            for embedding, step in steps.items():
                began = time.perf_counter()
                step()
                seconds[embedding].append(time.perf_counter() - began)
    return {embedding: statistics.median(taken[_WARM_UP_STEPS:]) for embedding, taken in seconds.items()}


def peak_memory(case: Case) -> int:
    """Bytes that a process needs to train one kind of tables, torch and all."""
    device = choose_device(case.config)
    with process_group(device):
        step = _stepper(case, device)
        for _ in range(_WARM_UP_STEPS + 2):
            step()
        return peak_memory_bytes(device)


def _stepper(case: Case, device: torch.device) -> Callable[[], None]:
    """What takes one training step after the other."""
    config = case.config
    task = TwoTowerTask(config, device)
    torch.manual_seed(0)
    model, optimizer = task.distribute(task.model())
    batches = iter(_batches(case, task.source))
    generator = torch.Generator().manual_seed(0)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model, next(batches), generator).backward()
        optimizer.step()

    return step


def _batches(case: Case, source: Source) -> list[Batch]:
    """Read before the clock runs."""
    every = train_batches(source.interactions, source.vocabularies, batch_size=case.batch_size)
    return list(itertools.islice(every, _WARM_UP_STEPS + case.num_steps))


def extra(results: Sequence[dict[str, Any]], measure: str, method: str) -> NDArray[np.float64]:
    """What a method takes more than plain tables, in percent, [K, D]."""
    found = {(r["num_codes"], r["num_subspaces"]): r[measure][method] / r[measure]["full"] - 1 for r in results}
    return np.array([[100 * found[k, d] for d in NUM_SUBSPACES] for k in NUM_CODES])


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The four heat maps of the paper's figure 4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8, 7.5), layout="constrained")
    for row, (measure, title) in zip(axes, (("seconds", "step time"), ("memory", "peak memory")), strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            percent_KD = extra(results, measure, method)
            axis.imshow(percent_KD, cmap="Blues", vmin=0, vmax=max(100.0, percent_KD.max()), aspect="auto")
            axis.set_title(f"{method}: extra {title}")
            axis.set_xticks(range(len(NUM_SUBSPACES)), NUM_SUBSPACES)
            axis.set_yticks(range(len(NUM_CODES)), NUM_CODES)
            axis.set_xlabel("D, subspaces")
            axis.set_ylabel("K, codes")
            for (k, d), percent in np.ndenumerate(percent_KD):
                dark = percent > 0.6 * max(100.0, percent_KD.max())
                axis.text(d, k, f"{percent:.0f} %", ha="center", va="center", color="white" if dark else "black")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The ratios to plain tables, as Markdown."""
    heading = ("K", "D", "full, ms", "dpq-sx, of full", "dpq-vq, of full", "memory dpq-sx", "memory dpq-vq")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for r in results:
        ratios = [r[m][e] / r[m]["full"] for m in ("seconds", "memory") for e in METHODS]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {r['num_codes']} | {r['num_subspaces']} | {1000 * r['seconds']['full']:.0f} | {cells} |")
    return "\n".join(lines)
