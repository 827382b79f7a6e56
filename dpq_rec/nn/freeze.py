"""A trained model to an artifact. In: a model, sharded or not. Out: the folder of contract 3.

Every row of every shard is encoded in eval mode, in chunks, on the rank that owns it; rank 0 receives packed codes and
writes. No rank holds a whole table, and rows that training never saw get codes as all others do. Of a column shard its
rank encodes the subspaces that lie in it, and rank 0 puts the codes of a row together.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dpq_rec.artifact import TableContents, write_artifact
from dpq_rec.codes import CodeLayout, Tier, pack_codes, unpack_codes
from dpq_rec.errors import ConfigError, DpqRecError
from dpq_rec.nn.collectives import rank, world_size
from dpq_rec.nn.find import TrainedTable, check_tables, find_tables
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.shards import Shard, check_cuts, shards_of, with_whole_weights
from dpq_rec.vocabulary import IdentityVocabulary, Int64Vocabulary, Vocabulary

_CHUNK_ROWS = 1 << 16
_NO_MINUS_ZERO = 0.0  # added, makes zero of minus zero, as pooling does: a bag's sum begins at zero

Progress = Callable[[int], object]


@torch.no_grad()
@with_whole_weights
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
    found = find_tables(model, tables)
    if unknown := set(vocabularies or {}) - set(found):
        raise ConfigError(f"vocabularies: got {', '.join(sorted(unknown))}; the model's tables: {', '.join(found)}")
    for name, table in found.items():
        if table.quantizer is not None:
            check_cuts(name, table.weight_VQ, table.quantizer.config)
            if table.quantizer.is_warming_up:
                got = "a table in its warm-up"
                raise ConfigError(f"table {name!r}: got {got}; call warm_up(model, enabled=False), and start, before")
    check_tables(found)
    contents = {
        name: _contents(name, table, (vocabularies or {}).get(name) or _vocabulary(table))
        for name, table in found.items()
    }
    refusal = None
    if rank() == 0:
        refusal = _write(path, found, {n: _reported(c, progress) for n, c in contents.items()}, version)
    if rank() != 0 or refusal is not None:
        for content in contents.values():
            for _ in content.chunks:
                pass  # running through them sends this rank's rows, or takes what the others still send
    if world_size() > 1:
        box = [refusal if isinstance(refusal, DpqRecError | OSError | None) else RuntimeError(f"rank 0: {refusal!r}")]
        dist.broadcast_object_list(box, 0)
        refusal = box[0] if rank() != 0 else refusal
        # Gloo's threads let go of a broadcast's tensors a moment after it, for which they need the interpreter: a rank
        # that ended right here would now and then abort. A barrier has no tensors, and gives them the time.
        dist.barrier()
    if refusal is not None:
        raise refusal
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
            _check_padding(name, table, contents[name].vocabulary)
        write_artifact(path, contents, version=version)
    except Exception as error:
        return error
    return None


def _reported(contents: TableContents, progress: Progress) -> TableContents:
    """The same, telling of each chunk once it was taken; an error of `progress` leaves the chunks themselves usable."""

    def chunks() -> Iterator[NDArray[Any]]:
        for chunk in contents.chunks:
            yield chunk
            progress(len(chunk))

    return dataclasses.replace(contents, chunks=chunks())


def _vocabulary(table: TrainedTable) -> Vocabulary:
    """Ids are rows, but for the padding row, which has none."""
    if table.padding_idx is None:
        return IdentityVocabulary(table.num_embeddings)
    rows_U = np.delete(np.arange(table.num_embeddings), table.padding_idx)
    return Int64Vocabulary(rows_U, rows_U.astype(np.uint32))


def _check_padding(name: str, table: TrainedTable, vocabulary: Vocabulary) -> None:
    if table.padding_idx is None:
        return
    ids_N = vocabulary.ids_of_rows(table.padding_idx, table.padding_idx + 1).ids_N
    if len(ids_N):
        first = next(iter(ids_N[:1]))
        raise ConfigError(
            f"vocabularies: got one for table {name!r} in which id {first} lives in row {table.padding_idx}, the "
            "padding row, for which the model returns zeros; leave that id out"
        )


def _contents(name: str, table: TrainedTable, vocabulary: Vocabulary) -> TableContents:
    quantizer, num_rows = table.quantizer, table.num_embeddings
    tiers = () if quantizer is None else quantizer.config.tiers_of(num_rows)
    stored: dict[int, _Stored] = {0: _StoredVectors(table)}
    if quantizer is not None:
        stored = {tier.first_row: _StoredCodes(quantizer, tier) for tier in tiers if tier.num_rows}
    return TableContents(
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        vocabulary=vocabulary,
        chunks=_chunks_to_rank_0(shards_of(table.weight_VQ), stored),
        layout=quantizer.config.layout if quantizer else None,
        values=_stored_values(name, quantizer) if quantizer else None,
        features=table.features,
        tiers=tiers if len(tiers) > 1 else (),
    )


def _stored_values(name: str, quantizer: Quantizer) -> NDArray[Any]:
    values_MKS = (quantizer.stored_values().detach().float() + _NO_MINUS_ZERO).cpu().numpy()
    if not np.isfinite(values_MKS).all():
        dtype = quantizer.config.values_dtype
        raise ConfigError(
            f"table {name!r}: got values that are no finite numbers in {dtype}; did the training diverge?"
        )
    return values_MKS.astype(quantizer.config.values_dtype)


class _Stored(Protocol):
    """How the rows of a table are stored, and parts of them sent."""

    dtype: torch.dtype

    def width(self, shard: Shard) -> int:
        """Of the shard's part of a row."""

    def part(self, shard: Shard, rows_NQ: torch.Tensor, first_row: int) -> NDArray[Any]:
        """The shard's part of some rows, of the table's from the first on."""

    def whole(self, shards: list[Shard], parts: list[NDArray[Any]]) -> NDArray[Any]:
        """Rows from their parts, in the order of columns."""


