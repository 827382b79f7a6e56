"""A trained model to an artifact. In: a model, sharded or not. Out: the artifact's folder (`dpq_rec.artifact`).

Every row of every shard is encoded in eval mode, in chunks, on the rank that owns it; rank 0 receives packed codes and
writes. No rank holds a whole table, and rows that training never saw get codes as all others do. Of a column shard its
rank encodes the subspaces that lie in it, and rank 0 puts the codes of a row together.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dpq_rec.artifact import TableContents, write_artifact
from dpq_rec.codes import CodeLayout, Tier, pack_codes, unpack_codes
from dpq_rec.errors import ConfigError, DpqRecError
from dpq_rec.nn.collectives import rank, world_size
from dpq_rec.nn.model import TrainedTable, check_tables, find_tables
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.shards import Shard, check_cuts, device_of, shards_of, whole_weights
from dpq_rec.vocabulary import IdentityVocabulary, Int64Vocabulary, Vocabulary

_CHUNK_ROWS = 1 << 16
_NO_MINUS_ZERO = 0.0  # added, makes zero of minus zero, as pooling does: a bag's sum begins at zero

Progress = Callable[[int], object]


@torch.no_grad()
def freeze(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tables: Collection[str] | None = None,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    version: str | None = None,
    progress: Progress = lambda num_rows: None,
) -> Path:
    """Write the artifact of a model's tables: those of DPQ modules as codes, others as dense tables.

    Every rank calls it; rank 0 writes. What is served from the artifact is bit for bit what the model returns in eval
    mode, whatever mode it is in now. Tables are named as `find_tables` says. A padding row has no id: zeros are served
    for it, as for any id that is missing.

    Args:
        model: plain, or wrapped (DistributedModelParallel, torch.compile ...); under FSDP ranks hold all meanwhile.
        path: the folder to make; it must not exist.
        tables: which ones; all tables of DPQ modules and of TorchRec's collections if not given. A plain nn.Embedding
            or nn.EmbeddingBag is frozen where it is named here, by its path in the model.
        vocabularies: table -> map from ids to rows; a table not named here is looked up by row (`identity`, or `int64`
            without the padding row).
        version: see `dpq_rec.artifact.write_artifact`.
        progress: called on rank 0 with the rows of each chunk that was written.

    Raises:
        ConfigError: the model holds no tables, or tables that cannot be frozen: in their warm-up, with numbers that are
            not finite, of a dtype that fp32 does not hold; a vocabulary that names a padding row.
        FileExistsError: the path exists.
    """
    with whole_weights(model):
        found, vocabularies = find_tables(model, tables), vocabularies or {}
        if unknown := set(vocabularies) - set(found):
            raise ConfigError(f"vocabularies: got {', '.join(sorted(unknown))}; the model's tables: {', '.join(found)}")
        for name, table in found.items():
            if table.quantizer is not None:
                check_cuts(name, table.weight_VQ, table.quantizer.config)
                if table.quantizer.is_warming_up:
                    wanted = "call warm_up(model, enabled=False), and start, before"
                    raise ConfigError(f"table {name!r}: got a table in its warm-up; {wanted}")
        check_tables(found)
        chunks = {name: _chunks_to_rank_0(table) for name, table in found.items()}
        contents = {
            name: _contents(name, table, vocabularies.get(name), _reported(chunks[name], progress))
            for name, table in found.items()
        }
        error = _write(path, found, contents, version) if rank() == 0 else None
        if rank() != 0 or error is not None:
            for _ in itertools.chain.from_iterable(chunks.values()):
                pass  # running through them sends this rank's rows, or takes what the others still send
        _raise_everywhere(error)
    return Path(path)


def _write(
    path: str | os.PathLike[str],
    found: Mapping[str, TrainedTable],
    contents: Mapping[str, TableContents],
    version: str | None,
) -> Exception | None:
    """Write what all ranks send; the error, for every rank to raise: until it is told, they would wait for this one."""
    try:
        for name, table in found.items():
            if (row := table.padding_idx) is None:
                continue
            for id_ in contents[name].vocabulary.ids_of_rows(row, row + 1)[0][:1]:
                raise ConfigError(
                    f"vocabularies: got one for table {name!r} in which id {id_} lives in row {row}, the padding row, "
                    "for which the model returns zeros; leave that id out"
                )
        write_artifact(path, contents, version=version)
    except Exception as error:
        return error
    return None


def _raise_everywhere(error: Exception | None) -> None:
    """Raise rank 0's error on every rank: what a user can mend as it is, anything else as a RuntimeError."""
    if world_size() > 1:
        box = [error if isinstance(error, DpqRecError | OSError | None) else RuntimeError(f"rank 0: {error!r}")]
        dist.broadcast_object_list(box, 0)
        error = box[0] if rank() != 0 else error
        # Gloo's threads let go of a broadcast's tensors a moment after it, for which they need the interpreter: a rank
        # that ended right here would now and then abort. A barrier has no tensors, and gives them the time.
        dist.barrier()
    if error is not None:
        raise error


def _reported(chunks: Iterator[NDArray[Any]], progress: Progress) -> Iterator[NDArray[Any]]:
    """The same, telling of each chunk once it was taken; an error of `progress` leaves the chunks themselves usable."""
    for chunk in chunks:
        yield chunk
        progress(len(chunk))


