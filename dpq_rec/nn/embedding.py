"""Ids to vectors of one table: the drop-ins for torch's modules. In: ids, as torch takes them. Out: vectors, or bags.

Their queries are a stock EmbeddingCollection too, so that DistributedModelParallel can shard them wherever they stand.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingConfig

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError, IdTypeError
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.tables import DPQTables, Looked
from dpq_rec.nn.tracing import leaf

Mode = Literal["sum", "mean", "max"]


class _OneTable(DPQTables):
    """What the two modules share: one table, which may have a padding row.

    Args:
        num_embeddings: V.
        embedding_dim: E.
        config: how the table is quantized.
        padding_idx: an id whose vector is zeros and that trains nothing; negative ones count from the end.
        name: of the table in the artifact, and (with _ for .) in TorchRec's plans; its path in the model if not given.
        device: of the parameters.

    Raises:
        ConfigError: a combination that makes no sense.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: DPQConfig,
        *,
        padding_idx: int | None = None,
        name: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ConfigError(f"padding_idx: got {padding_idx}, want {-num_embeddings} to {num_embeddings - 1}")
        key = (name or "table").replace(".", "_")  # a plan's names, and a module's, have no dots
        table = EmbeddingConfig(name=key, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        super().__init__([table], {key: config}, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.name: str | None = name
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings

    @property
    def only_quantizer(self) -> Quantizer:
        """Keys and values."""
        return self.quantizer(self.quantized_tables[0].name)

    def _vectors_of(self, ids_T: torch.Tensor) -> Looked:
        """Vectors of ids; the last one is zeros, for the padding, where there is such an id."""
        if ids_T.dtype not in (torch.int64, torch.int32):
            raise IdTypeError(f"ids: got {ids_T.dtype}, want torch.int64 or torch.int32")
        (key,) = self.quantizers
        rows_T = ids_T.long()
        if self.padding_idx is None:
            return self._look_up({key: rows_T})[key]
        kept_T = rows_T != self.padding_idx
        vectors_NE, at_kept = self._look_up({key: rows_T[kept_T]})[key]
        at_T = torch.full_like(rows_T, len(vectors_NE))
        at_T[kept_T] = at_kept
        return Looked(torch.cat([vectors_NE, vectors_NE.new_zeros(1, self.embedding_dim)]), at_T)

    def extra_repr(self) -> str:
        """As torch's."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class DPQEmbedding(_OneTable):
    """torch's nn.Embedding with a table that is trained to be frozen to a few bytes a row.

    >>> embedding = DPQEmbedding(50_000, 512, DPQConfig(num_subspaces=64), padding_idx=0)
    >>> vectors = embedding(ids)        # [..., E], as before

    It may be called several times in a forward, by encoder and decoder for example: the penalties of all calls count.
    An optimizer that is fused into backward makes an update for each call.
    Arguments: see `_OneTable`; training and sharding: see `DPQTables`.
    """

    @leaf
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [..., E] of ids [...] (int64 or int32).

        Raises:
            IndexError: an id outside the table.
            IdTypeError: ids that are no integers of 32 or 64 bits.
        """
        looked = self._vectors_of(ids.reshape(-1))
        return looked.vectors_NE.index_select(0, looked.at_T).view(*ids.shape, self.embedding_dim)


class DPQEmbeddingBag(_OneTable):
    """torch's nn.EmbeddingBag with a table that is trained to be frozen to a few bytes a row.

    Arguments: see `_OneTable`; training and sharding: see `DPQTables`.

    Args:
        mode: "sum", "mean" or "max".
        include_last_offset: offsets end with the number of ids.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: DPQConfig,
        *,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        name: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"mode: got {mode!r}, want one of {', '.join(get_args(Mode))}")
        super().__init__(num_embeddings, embedding_dim, config, padding_idx=padding_idx, name=name, device=device)
        self.mode, self.include_last_offset = mode, include_last_offset

    @leaf
    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bags [B, E].

        Args:
            ids: [B, N], bags of one length; or [T], and where each bag begins in
            offsets: [B], or [B + 1] where include_last_offset.
            per_sample_weights: of the ids' shape, mode "sum" only; they get gradients too.

        Raises:
            IndexError: an id outside the table.
            IdTypeError: ids that are no integers of 32 or 64 bits.
        """
        looked = self._vectors_of(ids.reshape(-1))
        return functional.embedding_bag(
            looked.at_T.view(ids.shape),
            looked.vectors_NE,
            offsets,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            per_sample_weights=per_sample_weights,
            padding_idx=None if self.padding_idx is None else len(looked.vectors_NE) - 1,
        )

    def extra_repr(self) -> str:
        """As torch's."""
        size, dim, *padding = super().extra_repr().split(", ")
        return ", ".join([size, dim, f"mode={self.mode!r}", *padding])