class _StoredVectors:
    """Rows of a dense table, as they are."""

    dtype = torch.float32

    def __init__(self, table: TrainedTable) -> None:
        self.pooled = table.pooled

    def width(self, shard: Shard) -> int:
        return shard.num_columns

    def part(self, shard: Shard, rows_NQ: torch.Tensor, first_row: int) -> NDArray[Any]:
        rows_NQ = rows_NQ.float()
        return (rows_NQ + _NO_MINUS_ZERO if self.pooled else rows_NQ).cpu().numpy()

    def whole(self, shards: list[Shard], parts: list[NDArray[Any]]) -> NDArray[Any]:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)


class _StoredCodes:
    """Packed codes of a tier's rows; a column shard's are those of its subspaces, packed by themselves."""

    dtype = torch.uint8

    def __init__(self, quantizer: Quantizer, tier: Tier) -> None:
        self.quantizer, self.layout = quantizer, tier.layout
        self.key_width = quantizer.query_dim // quantizer.config.num_subspaces

    def _layout(self, shard: Shard) -> CodeLayout:
        return CodeLayout(
            num_subspaces=shard.num_columns // self.key_width,
            num_codes=self.layout.num_codes,
            num_levels=self.layout.num_levels,
        )

    def width(self, shard: Shard) -> int:
        return self._layout(shard).row_bytes

    def part(self, shard: Shard, rows_NQ: torch.Tensor, first_row: int) -> NDArray[Any]:
        rows_N = torch.arange(first_row, first_row + len(rows_NQ), device=rows_NQ.device)
        codes_NM = self.quantizer.encode(rows_NQ, shard.first_column // self.key_width, rows_N)
        layout = self._layout(shard)
        return pack_codes(codes_NM[:, : layout.codes_per_row].cpu().numpy(), layout)

    def whole(self, shards: list[Shard], parts: list[NDArray[Any]]) -> NDArray[Any]:
        if len(parts) == 1:
            return parts[0]
        by_level = [
            unpack_codes(part_NW, self._layout(shard)).reshape(len(part_NW), self.layout.num_levels, -1)
            for shard, part_NW in zip(shards, parts, strict=True)
        ]
        return pack_codes(np.concatenate(by_level, 2).reshape(len(parts[0]), -1), self.layout)


def _chunks_to_rank_0(shards: list[Shard], stored_from: Mapping[int, _Stored]) -> Iterator[NDArray[Any]]:
    """All rows in order on rank 0; on another rank nothing, but running through it sends that rank's parts.

    Args:
        shards: of the table.
        stored_from: row -> how rows are stored from there to the next such row; no chunk holds rows of both sides.
    """
    for _, group in itertools.groupby(shards, lambda shard: shard.first_row):
        beside = list(group)  # the shards that hold the columns of the same rows
        first, end = beside[0].first_row, beside[0].first_row + beside[0].num_rows
        for (begin, stored), until in zip(stored_from.items(), [*list(stored_from)[1:], end], strict=False):
            last = min(until, end)
            for start in range(max(begin, first), last, _CHUNK_ROWS):
                rows = slice(start - first, min(start + _CHUNK_ROWS, last) - first)
                parts = [_part_to_rank_0(shard, rows, stored) for shard in beside]
                if rank() == 0:
                    yield stored.whole(beside, [part for part in parts if part is not None])


def _part_to_rank_0(shard: Shard, rows: slice, stored: _Stored) -> NDArray[Any] | None:
    part = None
    if shard.tensor is not None:
        rows_NQ = shard.tensor.detach()[rows].clone()  # FSDP could not free what numpy looks at
        part = stored.part(shard, rows_NQ, shard.first_row + rows.start)
    if shard.owner == 0 or world_size() == 1:
        return part
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if part is not None:
        dist.send(torch.from_numpy(np.ascontiguousarray(part)).to(device), 0)
    elif rank() == 0:
        received = torch.empty((rows.stop - rows.start, stored.width(shard)), dtype=stored.dtype, device=device)
        dist.recv(received, shard.owner)
        return received.cpu().numpy()
    return None
