"""Results of a run. In: configuration, artifact, progress, test metrics. Out: metrics.json's content."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dpq_rec import EmbeddingStore
from dpq_rec.table import Table, sizes
from training.checkpoint import Progress
from training.config import RunConfig
from training.task import Task


def results(
    config: RunConfig,
    store: EmbeddingStore,
    progress: Progress,
    test: Mapping[str, float],
    task: Task,
    device: torch.device,
) -> dict[str, Any]:
    """What metrics.json holds (contract 2); every rank calls it."""
    return {
        "recipe": config.recipe,
        "embedding": config.embedding.kind,
        "seed": config.run.seed,
        "world_size": dist.get_world_size(),
        "batch_size": task.batch_size,
        "num_negatives": task.num_negatives,
        "config": config.as_dict(),
        "metrics": dict(test),
        "tables": {name: {**_sizes([table]), "layout": _layout(table)} for name, table in store.tables.items()},
        "total": _sizes(store.tables.values()),
        "paper_ratios": {name: paper_ratio(table) for name, table in store.tables.items()},
        "examples_per_second": progress.examples / max(progress.train_seconds, 1e-9),
        "seconds": progress.seconds,
        "best_epoch": progress.best_epoch,
        "peak_memory_bytes": peak_memory_bytes(device),
        "history": progress.history,
    }


def paper_ratio(table: Table) -> float:
    """Bits of the full table over those of codes and values (DPQ paper, section 3, and appendix E.2 where shared).

    A row's bits are not filled up to whole bytes here, as they are on disk, and log2 K is not rounded up.
    """
    manifest = table.manifest
    if not manifest.has_codes:
        return 1.0
    num_codes = sum(tier.num_rows * tier.layout.codes_per_row for tier in table.tiers)
    code_bits = num_codes * math.log2(manifest.num_codes)
    full_bits = 32 * manifest.num_embeddings * manifest.embedding_dim
    return full_bits / (code_bits + 8 * table.tensors["values"].nbytes)


def _layout(table: Table) -> dict[str, Any] | None:
    """How a table's codes and values are laid out, which may be each table's own; None where it is plain."""
    if not table.manifest.has_codes:
        return None
    found = {**dataclasses.asdict(table.manifest.layout), "values_dtype": table.tensors["values"].dtype.name}
    return {**found, "tiers": table.manifest.tiers} if table.manifest.tiers else found


def _sizes(tables: Collection[Table]) -> dict[str, Any]:
    """As `sizes`, and the width that the tables share."""
    dims = {table.manifest.embedding_dim for table in tables}
    return {**sizes(tables), "embedding_dim": dims.pop() if len(dims) == 1 else None}


def peak_memory_bytes(device: torch.device) -> int:
    """The largest of any rank: resident memory, or what CUDA allocated."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    largest = torch.tensor([own])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
