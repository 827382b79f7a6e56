"""A trained model to an artifact. In: a model, sharded or not. Out: the folder of contract 3.

Every row of every shard is encoded in eval mode, in chunks, on the rank that owns it; rank 0 receives packed codes and
writes. No rank holds a whole table, and rows that training never saw get codes as all others do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from dpq_rec.artifact import TableContents, write_artifact
from dpq_rec.codes import pack_codes
from dpq_rec.errors import ConfigError, DpqRecError
from dpq_rec.nn.collectives import rank, world_size
from dpq_rec.nn.embedding import DPQEmbeddingBagCollection
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.vocabulary import IdentityVocabulary, Vocabulary

_CHUNK_ROWS = 1 << 16
_NO_MINUS_ZERO = 0.0  # added, makes zero of minus zero, as pooling does: a bag's sum begins at zero

Progress = Callable[[int], object]


class _TrainedTable(NamedTuple):
    """One table as it was found in the model."""

    num_embeddings: int
    embedding_dim: int
    features: tuple[str, ...]
    weight_VE: torch.Tensor | ShardedTensor  # queries, or the vectors of a plain table
    quantizer: Quantizer | None


class _Shard(NamedTuple):
    """Rows start to start + num_rows - 1; `rows` is None on ranks that do not own them."""

    owner: int
    start: int
    num_rows: int
    rows: torch.Tensor | None


@torch.no_grad()
def freeze(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    version: str | None = None,
    progress: Progress = lambda num_rows: None,
) -> Path:
    """Write the artifact of every DPQEmbeddingBagCollection in a model; plain EmbeddingBagCollections as dense tables.

    Every rank calls it; rank 0 writes. What is served from the artifact is bit for bit what the model returns in eval
    mode, whatever mode it is in now.

    Args:
        model: plain, or wrapped in DistributedModelParallel.
        path: the folder to make; it must not exist.
        vocabularies: table -> map from ids to rows; a table not named here is looked up by row (`identity`).
        version: see `dpq_rec.artifact.write_artifact`.
        progress: called on rank 0 with the rows of each chunk that was written.

    Raises:
        ConfigError: the model holds no tables, or tables that cannot be frozen.
        FileExistsError: the path exists.
    """
    tables = _find_tables(model)
    if unknown := set(vocabularies or {}) - set(tables):
        raise ConfigError(f"vocabularies: got {', '.join(sorted(unknown))}; the model's tables: {', '.join(tables)}")
    contents = {
        name: _contents(table, (vocabularies or {}).get(name) or IdentityVocabulary(table.num_embeddings), progress)
        for name, table in tables.items()
    }
    refusal = _write_on_rank_0(path, contents, version)
    if world_size() > 1:
        box = [refusal]
        dist.broadcast_object_list(box, 0)
        refusal = box[0]
        # Gloo's threads let go of a broadcast's tensors a moment after it, for which they need the interpreter: a rank
        # that ended right here would now and then abort. A barrier has no tensors, and gives them the time.
        dist.barrier()
    if refusal is not None:
        raise refusal
    return Path(path)


def _write_on_rank_0(
    path: str | os.PathLike[str], contents: Mapping[str, TableContents], version: str | None
) -> Exception | None:
    """Rank 0 writes what the others send; its error, for every rank to raise."""
    error = None
    if rank() == 0:
        try:
            write_artifact(path, contents, version=version)
        except (DpqRecError, OSError) as raised:
            error = raised
    if rank() != 0 or error is not None:
        for table in contents.values():
            for _ in table.chunks:
                pass  # running through them sends this rank's rows, or takes what the others still send
    return error


def _contents(table: _TrainedTable, vocabulary: Vocabulary, progress: Progress) -> TableContents:
    quantizer = table.quantizer
    layout = quantizer.config.layout if quantizer else None

    def to_stored(rows_NE: torch.Tensor) -> NDArray[Any]:
        if quantizer is None or layout is None:
            return (rows_NE.float() + _NO_MINUS_ZERO).cpu().numpy()
        return pack_codes(quantizer.encode(rows_NE).cpu().numpy(), layout)

    width, dtype = (table.embedding_dim, torch.float32) if layout is None else (layout.row_bytes, torch.uint8)
    return TableContents(
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        vocabulary=vocabulary,
        chunks=_chunks_to_rank_0(table.weight_VE, to_stored, width, dtype, progress),
        layout=layout,
        values=_stored_values(quantizer) if quantizer else None,
        features=table.features,
    )


def _stored_values(quantizer: Quantizer) -> NDArray[Any]:
    values_MKS = (quantizer.stored_values().detach().float() + _NO_MINUS_ZERO).cpu().numpy()
    return values_MKS.astype(quantizer.config.values_dtype)


def _chunks_to_rank_0(
    weight_VE: torch.Tensor | ShardedTensor,
    to_stored: Callable[[torch.Tensor], NDArray[Any]],
    width: int,
    dtype: torch.dtype,
    progress: Progress,
) -> Iterator[NDArray[Any]]:
    """All rows in order on rank 0; on another rank nothing, but running through it sends that rank's rows."""
    for shard in _row_shards(weight_VE):
        for start in range(0, shard.num_rows, _CHUNK_ROWS):
            num_rows = min(_CHUNK_ROWS, shard.num_rows - start)
            chunk = to_stored(shard.rows[start : start + num_rows]) if shard.rows is not None else None
            if shard.owner != 0 and world_size() > 1:
                chunk = _move_to_rank_0(chunk, shard.owner, (num_rows, width), dtype)
            if rank() == 0 and chunk is not None:
                yield chunk
                progress(num_rows)


