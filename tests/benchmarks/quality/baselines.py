"""Tables that are trained small, in the place of plain or DPQ ones. In: a method, a budget. Out: a Task.

Data, loss, optimizers, evaluation and epochs are the trainer's own. The parts of a table are TorchRec's tables, with
the fused optimizer of plain tables and of queries; what else a method learns moves by the dense optimizer, as keys and
values do. At the end of an epoch every vector is put together from the numbers as they would lie on disk, in fp16.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from dpq_rec.nn.model import TrainedTable, find_tables
from dpq_rec.nn.shards import rows_of
from dpq_rec.vocabulary import Vocabulary
from tests.benchmarks.quality.compositions import Composition, Hashing, LowDim, QuotientRemainder, TensorTrain
from tests.benchmarks.quality.sizes import FLOAT_BYTES, Largest, Shape, Sized, fit_to_budget
from tests.benchmarks.quality.stored import Stored, plain, write_stored
from training.models.interactions import bag_configs
from training.task import Task
from training.trainer import TASKS

_META = torch.device("meta")
_WIDTH_MULTIPLE = 4  # FBGEMM's tables have such widths; columns beyond a part's own are never used nor stored
_MOST_RANKS = 1 << 12
_POOLING = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class Built(Sized, Protocol):
    """A size of a method, ready to become a table."""

    def build(self, num_embeddings: int, embedding_dim: int, device: torch.device) -> Composition:
        """The table's composition; parameters of its own are on the device."""


