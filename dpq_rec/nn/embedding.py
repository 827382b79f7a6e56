"""Ids to vectors of one table: the drop-ins for torch's modules. In: ids, as torch takes them. Out: vectors, or bags.

Their queries are a stock EmbeddingCollection too, so that DistributedModelParallel can shard them wherever they stand.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import functional
from torchrec import EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError, IdTypeError
from dpq_rec.nn.collectives import world_size
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.recompute import FirstRuns
from dpq_rec.nn.shards import is_under_fsdp
from dpq_rec.nn.tables import DPQTables, Vectors
from dpq_rec.nn.tracing import leaf, node_of, refuse_scripting, refused_elsewhere

Mode = Literal["sum", "mean", "max"]


class _DecodedWeight(nn.Module):
    """A module whose `weight` is decoded each time it is read, and cannot be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ConfigError(
                "weight: got another one, but that of a DPQ table is decoded from its queries. To share a table, use "
                "its module twice, or TiedLinear(embedding) as output layer; to begin with trained weights, "
                "replace_embeddings(..., from_weights=True)"
            )
        super().__setattr__(name, value)


class _OneTable(_DecodedWeight, DPQTables):
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
        self.embedding_dim = embedding_dim
        self.name: str | None = name
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings

    @property
    def only_quantizer(self) -> Quantizer:
        """Keys and values."""
        return self.quantizer(self.quantized_tables[0].name)

    @property
    def num_embeddings(self) -> int:
        """V; setting it is `resize`, which is how transformers' `resize_token_embeddings` ends."""
        return self.quantized_tables[0].num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, num_embeddings: int) -> None:
        self.resize(num_embeddings)

    @property
    def weight(self) -> torch.Tensor:
        """The vectors [V, E] of all rows, decoded: the bits of `forward`, and its gradients.

        For output layers: `F.linear(hidden, embedding.weight)`, or a `TiedLinear`. Each read decodes the whole table
        anew and, in training, is a forward of all rows: it moves statistics and running means, and has a codebook loss
        of its own. On several ranks each rank reads it equally often, and one read of all ranks counts as one. What is
        written into it is lost: queries are what trains.
        """
        values: Any = self.only_quantizer.values_MKS
        if isinstance(values, Proxy):  # torch.fx traces: a node that reads the weight anew at each run of its graph
            values.tracer.graph.erase_node(values.node)
            return node_of(self, values, None)
        if values.is_meta:
            return torch.empty(self.num_embeddings, self.embedding_dim, device=values.device)
        return self._decode_all()

    @refused_elsewhere
    def _decode_all(self) -> torch.Tensor:
        if is_fx_symbolic_tracing():
            got = "torch.fx, which would record the vectors that there are now"
            raise ConfigError(f"weight: got {got}; use a TiedLinear(embedding), which is a node of its graph")
        (table,), (collection,) = self.quantized_tables, self.queries.values()
        trained: list[Any] = list(self.queries.parameters())
        if isinstance(collection, EmbeddingCollection):  # not sharded by TorchRec
            own: Any = collection.embeddings[table.name].weight  # by name: FSDP's wrapper makes it no parameter
            trained = [own]
            is_freed = is_under_fsdp(self) and not own.untyped_storage().size()
            if isinstance(own, DTensor) or own.dim() != 2 or is_freed:  # of fully_shard, or of FSDP's wrapper
                raise ConfigError(
                    "weight: got a table that FSDP holds in pieces; read it in the forward of a module that "
                    "fully_shard takes as a whole"
                )
        ids_V = torch.arange(self.num_embeddings, device=self.only_quantizer.values_MKS.device)
        vectors_NE, at_V = self._vectors_of(ids_V, share=1 / world_size())
        weight_VE = vectors_NE.index_select(0, at_V)
        if torch.is_grad_enabled() and any(queries.requires_grad for queries in trained):
            weight_VE.requires_grad_()  # transformers learns from it whether the table is trained, in eval mode too
        return weight_VE

    @torch.no_grad()
    def resize(self, num_embeddings: int) -> None:
        """Cut off rows at the end, or add some; rows that stay keep their vectors.

        The queries of new rows are the mean of those there are. Tiers keep their rows: new ones are of the last tier,
        and the quantizer's config says their shares anew. Resize before optimizers are made, and before the model is
        distributed.

        Args:
            num_embeddings: the new V.

        Raises:
            ConfigError: no rows are left, or the table is sharded.
        """
        if num_embeddings < 1:
            raise ConfigError(f"num_embeddings: got {num_embeddings}, want 1 or more")
        (table,), (collection,) = self.quantized_tables, self.queries.values()
        if not isinstance(collection, EmbeddingCollection) or is_under_fsdp(self):
            raise ConfigError(f"table {table.name!r}: got a sharded one to resize; resize it before it is distributed")
        queries: Any = collection.embeddings[table.name]
        rows_NQ = queries.weight.data[:num_embeddings]
        has_vector_N = torch.ones(len(rows_NQ), dtype=torch.bool)
        if self.padding_idx is not None and not self.keeps_padding and len(rows_NQ) > 1:
            has_vector_N[self.padding_idx : self.padding_idx + 1] = False  # nothing trains that row
        new_NQ = rows_NQ[has_vector_N].mean(0, keepdim=True).expand(num_embeddings - len(rows_NQ), -1)
        resized_VQ = torch.cat([rows_NQ, new_NQ])
        # The same parameter, as transformers does it. Another dtype in between makes torch forget its former shape, to
        # which a graph that is still alive would hold it.
        queries.weight.data = resized_VQ.double()
        queries.weight.data, queries.weight.grad = resized_VQ, None
        self.only_quantizer.resize(num_embeddings)
        for config in (table, queries, *collection.embedding_configs()):
            config.num_embeddings = num_embeddings
        if self.padding_idx is not None and self.padding_idx >= num_embeddings:
            self.padding_idx = None

    def name_of(self, table: str, path: str) -> str:
        """Its own name, or else its path; see `DPQTables.name_of`."""
        return self.name or path or table

    def _label(self, table: str) -> str:
        return super()._label(self.name or table)

    def _vectors_of(self, ids_T: torch.Tensor, share: float = 1.0) -> Vectors:
        """Vectors of ids; the last one is zeros, for the padding, where there is such an id. See `_look_up`."""
        if ids_T.dtype not in (torch.int64, torch.int32):
            raise IdTypeError(f"ids: got {ids_T.dtype}, want torch.int64 or torch.int32")
        (key,) = self.quantizers
        rows_T = ids_T.long()
        if self.padding_idx is None or self.keeps_padding:
            return self._look_up({key: rows_T}, share)[key]
        kept_T = rows_T != self.padding_idx
        vectors_NE, at_kept = self._look_up({key: rows_T[kept_T]}, share)[key]
        at_T = torch.full_like(rows_T, len(vectors_NE))
        at_T[kept_T] = at_kept
        return torch.cat([vectors_NE, vectors_NE.new_zeros(1, self.embedding_dim)]), at_T

    def extra_repr(self) -> str:
        """As torch's."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class DPQEmbedding(_OneTable, nn.Embedding):  # type: ignore[override]
    """torch's nn.Embedding with a table that is trained to be frozen to a few bytes a row.

    >>> words = DPQEmbedding(50_000, 512, DPQConfig(num_subspaces=64), padding_idx=0)
    >>> vectors = words(torch.tensor([[7, 9, 0], [7, 0, 0]]))
    >>> vectors.shape, bool(vectors[0, 2].any())
    (torch.Size([2, 3, 512]), False)

    It may be called several times in a forward, by encoder and decoder for example: the codebook loss of each counts.
    An optimizer that is fused into backward makes an update for each call.
    Arguments: see `_OneTable`; training and sharding: see `DPQTables`.

    Attributes:
        keeps_padding: whether the padding id has a vector; see `keep_padding`.
    """

    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # torch's defaults, for who reads them

    def keep_padding(self) -> None:
        """Give the padding id a vector, not zeros: its row's, as any id has, which trains nothing all the same.

        So torch's nn.Embedding does where its padding row was set, in a trained model for example. A state_dict says
        so, and is loaded only where the padding is kept too.

        Raises:
            ConfigError: there is no padding.
        """
        if self.padding_idx is None:
            raise ConfigError("keep_padding: got no padding_idx; an id without one has a vector")
        self.keeps_padding, self._padding_runs = True, FirstRuns()
        self.register_buffer("padding_is_kept", torch.ones((), dtype=torch.bool, device=self.device))

    def _quantize(
        self, name: str, queries_NQ: torch.Tensor, rows_N: torch.Tensor, counts_N: torch.Tensor
    ) -> torch.Tensor:
        if self.padding_idx is None or not (self.training and self.keeps_padding):
            return super()._quantize(name, queries_NQ, rows_N, counts_N)
        learns_N = rows_N.ne(self.padding_idx)
        vectors_NE = super()._quantize(name, queries_NQ[learns_N], rows_N[learns_N], counts_N[learns_N])
        quantizer, fixed_PE = self.quantizer(name), queries_NQ[~learns_N].detach()  # one or none
        if len(fixed_PE) and not quantizer.is_warming_up:
            fixed_PE = quantizer.decode(quantizer.encode(fixed_PE, rows_N=rows_N[~learns_N])).detach()
            run = self._padding_runs.unchecked(rows_N, counts_N)
            fixed_PE = fixed_PE if run is None else run.fixed(fixed_PE)
        at = int((rows_N < self.padding_idx).sum())  # rows ascend
        return torch.cat([vectors_NE[:at], fixed_PE, vectors_NE[at:]])

    @leaf
    def forward(self, ids: torch.Tensor | None) -> torch.Tensor:
        """Vectors [..., E] of ids [...] (int64 or int32); of None, as an fx graph asks, the `weight`.

        Raises:
            IndexError: an id outside the table.
            IdTypeError: ids that are no integers of 32 or 64 bits.
        """
        if ids is None:
            return self.weight
        vectors_NE, at_T = self._vectors_of(ids.reshape(-1))
        return vectors_NE.index_select(0, at_T).view(*ids.shape, self.embedding_dim)


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
        ids: torch.Tensor | None,
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
        if ids is None:
            return self.weight
        vectors_NE, at_T = self._vectors_of(ids.reshape(-1))
        return functional.embedding_bag(
            at_T.view(ids.shape),
            vectors_NE,
            offsets,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            per_sample_weights=per_sample_weights,
            padding_idx=None if self.padding_idx is None else len(vectors_NE) - 1,
        )

    def extra_repr(self) -> str:
        """As torch's."""
        size, dim, *padding = super().extra_repr().split(", ")
        return ", ".join([size, dim, f"mode={self.mode!r}", *padding])


