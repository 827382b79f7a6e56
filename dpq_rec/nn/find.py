"""The tables of a model. In: a model, sharded or not. Out: TrainedTable by name.

A collection's table has the name of its config; a module of one table has its own, or its path in the model, in which
wrappers (torch.compile, DistributedDataParallel, FSDP, checkpoint_wrapper, AveragedModel ...) do not count.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints

from dpq_rec.errors import ConfigError
from dpq_rec.nn.embedding import DPQEmbedding, DPQEmbeddingBag
from dpq_rec.nn.finite import QUERY_DTYPES, Numbers, check_dtype, check_finite, frozen_inputs, largest_query
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.shards import device_of, dtype_of, shards_of
from dpq_rec.nn.tables import DPQTables

_BAGS = (EmbeddingBagCollection, ShardedEmbeddingBagCollection)
_COLLECTIONS = (*_BAGS, EmbeddingCollection, ShardedEmbeddingCollection)
_WRAPPED = {  # wrapper -> its attribute that is the module
    OptimizedModule: "_orig_mod",
    DistributedModelParallel: "_dmp_wrapped_module",
    DistributedDataParallel: "module",
    DataParallel: "module",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    ActivationWrapper: "_checkpoint_wrapped_module",
    AveragedModel: "module",
}
_PLAIN = "dpq_stays_plain"
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
        is_torch = _is_torchs(module) and not getattr(module, _PLAIN, False)
        for name, table in _tables_of(module, path).items():
            if name in tables or name in others:
                raise ConfigError(f"two tables of the model are named {name}; give each a name of its own")
            (others if is_torch else tables)[name] = table
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
    if not found and not any(isinstance(m, DPQTables) or getattr(m, _PLAIN, False) for m in model.modules()):
        raise ConfigError(f"{what}: the model holds no DPQ module; replace_embeddings makes some")
    return found


def mark_plain(module: nn.Module) -> None:
    """Let a stock module count among the tables of its model, though it is too small to be quantized."""
    setattr(module, _PLAIN, True)


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
    if isinstance(module, (DPQTables, nn.Embedding, nn.EmbeddingBag, *_COLLECTIONS)):
        yield path, module
    inner = module.plain if isinstance(module, DPQTables) else module
    if _is_torchs(module) or isinstance(module, _COLLECTIONS):
        return
    for name, child in inner.named_children():
        child_path = ".".join(filter(None, (path, "plain" if inner is not module else "", name)))
        yield from modules_with_tables(child, child_path, seen)


def _unwrapped(module: nn.Module) -> nn.Module:
    while names := [name for kind, name in _WRAPPED.items() if isinstance(module, kind)]:
        module = getattr(module, names[0])
    return module


def _is_torchs(module: nn.Module) -> TypeGuard[nn.Embedding | nn.EmbeddingBag]:
    """Whether it is torch's own; a DPQEmbedding is an nn.Embedding too."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and not isinstance(module, DPQTables)


def _tables_of(module: nn.Module, path: str) -> dict[str, TrainedTable]:
    if _is_torchs(module):
        weight, pooled = module.weight.detach(), isinstance(module, nn.EmbeddingBag) and module.mode != "max"
        # An nn.Embedding returns its padding row as it is; a bag leaves it out.
        padding = module.padding_idx if isinstance(module, nn.EmbeddingBag) else None
        shape = module.num_embeddings, module.embedding_dim
        return {path or "table": TrainedTable(*shape, (), weight, padding_idx=padding, pooled=pooled)}
    if not isinstance(module, DPQTables):
        return _plain_tables(module)
    weights = module.query_weights()
    own_name = (module.name or path) if isinstance(module, DPQEmbedding | DPQEmbeddingBag) else ""
    return {
        own_name or table.name: TrainedTable(
            table.num_embeddings,
            table.embedding_dim,
            tuple(table.feature_names),
            weights[table.name],
            module.quantizer(table.name),
            None if module.keeps_padding else module.padding_idx,
        )
        for table in module.quantized_tables
    }


def _plain_tables(collection: Any) -> dict[str, TrainedTable]:
    pooled = isinstance(collection, _BAGS)
    if isinstance(collection, EmbeddingBagCollection | EmbeddingCollection):
        configs = collection.embedding_bag_configs() if pooled else collection.embedding_configs()
        modules: Any = collection.embedding_bags if pooled else collection.embeddings
        weights = {name: module.weight.detach() for name, module in modules.items()}
    else:
        configs = collection._embedding_bag_configs if pooled else collection._embedding_configs
        state, prefix = collection.state_dict(), "embedding_bags" if pooled else "embeddings"
        weights = {table.name: state[f"{prefix}.{table.name}.weight"] for table in configs}
    return {
        table.name: TrainedTable(
            table.num_embeddings, table.embedding_dim, tuple(table.feature_names), weights[table.name], pooled=pooled
        )
        for table in configs
    }


def subspace_constraints(model: nn.Module, num_shards: int) -> dict[str, ParameterConstraints]:
    """What to ask of TorchRec's planner for column-wise shards of every DPQ table that hold whole subspaces.

    Args:
        model: not sharded yet.
        num_shards: shards of a table at most, such as the number of ranks.

    Raises:
        ConfigError: no cut into 2 to num_shards equal parts lies between subspaces and at a multiple of 4 columns; or
            two tables of a name that are to be cut differently.
    """
    constraints: dict[str, ParameterConstraints] = {}
    for _, module in modules_with_tables(model):
        for name, quantizer in module.quantizers.items() if isinstance(module, DPQTables) else ():
            assert isinstance(quantizer, Quantizer), "quantizers holds nothing else"
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
            if name in constraints and constraints[name].min_partition != columns:  # the planner goes by the name alone
                raise ConfigError(
                    f"two tables are named {name!r}, to be cut every {constraints[name].min_partition} and every "
                    f"{columns} columns; name each of them: DPQEmbedding(..., name=...)"
                )
            constraints[name] = ParameterConstraints(
                sharding_types=["column_wise"], compute_kernels=["fused"], min_partition=columns
            )
    return constraints