def _contents(
    name: str, table: TrainedTable, vocabulary: Vocabulary | None, chunks: Iterator[NDArray[Any]]
) -> TableContents:
    if vocabulary is None:
        vocabulary = IdentityVocabulary(table.num_embeddings)
        if table.padding_idx is not None:  # which has no id
            rows_U = np.delete(np.arange(table.num_embeddings), table.padding_idx)
            vocabulary = Int64Vocabulary(rows_U, rows_U.astype(np.uint32))
    quantizer, tiers = table.quantizer, _tiers(table)
    return TableContents(
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        vocabulary=vocabulary,
        chunks=chunks,
        layout=quantizer.config.layout if quantizer else None,
        values=_stored_values(name, quantizer) if quantizer else None,
        features=table.features,
        tiers=tiers if len(tiers) > 1 else (),
    )


def _tiers(table: TrainedTable) -> tuple[Tier, ...]:
    return table.quantizer.config.tiers_of(table.num_embeddings) if table.quantizer else ()


def _stored_values(name: str, quantizer: Quantizer) -> NDArray[Any]:
    values_MKS = (quantizer.stored_values().detach().float() + _NO_MINUS_ZERO).cpu().numpy()
    if not np.isfinite(values_MKS).all():
        dtype = quantizer.config.values_dtype
        raise ConfigError(
            f"table {name!r}: got values that are no finite numbers in {dtype}; did the training diverge?"
        )
    return values_MKS.astype(quantizer.config.values_dtype)


def _chunks_to_rank_0(table: TrainedTable) -> Iterator[NDArray[Any]]:
    """All rows in order on rank 0, no chunk of two tiers; elsewhere nothing, but it sends that rank's parts of rows."""
    tiers = [tier for tier in _tiers(table) if tier.num_rows]
    bounds = [tier.first_row for tier in tiers] or [0]
    layouts: list[CodeLayout | None] = [*(tier.layout for tier in tiers)] or [None]
    for _, group in itertools.groupby(shards_of(table.weight_VQ), lambda shard: shard.first_row):
        beside = list(group)  # the shards that hold the columns of the same rows
        first, end = beside[0].first_row, beside[0].first_row + beside[0].num_rows
        for begin, until, layout in zip(bounds, [*bounds[1:], end], layouts, strict=True):
            last = min(until, end)
            for start in range(max(begin, first), last, _CHUNK_ROWS):
                stop = min(start + _CHUNK_ROWS, last)
                parts = [_part_to_rank_0(table, shard, start, stop, layout) for shard in beside]
                if rank() == 0:
                    yield _joined(table, beside, [part for part in parts if part is not None], layout)


def _part_to_rank_0(
    table: TrainedTable, shard: Shard, start: int, stop: int, layout: CodeLayout | None
) -> NDArray[Any] | None:
    """A shard's part of rows of the table, as it is stored; None where this is not rank 0."""
    box: list[NDArray[Any] | None] = [None]
    if shard.tensor is not None:
        rows_NQ = shard.tensor.detach()[start - shard.first_row : stop - shard.first_row]
        rows_NQ = rows_NQ.clone()  # FSDP could not free what numpy looks at
        box[0] = _stored(table, shard, rows_NQ, start, layout)
    if shard.owner != 0 and world_size() > 1:
        if rank() == shard.owner:
            dist.send_object_list(box, 0, device=device_of(table.weight_VQ))
        elif rank() == 0:
            dist.recv_object_list(box, shard.owner, device=device_of(table.weight_VQ))
    return box[0]


def _stored(
    table: TrainedTable, shard: Shard, rows_NQ: torch.Tensor, first_row: int, layout: CodeLayout | None
) -> NDArray[Any]:
    """A shard's part of some rows as it is stored: vectors of a plain table, or packed codes."""
    if table.quantizer is None or layout is None:
        rows_NQ = rows_NQ.float()
        return (rows_NQ + _NO_MINUS_ZERO if table.pooled else rows_NQ).cpu().numpy()
    rows_N = torch.arange(first_row, first_row + len(rows_NQ), device=rows_NQ.device)
    first_subspace = shard.first_column // (table.quantizer.query_dim // layout.num_subspaces)
    codes_NM = table.quantizer.encode(rows_NQ, first_subspace, rows_N)
    own_layout = _layout_of(shard, table.quantizer, layout)
    return pack_codes(codes_NM[:, : own_layout.codes_per_row].cpu().numpy(), own_layout)


def _joined(
    table: TrainedTable, shards: list[Shard], parts: list[NDArray[Any]], layout: CodeLayout | None
) -> NDArray[Any]:
    """Rows of their parts in the order of columns. The codes of a column shard were packed by themselves."""
    if len(parts) == 1:
        return parts[0]
    if table.quantizer is None or layout is None:
        return np.concatenate(parts, 1)
    by_level = [
        unpack_codes(part_NW, _layout_of(shard, table.quantizer, layout)).reshape(len(part_NW), layout.num_levels, -1)
        for shard, part_NW in zip(shards, parts, strict=True)
    ]
    return pack_codes(np.concatenate(by_level, 2).reshape(len(parts[0]), -1), layout)


def _layout_of(shard: Shard, quantizer: Quantizer, layout: CodeLayout) -> CodeLayout:
    """Of the codes of the subspaces in a column shard."""
    return replace(layout, num_subspaces=layout.num_subspaces * shard.num_columns // quantizer.query_dim)