def _low_dim() -> Largest[Built]:
    return lambda v, e, most: LowDim(rank) if (rank := min(most // (FLOAT_BYTES * (v + e)), v, e)) else None


def _hashing(**settings: Any) -> Largest[Built]:
    def largest(num_embeddings: int, embedding_dim: int, num_bytes: int) -> Hashing | None:
        num_rows = min(num_bytes // (FLOAT_BYTES * embedding_dim), num_embeddings)
        return Hashing(num_rows, **settings) if num_rows else None

    return largest


def _quotient_remainder() -> Largest[Built]:
    def largest(num_embeddings: int, embedding_dim: int, num_bytes: int) -> QuotientRemainder | None:
        rows = np.arange(1, num_embeddings + 1)
        fitting = rows[rows + -(-num_embeddings // rows) <= num_bytes // (FLOAT_BYTES * embedding_dim)]
        return QuotientRemainder(int(fitting[-1])) if len(fitting) else None

    return largest


def _tensor_train(*, order: int = 3) -> Largest[Built]:
    def largest(num_embeddings: int, embedding_dim: int, num_bytes: int) -> TensorTrain | None:
        def taken(rank: int) -> int:
            return TensorTrain(rank, order).num_bytes(num_embeddings, embedding_dim)

        rank = bisect.bisect_right(range(1, _MOST_RANKS), num_bytes, key=taken)
        return TensorTrain(rank, order) if rank else None

    return largest


METHODS: dict[str, Callable[..., Largest[Built]]] = {
    "low-dim": _low_dim,
    "hashing": _hashing,
    "qr": _quotient_remainder,
    "tensor-train": _tensor_train,
}
"""Method -> what makes of its settings the largest size that fits into so many bytes."""


def sizes_of(
    method: str, settings: Mapping[str, Any], ratio: float, shapes: Mapping[str, Shape]
) -> dict[str, Built | None]:
    """Table -> its size; None for one that stays plain. See `fit_to_budget`."""
    return fit_to_budget(shapes, ratio, METHODS[method](**settings))


def composed_task(recipe: str, method: str, settings: Mapping[str, Any], ratio: float) -> type[Task]:
    """A recipe's Task with the tables of a method in the place of its own, with `--embedding full` otherwise.

    Args:
        recipe: two-tower or dlrm.
        method: one of METHODS.
        settings: of the method.
        ratio: total fp32 bytes to total bytes, at least.
    """
    base: Any = TASKS[recipe]

    class ComposedTask(base):
        def make_tables(self, features: Mapping[str, Sequence[str]]) -> nn.Module:
            num_embeddings, options = self.source.num_embeddings, self.config.embedding
            shapes = {name: (num_embeddings[name], options.embedding_dim) for name in features}
            sizes = sizes_of(method, settings, ratio, shapes)
            return ComposedTables(bag_configs(features, num_embeddings, options), sizes, self.device)

        def tables(self, model: nn.Module) -> dict[str, TrainedTable]:
            return {}  # of parts, whose names are no tables'

        def freeze(self, model: nn.Module, path: Path) -> None:
            freeze_composed(model, path, self.vocabularies)

    return ComposedTask


class ComposedTables(nn.Module):
    """TorchRec's EmbeddingBagCollection with tables that are put together from parts.

    Each distinct row of a batch is put together once, then pooled: as `dpq_rec.nn.DPQEmbeddingBagCollection` does.

    Args:
        configs: of the tables; SUM or MEAN pooling.
        sizes: table -> its size; None for one that stays plain.
        device: of the compositions' own parameters; the tables of the parts are on meta until they are sharded.
    """

    def __init__(
        self, configs: Sequence[EmbeddingBagConfig], sizes: Mapping[str, Built | None], device: torch.device
    ) -> None:
        super().__init__()
        self._configs = list(configs)
        self.compositions = nn.ModuleDict()
        by_width: dict[str, list[EmbeddingConfig]] = {}
        for table in configs:
            if (size := sizes[table.name]) is None:
                continue
            composition = size.build(table.num_embeddings, table.embedding_dim, device)
            self.compositions[table.name] = composition
            for part in composition.parts:
                config = _part_config(composition, part, table.name)
                by_width.setdefault(str(config.embedding_dim), []).append(config)
        self._names_by_width = {width: [config.name for config in group] for width, group in by_width.items()}
        # TorchRec's EmbeddingCollection holds tables of one dimension.
        self.parts = nn.ModuleDict({width: EmbeddingCollection(group, _META) for width, group in by_width.items()})
        self._plain = [table for table in configs if sizes[table.name] is None]
        self.plain = EmbeddingBagCollection(tables=self._plain, device=_META) if self._plain else None

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs, as TorchRec's models ask for them."""
        return self._configs

    def composition(self, table: str) -> Composition:
        """What puts a table together."""
        found = self.compositions[table]
        assert isinstance(found, Composition), "compositions holds nothing else"
        return found

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled vectors [B, sum of E] of bags of rows."""
        bags, rows, at = features.to_dict(), {}, {}
        composed = [table for table in self._configs if table.name in self.compositions]
        for table in composed:
            rows_T = torch.cat([bags[feature].values() for feature in table.feature_names])
            rows[table.name], at[table.name] = torch.unique(rows_T, return_inverse=True)
        looked = self._look_up(rows)
        plain = self.plain(features) if self.plain is not None else {}
        pooled = {feature: plain[feature] for table in self._plain for feature in table.feature_names}
        for table in composed:
            vectors_NE = self.composition(table.name)(rows[table.name], looked[table.name])
            lengths = [len(bags[feature].values()) for feature in table.feature_names]
            for feature, at_T in zip(table.feature_names, at[table.name].split(lengths), strict=True):
                offsets, mode = bags[feature].offsets(), _POOLING[table.pooling]
                pooled[feature] = functional.embedding_bag(
                    at_T, vectors_NE, offsets, mode=mode, include_last_offset=True
                )
        keys = [feature for table in self._configs for feature in table.feature_names]
        return KeyedTensor(keys, [pooled[key].shape[1] for key in keys], torch.cat([pooled[key] for key in keys], 1))

    def _look_up(self, rows: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Table -> part -> what it holds for each of the rows."""
        part_rows = {
            _part_name(name, part): part_rows_N
            for name, rows_N in rows.items()
            for part, part_rows_N in self.composition(name).part_rows(rows_N).items()
        }
        found: dict[str, torch.Tensor] = {}
        for width, collection in self.parts.items():
            names = self._names_by_width[width]
            lengths = torch.tensor([len(part_rows[name]) for name in names])
            values = torch.cat([part_rows[name] for name in names])
            answer = collection(KeyedJaggedTensor(keys=names, values=values, lengths=lengths.to(values.device)))
            found |= {name: answer[name].values() for name in names}
        return {
            name: {
                part: found[_part_name(name, part)][:, :width]
                for part, (_, width) in self.composition(name).parts.items()
            }
            for name in rows
        }


def _part_name(table: str, part: str) -> str:
    return f"{table}-{part}"


def _part_config(composition: Composition, part: str, table: str) -> EmbeddingConfig:
    num_rows, width = composition.parts[part]
    name = _part_name(table, part)
    return EmbeddingConfig(
        name=name,
        embedding_dim=-(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE,
        num_embeddings=num_rows,
        feature_names=[name],
        init_fn=partial(composition.start, part),
    )


@torch.no_grad()
def stored_tables(model: nn.Module) -> dict[str, Stored]:
    """What each table of a model's ComposedTables is on disk; every rank calls it, and gets the same."""
    tables = next(module for module in model.modules() if isinstance(module, ComposedTables))
    weights = (
        {
            name: rows_of(found.weight_VQ, torch.arange(found.num_embeddings)).cpu()
            for name, found in find_tables(model).items()
        }
        if tables.parts or tables.plain is not None
        else {}
    )
    stored = {}
    for table in tables.embedding_bag_configs():
        if table.name in tables.compositions:
            stored[table.name] = _stored(tables.composition(table.name), table, weights)
        else:
            stored[table.name] = plain(weights[table.name].numpy())
    return stored


def _stored(composition: Composition, table: EmbeddingBagConfig, weights: Mapping[str, torch.Tensor]) -> Stored:
    """Parts and parameters in fp16, and every row put together from these."""
    parts = {
        part: weights[_part_name(table.name, part)][:, :width].half() for part, (_, width) in composition.parts.items()
    }
    rounded = copy.deepcopy(composition).cpu()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    own = {name: parameter.half() for name, parameter in rounded.named_parameters()}
    rows_V = torch.arange(table.num_embeddings)
    looked = {part: parts[part].float()[part_rows_V] for part, part_rows_V in rounded.part_rows(rows_V).items()}
    tensors: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in (parts | own).items()}
    return Stored(tensors=tensors, vectors_VE=rounded(rows_V, looked).numpy())


def freeze_composed(model: nn.Module, path: Path, vocabularies: Mapping[str, Vocabulary]) -> None:
    """In the place of `dpq_rec.nn.freeze`: an artifact of every id's vector; every rank calls it."""
    stored = stored_tables(model)
    composed = next(module for module in model.modules() if isinstance(module, ComposedTables))
    if dist.get_rank() == 0:
        features = {table.name: tuple(table.feature_names) for table in composed.embedding_bag_configs()}
        write_stored(path, {name: stored[name] for name in vocabularies}, vocabularies, features)