class TiedLinear(_DecodedWeight, nn.Linear):
    """torch's nn.Linear whose weight is an embedding's: an output layer that scores every row of a DPQ table.

    >>> words = DPQEmbedding(900, 64, DPQConfig(num_subspaces=8))
    >>> TiedLinear(words)(torch.zeros(4, 10, 64)).shape
    torch.Size([4, 10, 900])

    The table is trained, moved and saved where the embedding itself stands; see `DPQEmbedding.weight`.

    Args:
        embedding: whose rows are the outputs.
        bias: of the outputs, or None.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, embedding: DPQEmbedding | DPQEmbeddingBag, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embeddings = (embedding,)  # in a tuple torch does not see it: it is a part of the model elsewhere
        self.register_parameter("bias", bias)

    def forward(self, hidden: Any) -> Any:
        """Scores [..., V] of what comes before, [..., E]; to torch.fx one node, as torch's own layers are."""
        if isinstance(hidden, Proxy):
            return node_of(self, hidden, hidden)
        rows = self._embeddings[0].num_embeddings
        if self.bias is not None and len(self.bias) != rows:
            raise ConfigError(
                f"bias: got {len(self.bias)} numbers for a table that was resized to {rows} rows; resize it"
            )
        return super().forward(hidden)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table's, see `DPQEmbedding.weight`."""
        return self._embeddings[0].weight
