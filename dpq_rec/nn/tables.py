"""`DPQTables`, base of all DPQ modules. In: rows of each table. Out: vectors of distinct rows, and positions.

The queries live in stock EmbeddingCollections, so that TorchRec's planner, sharders and fused optimizers find them.
Each distinct row of a batch is looked up once, and its query is quantized once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, EmbeddingConfig

from dpq_rec.config import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn.estimators import with_codebook_loss
from dpq_rec.nn.finite import check_dtype, check_finite, training_inputs
from dpq_rec.nn.quantizer import Quantizer
from dpq_rec.nn.shards import check_cuts, configs_of, modules_of, weights_of
from dpq_rec.nn.tracing import refuse_scripting

Vectors = tuple[torch.Tensor, torch.Tensor]  # of distinct rows [N, E], and the position among them of each row [T]


class _PlainCollections(nn.ModuleDict):
    """Stock collections of the plain tables; torch.jit.script, which a train pipeline tries, would lose the mapping."""

    __prepare_scriptable__ = refuse_scripting


class DPQTables(nn.Module):
    """Tables that are trained to be frozen to a few bytes a row; the modules that users build are subclasses.

    The codebook loss of DPQ-VQ needs no line in the training loop: the gradient of the vectors holds it. It cannot see
    what a loss is multiplied by before `backward`: set `codebook_loss_scale` to that factor, a GradScaler's scale or
    1 / n where n gradients are accumulated. It counts once for each forward that is differentiated, in the first of
    several backwards.

    Sharding and fused optimizers apply to `queries` (`DistributedModelParallel` finds them); keys and values are data
    parallel. Shards of a table on meta start from their rank's own generator: seed ranks apart, or shards begin alike.
    In training every rank must call forward equally often: batch statistics are summed over ranks. A forward inside a
    backward pass is one run again (gradient checkpointing): it moves no statistics. Keep data-parallel queries out of
    plans on CPU, where TorchRec's fail (FBGEMM #4586); stock plans are row-wise. Values that are running means
    (`ema_decay`) are no parameters to DistributedDataParallel, which refuses a model that has no others: wrap such a
    model with init_data_parallel=False, after `start` or the same seed on every rank.

    Queries may be in bfloat16. Keys, values, statistics and vectors are fp32 whatever dtype the model is moved to: cast
    vectors for layers of another dtype, or use autocast. A forward in training refuses numbers that are not finite, on
    every rank: a GradScaler does not hold back a step of an optimizer that is fused into backward.

    Args:
        tables: configs of the quantized tables, of any embedding_dim. Without an init_fn, queries start uniform in
            +-1/sqrt(E), on the scale of the keys.
        configs: table -> how it is quantized.
        device: of the parameters; on "meta" they take no memory until DistributedModelParallel, or `to_empty` and
            `reset_parameters`, make them.

    Raises:
        ConfigError: a combination that makes no sense.
    """

    padding_idx: int | None = None
    keeps_padding = False
    codebook_loss_scale = 1.0

    def __init__(
        self, tables: Sequence[BaseEmbeddingConfig], configs: Mapping[str, DPQConfig], device: torch.device | None
    ) -> None:
        nn.Module.__init__(self)  # by name: a subclass that is an nn.Embedding too must not become a plain one
        self.quantized_tables = list(tables)
        self.codebook_losses: dict[str, torch.Tensor] = {}  # of the last forward in training, by table, to be logged
        self.quantizers = _FP32Quantizers()
        self.plain = _PlainCollections()
        self._cuts_checked = False
        self._device = device or torch.device("cpu")
        by_width: dict[str, list[EmbeddingConfig]] = {}
        for table in self.quantized_tables:
            if table.data_type != DataType.FP32:
                raise ConfigError(f"table {table.name!r}: got data_type {table.data_type}, want FP32")
            if hasattr(self.quantizers, table.name) or not table.name or "." in table.name:
                raise ConfigError(f"table {table.name!r}: want a name without dots that torch does not use itself")
            rows = table.num_embeddings
            quantizer = Quantizer(table.embedding_dim, configs[table.name], device, num_embeddings=rows)
            self.quantizers[table.name] = quantizer
            by_width.setdefault(str(quantizer.query_dim), []).append(_query_config(table, quantizer.query_dim))
        # TorchRec's EmbeddingCollection holds tables of one dimension.
        self.queries = nn.ModuleDict({width: EmbeddingCollection(group, device) for width, group in by_width.items()})

    def quantizer(self, table: str) -> Quantizer:
        """Keys and values of a table."""
        quantizer = self.quantizers[table]
        assert isinstance(quantizer, Quantizer), "quantizers holds nothing else"
        return quantizer

    def query_weights(self) -> dict[str, Any]:
        """Table -> its queries [V, query_dim], as a tensor or, sharded, as a ShardedTensor; they share memory."""
        return {name: w for collection in self.queries.values() for name, w in weights_of(collection).items()}

    @property
    def device(self) -> torch.device:
        """Where the parameters were made."""
        return self._device

    @property
    def itself(self) -> DPQTables:
        """This module: the name of its node in an fx graph of it alone."""
        return self

    __prepare_scriptable__ = refuse_scripting

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As torch's, but for values that are running means: no gradient moves them."""
        super().requires_grad_(requires_grad)
        for name in self.quantizers:
            if self.quantizer(name).running_means is not None:
                self.quantizer(name).values_MKS.requires_grad = False
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as after construction: for a module built on meta, after `to_empty`."""
        for name in self.quantizers:
            self.quantizer(name).reset_parameters()
        collection: Any
        for collection in (*self.queries.values(), *self.plain.values()):
            if isinstance(collection, EmbeddingCollection | EmbeddingBagCollection):
                # Upstream's own reset does nothing where a collection was built on meta, wherever it is now.
                for table in configs_of(collection):
                    assert table.init_fn is not None, "TorchRec gives every table one"
                    table.init_fn(modules_of(collection)[table.name].weight)
            else:
                collection.reset_parameters()

    def _look_up(self, rows: Mapping[str, torch.Tensor], share: float = 1.0) -> dict[str, Vectors]:
        """Vectors of the rows [T] (int64) of each table; every table is named.

        An occurrence counts as `share` of one: as 1 / ranks where all ranks look up the same, which is to count once.

        Raises:
            IndexError: a row outside its table.
            ConfigError: queries of another dtype than fp32 or bfloat16; or, in training, numbers that are not finite:
                on every rank, naming the table and the row.
        """
        if not self._cuts_checked:
            for name, weight in self.query_weights().items():
                check_cuts(name, weight, self.quantizer(name).config)
            self._cuts_checked = True
        distinct = {table.name: _distinct(rows[table.name], table, share) for table in self.quantized_tables}
        self._check_dtypes()
        distinct_rows = {name: rows_N for name, (rows_N, _, _) in distinct.items()}
        queries = self._look_up_queries(distinct_rows)
        if self.training:  # all tables together, with one sum over ranks, before any statistic takes them in
            numbers = [
                training_inputs(self.quantizer(name), queries_NQ, distinct_rows[name], self._label(name))
                for name, queries_NQ in queries.items()
            ]
            check_finite(list(itertools.chain.from_iterable(numbers)))
        found: dict[str, Vectors] = {}
        for name, queries_NQ in queries.items():
            rows_N, counts_N, at_T = distinct[name]
            found[name] = self._quantize(name, queries_NQ, rows_N, counts_N), at_T
        return found

    def _check_dtypes(self) -> None:
        for collection in self.queries.values():
            if isinstance(collection, EmbeddingCollection):  # shards keep theirs
                weights = weights_of(collection)
                dtype = next(iter(weights.values())).dtype
                check_dtype(f"table {', '.join(map(repr, weights))}", "queries", dtype)
        for name in self.quantizers:
            check_dtype(self._label(name), "keys and values", self.quantizer(name).values_MKS.dtype, torch.float32)

    def name_of(self, table: str, path: str) -> str:
        """The table's name in the artifact, of a module that stands at a path in its model."""
        return table

    def _label(self, table: str) -> str:
        """How messages begin, by the name that the table has for its user."""
        return f"table {table!r}"

    def _look_up_queries(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Queries [N, Q] (fp32, as TorchRec hands them out) of each table's rows, from whichever rank holds them."""
        pending = []
        for collection in self.queries.values():
            names = [table.name for table in configs_of(collection)]
            rows_T = torch.cat([rows[name] for name in names])
            lengths = torch.tensor([len(rows[name]) for name in names], device=rows_T.device)
            keyed = KeyedJaggedTensor(keys=names, values=rows_T, lengths=lengths)
            pending.append((names, collection(keyed)))  # sharded collections answer later: ask all, then wait
        found = {name: jagged[name].values() for names, jagged in pending for name in names}
        if any(queries_NQ.is_meta for queries_NQ in found.values()):
            remedy = "DistributedModelParallel makes them, or module.to_empty(device=...) and module.reset_parameters()"
            raise ConfigError(f"forward: got queries on meta, which hold no numbers: {remedy}")
        return found

    def _quantize(
        self, name: str, queries_NQ: torch.Tensor, rows_N: torch.Tensor, counts_N: torch.Tensor
    ) -> torch.Tensor:
        """Vectors [N, E] of distinct rows, ascending, that occur counts_N times."""
        quantizer = self.quantizer(name)
        if quantizer.is_warming_up:
            vectors_NE = queries_NQ
            # Keys and values get gradients of zero, so that none is missing to DistributedDataParallel.
            none_of_each = [weight[:0].sum() for weight in quantizer.parameters() if weight.requires_grad]
            codebook_loss = sum(none_of_each, queries_NQ.new_zeros(()))
        else:
            counts_N = counts_N.to(queries_NQ.dtype)
            with torch.autocast(queries_NQ.device.type, enabled=False):  # half precision would choose other codes
                _, vectors_NE, codebook_loss = quantizer(queries_NQ, counts_N, rows_N, is_checked=True)
        if not self.training:
            return vectors_NE
        self.codebook_losses[name] = codebook_loss.detach()
        return with_codebook_loss(vectors_NE, codebook_loss, self.codebook_loss_scale)


class _FP32Quantizers(nn.ModuleDict):
    """Quantizers, whose keys, values and statistics stay in fp32 where the model around them takes another dtype."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _FP32Quantizers:
        refused: set[torch.dtype] = set()

        def in_fp32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype == torch.float32:
                return moved
            refused.add(moved.dtype)
            return tensor.to(moved.device, torch.float32)

        super()._apply(in_fp32, recurse)
        for dtype in refused:  # said here: the next layer would fail by a mismatch that names nothing
            stay = "keys, values and vectors of DPQ tables stay in torch.float32"
            warnings.warn(f"moved to {dtype}: {stay}; cast the vectors, or use autocast", stacklevel=3)
        return self


def _query_config(table: BaseEmbeddingConfig, query_dim: int) -> EmbeddingConfig:
    """The table's queries: as its config says, but for TorchRec's default init, which shrinks as the table grows."""
    init_fn = table.init_fn
    upstream = {"a": table.get_weight_init_min(), "b": table.get_weight_init_max()}
    limits = (table.weight_init_min, table.weight_init_max)
    if limits == (None, None) and isinstance(init_fn, partial) and init_fn.keywords == upstream:
        bound = table.embedding_dim**-0.5
        init_fn = partial(nn.init.uniform_, a=-bound, b=bound)
    return EmbeddingConfig(
        name=table.name,
        embedding_dim=query_dim,
        num_embeddings=table.num_embeddings,
        feature_names=[table.name],
        init_fn=init_fn,
    )


def _distinct(
    rows_T: torch.Tensor, table: BaseEmbeddingConfig, share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row once, ascending [N]; the occurrences of each [N]; the position among them of each occurrence [T]."""
    rows_N, at_T, counts_N = torch.unique(rows_T, return_inverse=True, return_counts=True)
    if len(rows_N) and not (int(rows_N[0]) >= 0 and int(rows_N[-1]) < table.num_embeddings):  # unique sorts
        got = f"ids from {int(rows_N[0])} to {int(rows_N[-1])}"
        raise IndexError(f"table {table.name!r}: got {got}, want 0 to {table.num_embeddings - 1}")
    return rows_N, counts_N if share == 1 else counts_N * share, at_T
