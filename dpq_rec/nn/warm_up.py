"""Before tables are quantized. In: a model, sharded or not. Out: its queries as vectors, then keys and values placed.

In its warm-up a model hands out queries as vectors. Modules, shards and the state of fused optimizers stay as they are,
so that what is learned goes on in quantized training: `start` then places keys and values by the queries.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dpq_rec.errors import ConfigError
from dpq_rec.nn.collectives import world_size
from dpq_rec.nn.find import TrainedTable, check_tables, modules_with_tables, quantized_tables
from dpq_rec.nn.shards import check_cuts, is_under_fsdp, rows_of


def warm_up(model: nn.Module, *, enabled: bool = True) -> None:
    """Let every DPQ table of a model hand out queries themselves, in training and in eval mode, or quantize again.

    In its warm-up a table trains as a plain one of its queries would. Keys and values get gradients of zero, so that
    DistributedDataParallel finds all its parameters. A model in its warm-up cannot be frozen. No state_dict holds the
    switch: whoever goes on from a checkpoint sets it again.

    Args:
        model: plain, or wrapped in DistributedModelParallel or DistributedDataParallel.
        enabled: False quantizes again.

    Raises:
        ConfigError: the model holds no DPQ module, or a table whose queries are not as wide as its vectors.
    """
    quantizers = []
    for name, table in quantized_tables(model, "warm_up").items():
        assert table.quantizer is not None, "the others were left out"
        quantizers.append(table.quantizer)
        if enabled and table.quantizer.query_dim != table.embedding_dim:
            got = f"queries of width {table.quantizer.query_dim} and vectors of {table.embedding_dim}"
            raise ConfigError(f"table {name!r}: got {got}, of which no one is the other; leave out key_dim")
    for quantizer in quantizers:
        quantizer.is_warming_up = enabled


@torch.no_grad()
def start(model: nn.Module, *, num_samples: int = 1 << 16, seed: int = 0) -> None:
    """Place the keys and values of every DPQ table by k-means of a sample of its queries (`Quantizer.start`).

    Every rank calls it. The rows of the sample depend on the seed alone, not on the sharding; afterwards all ranks hold
    the same keys, values and statistics, bit for bit.

    Args:
        model: plain, or wrapped in DistributedModelParallel.
        num_samples: rows a table, at most.
        seed: of sample and clustering.

    Raises:
        ConfigError: the model holds no DPQ module, or column shards that cut through a subspace; or a query that is not
            finite, or too large to be compared, sampled or not: no table has been started then.
        MissingDependencyError: faiss is not installed.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples: got {num_samples}, want 1 or more")
    if any(is_under_fsdp(module) for _, module in modules_with_tables(model)):
        raise ConfigError("start: got tables under FSDP, whose weights are in pieces; call start before it is wrapped")
    found = quantized_tables(model, "start")
    check_tables(found, in_training=True)
    for name, table in found.items():
        assert table.quantizer is not None, "the others were left out"
        check_cuts(name, table.weight_VQ, table.quantizer.config)
        rows_N = _sample(table, num_samples, seed)
        queries_NQ = rows_of(table.weight_VQ, rows_N)
        if len(queries_NQ):
            table.quantizer.start(queries_NQ, rows_N.to(queries_NQ.device), seed=seed)
        if world_size() > 1:
            for tensor in (*table.quantizer.parameters(), *table.quantizer.buffers()):
                dist.broadcast(tensor.data, 0)
    if world_size() > 1:
        dist.barrier()  # gives gloo's threads time to let go of the broadcasts: see `freeze`


def _sample(table: TrainedTable, num_samples: int, seed: int) -> torch.Tensor:
    """Distinct rows [N] (int64), ascending, never the padding row."""
    padding = table.padding_idx
    num_rows = table.num_embeddings - (padding is not None)
    rows_N = np.random.default_rng(seed).choice(num_rows, min(num_samples, num_rows), replace=False, shuffle=False)
    rows_N.sort()
    if padding is not None:
        rows_N += rows_N >= padding
    return torch.from_numpy(rows_N)
