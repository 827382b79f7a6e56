"""The tables of a model: find, check, warm up, start. In: a model, sharded or not. Out: TrainedTable by name.

In its warm-up a model hands out queries as vectors. Modules, shards and the state of fused optimizers stay as they are,
so that what is learned goes on in quantized training: `start` then places keys and values by the queries.

A collection's table has the name of its config; a module of one table has its own, or its path in the model, in which
wrappers (torch.compile, DistributedDataParallel, FSDP, checkpoint_wrapper, AveragedModel ...) do not count.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchrec.distributed.planner.types import ParameterConstraints

from dpq_rec.errors import ConfigError
from dpq_rec.nn.collectives import world_size
from dpq_rec.nn.finite import QUERY_DTYPES, Numbers, check_dtype, check_finite, frozen_inputs, largest_query
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.shards import (
    COLLECTIONS,
    check_cuts,
    configs_of,
    device_of,
    dtype_of,
    is_pooled,
    is_under_fsdp,
    rows_of,
    shards_of,
    weights_of,
)
from dpq_rec.nn.tables import DPQTables

STAYS_PLAIN = "dpq_stays_plain"  # set on a stock module that counts among the tables, though too small to be quantized
# What wrappers call the module inside: torch.compile, DistributedModelParallel, FSDP, checkpoint_wrapper. Others call
# it `module`, as users may call a part of theirs: there the wrapper is told by its type.
_WRAPPED = ("_orig_mod", "_dmp_wrapped_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_CUT_MULTIPLE = 4  # TorchRec cuts columns at multiples of it only


class TrainedTable(NamedTuple):
    """One table as it was found in a model.

    Attributes:
        num_embeddings: V.
        embedding_dim: E.
        features: the names under which the model looks it up.
        weight_VQ: queries, or the vectors of a plain table.
        quantizer: None for a plain table.
        padding_idx: the row that has no vector.
        pooled: whether the model hands out sums or means of its vectors, which begin at zero.
    """

    num_embeddings: int
    embedding_dim: int
    features: tuple[str, ...]
    weight_VQ: torch.Tensor | ShardedTensor
    quantizer: Quantizer | None = None
    padding_idx: int | None = None
    pooled: bool = True


def find_tables(model: nn.Module, names: Collection[str] | None = None) -> dict[str, TrainedTable]:
    """The named tables; without names, all but torch's own nn.Embedding and nn.EmbeddingBag that are not marked.

    Raises:
        ConfigError: there are none, or not those that were named; or two of a name.
    """
    tables: dict[str, TrainedTable] = {}
    others: dict[str, TrainedTable] = {}
    for path, module in modules_with_tables(model):
        is_other = _is_torchs(module) and not getattr(module, STAYS_PLAIN, False)
        for name, table in _tables_of(module, path).items():
            if name in tables or name in others:
                raise ConfigError(f"two tables of the model are named {name}; give each a name of its own")
            (others if is_other else tables)[name] = table
    if names is None:
        if not tables:
            raise ConfigError(
                "the model holds no DPQ module and no collection of TorchRec; "
                f"plain tables that can be named: {', '.join(others) or 'none'}"
            )
        return tables
    everything = tables | others
    if unknown := set(names) - set(everything):
        raise ConfigError(f"tables: got {', '.join(sorted(unknown))}; the model's tables: {', '.join(everything)}")
    return {name: table for name, table in everything.items() if name in names}


def quantized_tables(model: nn.Module, what: str) -> dict[str, TrainedTable]:
    """The tables of a model that have a quantizer: none where all are so small that they stay plain.

    Raises:
        ConfigError: no table was ever to be quantized, for `what` is asked of the model.
    """
    found = {name: table for name, table in find_tables(model).items() if table.quantizer is not None}
    if not found and not any(isinstance(m, DPQTables) or getattr(m, STAYS_PLAIN, False) for m in model.modules()):
        raise ConfigError(f"{what}: the model holds no DPQ module; replace_embeddings makes some")
    return found


def check_tables(
    tables: Mapping[str, TrainedTable], *, in_training: bool = False, largest_vector: float = math.inf
) -> None:
    """Refuse tables with numbers that are not finite, of any rank's shards; every rank calls it.

    Args:
        tables: by name.
        in_training: of queries alone, which training is to go on from: as `start` places keys and values by them.
        largest_vector: the largest number that vectors of plain tables may hold.

    Raises:
        ConfigError: naming table and row, on every rank; also weights of a dtype that is not trained or not frozen.
    """
    parts: list[Numbers] = []
    for name, table in tables.items():
        whose, quantizer, weight_VQ = f"table {name!r}", table.quantizer, table.weight_VQ
        what, largest = "vector", largest_vector
        if quantizer is None:
            check_dtype(whose, "vectors", dtype_of(weight_VQ), *QUERY_DTYPES, torch.float16)
        else:
            check_dtype(whose, "queries", dtype_of(weight_VQ))
            check_dtype(whose, "keys and values", quantizer.values_MKS.dtype, torch.float32)
            what, largest = "query", largest_query(quantizer, in_training=in_training)
            parts += [] if in_training else frozen_inputs(quantizer, whose)
        for shard in shards_of(weight_VQ):
            held = torch.empty(0, device=device_of(weight_VQ)) if shard.tensor is None else shard.tensor
            parts.append(Numbers(whose, what, held, shard.first_row, largest, table.padding_idx))
    check_finite(parts)


def modules_with_tables(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything that holds tables, each once; not what these are made of."""
    seen, module = set() if seen is None else seen, _unwrapped(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    inner = module
    if isinstance(module, (DPQTables, nn.Embedding, nn.EmbeddingBag, *COLLECTIONS)):
        yield path, module
        if not isinstance(module, DPQTables):
            return
        inner, path = module.plain, f"{path}.plain".removeprefix(".")
    for name, child in inner.named_children():
        yield from modules_with_tables(child, f"{path}.{name}".removeprefix("."), seen)


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        is_wrapper = isinstance(module, DistributedDataParallel | DataParallel | AveragedModel)
        name = "module" if is_wrapper else next((name for name in _WRAPPED if name in module._modules), None)
        if name is None:
            return module
        module = getattr(module, name)


def _is_torchs(module: nn.Module) -> TypeGuard[nn.Embedding | nn.EmbeddingBag]:
    """Whether it is torch's own; a DPQEmbedding is an nn.Embedding too."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and not isinstance(module, DPQTables)


def _tables_of(module: nn.Module, path: str) -> dict[str, TrainedTable]:
    if _is_torchs(module):
        shape, weight_VE = (module.num_embeddings, module.embedding_dim), module.weight.detach()
        table = TrainedTable(*shape, (), weight_VE, pooled=False)  # and its padding row is returned as it is
        if isinstance(module, nn.EmbeddingBag):
            table = table._replace(padding_idx=module.padding_idx, pooled=module.mode != "max")
        return {path or "table": table}
    dpq = module if isinstance(module, DPQTables) else None
    configs, weights = (dpq.quantized_tables, dpq.query_weights()) if dpq else (configs_of(module), weights_of(module))
    return {
        config.name if dpq is None else dpq.name_of(config.name, path): TrainedTable(
            config.num_embeddings,
            config.embedding_dim,
            tuple(config.feature_names),
            weights[config.name],
            None if dpq is None else dpq.quantizer(config.name),
            None if dpq is None or dpq.keeps_padding else dpq.padding_idx,
            pooled=is_pooled(module),
        )
        for config in configs
    }


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

    Every rank calls it. The rows of the sample depend on the seed alone, not on the sharding; in the end all ranks hold
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


def subspace_constraints(model: nn.Module, num_shards: int) -> dict[str, ParameterConstraints]:
    """What to ask of TorchRec's planner for column-wise shards of every DPQ table that hold whole subspaces.

    Args:
        model: not sharded yet.
        num_shards: shards of a table at most, such as the number of ranks.

    Raises:
        ConfigError: no cut into 2 to num_shards equal parts lies between subspaces and at a multiple of 4 columns; or
            two tables of a name that are to be cut differently.
    """
    columns_by_name: dict[str, int] = {}
    modules = [module for _, module in modules_with_tables(model) if isinstance(module, DPQTables)]
    for name, quantizer in ((name, module.quantizer(name)) for module in modules for name in module.quantizers):
        width, num_subspaces = quantizer.query_dim, quantizer.config.num_subspaces
        parts = [
            n
            for n in range(min(2, num_shards), num_shards + 1)
            if num_subspaces % n == 0 and (n == 1 or width % (n * _CUT_MULTIPLE) == 0)
        ]
        if not parts:
            raise ConfigError(
                f"table {name!r}: got {num_subspaces} subspaces in queries of {width} columns, want some that 2 to "
                f"{num_shards} shards can share in multiples of {_CUT_MULTIPLE} columns; shard it by rows instead"
            )
        columns = width // parts[-1]
        if columns_by_name.setdefault(name, columns) != columns:  # the planner goes by the name alone
            raise ConfigError(
                f"two tables are named {name!r}, to be cut every {columns_by_name[name]} and every {columns} columns; "
                "name each of them: DPQEmbedding(..., name=...)"
            )
    return {
        name: ParameterConstraints(sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=columns)
        for name, columns in columns_by_name.items()
    }
