"""Where the weights of TorchRec's collections lie, whole or in shards.

In: a collection, or a table's weight, plain or sharded. Out: its shards, the same on every rank. Column shards must
hold whole subspaces, so that a rank can encode what it holds: `find.subspace_constraints` asks the planner for that,
`check_cuts` refuses anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.collectives import rank, sum_over_ranks

_POOLED = (EmbeddingBagCollection, ShardedEmbeddingBagCollection)
COLLECTIONS = (*_POOLED, EmbeddingCollection, ShardedEmbeddingCollection)


class Shard(NamedTuple):
    """A block of rows and columns; `tensor` is None on ranks that do not own it."""

    owner: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    tensor: torch.Tensor | None


def is_pooled(collection: Any) -> bool:
    """Whether a collection of TorchRec, stock or sharded, hands out bags."""
    return isinstance(collection, _POOLED)


def configs_of(collection: Any) -> list[BaseEmbeddingConfig]:
    """The configs of a collection of TorchRec, stock or sharded."""
    return collection._embedding_bag_configs if is_pooled(collection) else collection._embedding_configs


def modules_of(collection: Any) -> Any:
    """Table -> the module that holds its weight, of a stock collection."""
    return collection.embedding_bags if is_pooled(collection) else collection.embeddings


def weights_of(collection: Any) -> dict[str, Any]:
    """Table -> its weight, a tensor or, sharded, a ShardedTensor, in the same memory."""
    if isinstance(collection, EmbeddingBagCollection | EmbeddingCollection):
        # Not from its state_dict, which fully_shard's hooks would shard again.
        return {name: module.weight.detach() for name, module in modules_of(collection).items()}
    state, prefix = collection.state_dict(), "embedding_bags" if is_pooled(collection) else "embeddings"
    return {table.name: state[f"{prefix}.{table.name}.weight"] for table in configs_of(collection)}


def is_under_fsdp(tables: nn.Module) -> bool:
    """Whether FSDP, by `fully_shard` or by its wrapper, holds weights of a module with tables."""
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in tables.modules())


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let every rank see whole the weights that FSDP cuts up; TorchRec's shards stay."""
    held = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for module in held:
            module.unshard()
        try:
            yield
        finally:
            for module in held:
                module.reshard()


def shards_of(weight_VQ: torch.Tensor | ShardedTensor) -> list[Shard]:
    """The shards in the order of rows, then columns. What every rank holds whole is rank 0's."""
    if not isinstance(weight_VQ, ShardedTensor):
        return [Shard(0, 0, len(weight_VQ), 0, weight_VQ.shape[1], weight_VQ if rank() == 0 else None)]
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in weight_VQ.local_shards()}
    shards = []
    for metadata in sorted(weight_VQ.metadata().shards_metadata, key=lambda m: m.shard_offsets):
        (row, column), (num_rows, num_columns) = metadata.shard_offsets, metadata.shard_sizes
        assert metadata.placement is not None, "a sharded table's shards have a place"
        owner = int(metadata.placement.rank() or 0)
        shards.append(Shard(owner, row, num_rows, column, num_columns, local.get((row, column))))
    return shards


def rows_of(weight_VQ: torch.Tensor | ShardedTensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Some rows [N, Q], put together from their shards, the same on every rank; every rank calls it."""
    shards = shards_of(weight_VQ)
    device = next((s.tensor.device for s in shards if s.tensor is not None), device_of(weight_VQ))
    found_NQ = torch.zeros(len(rows_N), _width(shards), dtype=torch.float32, device=device)
    for shard in shards:
        if shard.tensor is None:
            continue
        here_P = ((rows_N >= shard.first_row) & (rows_N < shard.first_row + shard.num_rows)).nonzero()[:, 0]
        columns = slice(shard.first_column, shard.first_column + shard.num_columns)
        taken = shard.tensor.detach()[(rows_N[here_P] - shard.first_row).to(shard.tensor.device)]
        found_NQ[here_P.to(device), columns] = taken.float()
    return sum_over_ranks(found_NQ)


def device_of(weight_VQ: torch.Tensor | ShardedTensor) -> torch.device:
    """The device of a weight of which this rank may hold nothing."""
    if not isinstance(weight_VQ, ShardedTensor):
        return weight_VQ.device
    placement = weight_VQ.metadata().shards_metadata[0].placement
    kind = torch.device("cpu") if placement is None else placement.device()
    return torch.device("cuda", torch.cuda.current_device()) if kind is not None and kind.type == "cuda" else kind


def dtype_of(weight_VQ: torch.Tensor | ShardedTensor) -> torch.dtype:
    """The dtype of a weight, of which this rank may hold nothing."""
    if isinstance(weight_VQ, ShardedTensor):  # whose own attribute warns that it is deprecated
        return weight_VQ.metadata().tensor_properties.dtype
    return weight_VQ.dtype


def _width(shards: list[Shard]) -> int:
    return max(shard.first_column + shard.num_columns for shard in shards)


def check_cuts(table: str, weight_VQ: torch.Tensor | ShardedTensor, config: DPQConfig) -> None:
    """Column shards begin and end between subspaces.

    Raises:
        ConfigError: one does not.
    """
    shards = shards_of(weight_VQ)
    key_width = _width(shards) // config.num_subspaces
    for shard in shards:
        if shard.first_column % key_width or shard.num_columns % key_width:
            got = f"a shard of columns {shard.first_column} to {shard.first_column + shard.num_columns - 1}"
            raise ConfigError(
                f"table {table!r}: got {got}, want cuts at multiples of {key_width}, between subspaces: "
                "give the planner the constraints of dpq_rec.nn.subspace_constraints"
            )