def _move_to_rank_0(
    chunk: NDArray[Any] | None, owner: int, shape: tuple[int, int], dtype: torch.dtype
) -> NDArray[Any] | None:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if rank() == owner and chunk is not None:
        dist.send(torch.from_numpy(np.ascontiguousarray(chunk)).to(device), 0)
    elif rank() == 0:
        received = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(received, owner)
        return received.cpu().numpy()
    return None


def _row_shards(weight_VE: torch.Tensor | ShardedTensor) -> list[_Shard]:
    """The shards in row order, the same list on every rank."""
    if not isinstance(weight_VE, ShardedTensor):
        return [_Shard(0, 0, len(weight_VE), weight_VE if rank() == 0 else None)]
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in weight_VE.local_shards()}
    shards = []
    for metadata in sorted(weight_VE.metadata().shards_metadata, key=lambda m: m.shard_offsets):
        (start, column), (num_rows, num_columns) = metadata.shard_offsets, metadata.shard_sizes
        if column or num_columns != weight_VE.metadata().size[1]:
            raise ConfigError("freeze: got a table sharded by columns, want table-wise or row-wise shards")
        assert metadata.placement is not None, "a sharded table's shards have a place"
        shards.append(_Shard(int(metadata.placement.rank() or 0), start, num_rows, local.get((start, column))))
    return shards


def _find_tables(model: nn.Module) -> dict[str, _TrainedTable]:
    tables: dict[str, _TrainedTable] = {}
    for module in model.modules():
        found = {}
        if isinstance(module, DPQEmbeddingBagCollection):
            found = _dpq_tables(module)
        elif isinstance(module, EmbeddingBagCollection | ShardedEmbeddingBagCollection):
            found = _plain_tables(module)
        if twice := set(found) & set(tables):
            raise ConfigError(f"freeze: two tables are named {', '.join(sorted(twice))}")
        tables.update(found)
    if not tables:
        raise ConfigError("freeze: the model holds no DPQEmbeddingBagCollection and no EmbeddingBagCollection")
    return tables


def _dpq_tables(module: DPQEmbeddingBagCollection) -> dict[str, _TrainedTable]:
    state = {k: v for group in module.queries.values() for k, v in group.state_dict().items()}
    return {
        config.name: _TrainedTable(
            config.num_embeddings,
            config.embedding_dim,
            tuple(config.feature_names),
            state[f"embeddings.{config.name}.weight"],
            module.quantizer(config.name),
        )
        for config in module.embedding_bag_configs()
    }


def _plain_tables(module: EmbeddingBagCollection | ShardedEmbeddingBagCollection) -> dict[str, _TrainedTable]:
    configs = (
        module.embedding_bag_configs() if isinstance(module, EmbeddingBagCollection) else module._embedding_bag_configs
    )
    state = module.state_dict()
    return {
        config.name: _TrainedTable(
            config.num_embeddings,
            config.embedding_dim,
            tuple(config.feature_names),
            state[f"embedding_bags.{config.name}.weight"],
            None,
        )
        for config in configs
    }
