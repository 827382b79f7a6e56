"""The interactions of a run, the same on every rank. In: a RunConfig. Out: a Source."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dpq_rec import ConfigError
from dpq_rec.vocabulary import Vocabulary, load_vocabulary
from training.data.interactions import IDS, Interactions, SplitCounts
from training.data.synthetic import SyntheticConfig, generate
from training.data.vocabularies import ColumnVocabulary, VocabularyPolicy, build_vocabulary, has_values
from training.distributed import on_rank_0
from training.options import SYNTHETIC

if TYPE_CHECKING:
    from training.config import RunConfig

_logger = logging.getLogger(__name__)
USER, ITEM = IDS
_TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,242}")  # an artifact takes dots too, torch's ModuleDict none


class Source:
    """The interactions of a run, opened or generated, and what was counted in them; every rank makes it.

    Args:
        config: of the run.

    Attributes:
        interactions: the data.
        vocabularies: user_id, item_id and each categorical feature -> the map from its values to rows.
        row_counts: the same -> how often each row occurs in the training split [V] (int64).
        counts: rows of each split.

    Raises:
        ConfigError: the data cannot be read, lack a column, or have no test rows or, unless they train, no validation
            rows; a feature's name can name no table; labels of a split are all the same.
    """

    def __init__(self, config: RunConfig) -> None:
        data, path, is_dlrm = config.data, Path(config.data.path), config.recipe == "dlrm"
        if data.path == SYNTHETIC:
            path = Path(config.run.out) / SYNTHETIC
            sizes = {name: getattr(data, name) for name in ("num_users", "num_items", "num_interactions", "string_ids")}
            on_rank_0(lambda: generate(SyntheticConfig(**sizes, with_clicks=is_dlrm, seed=config.run.seed), path))
        interactions = Interactions.open(path, features=data.features, label=is_dlrm, validation_trains=data.refit)
        _check_names(interactions.categorical_features)
        self.counts = interactions.count_splits()
        _check_held_out(self.counts, is_refit=data.refit)
        if interactions.has_label:
            on_rank_0(lambda: _check_labels(interactions))
        self.interactions = _without_empty(interactions)
        self.vocabularies, self.row_counts = dict[str, Vocabulary](), dict[str, NDArray[np.int64]]()
        for name in (*IDS, *self.interactions.categorical_features):
            policy = data.vocabulary if name in IDS else VocabularyPolicy()
            self.vocabularies[name], self.row_counts[name] = _from_rank_0(self.interactions, name, policy)

    @property
    def num_embeddings(self) -> Mapping[str, int]:
        """Column -> rows of its table."""
        return {name: len(counts_V) for name, counts_V in self.row_counts.items()}

    def digest(self) -> str:
        """SHA-256 of the counts of splits and rows and of the vocabularies: the same for the same training rows."""
        found = hashlib.sha256(repr(self.counts).encode())
        for name, vocabulary in self.vocabularies.items():
            found.update(f"{name} {vocabulary.kind}".encode())
            for tensor in (self.row_counts[name], *vocabulary.tensors().values()):
                found.update(np.ascontiguousarray(tensor).data)
        return found.hexdigest()


def distinct_values(interactions: Interactions, name: str, own: Vocabulary) -> tuple[Vocabulary, int]:
    """The exact vocabulary of a column, and how many rows it has; every rank calls it.

    It is the column's own where each of its values has a row there.
    """
    rows_U = getattr(own, "rows_U", None)
    if rows_U is not None and len(rows_U) == int(rows_U.max()) + 1:
        return own, len(rows_U)
    exact, counts_V = _from_rank_0(interactions, name, VocabularyPolicy())
    return exact, len(counts_V)


def _check_names(features: Sequence[str]) -> None:
    """Raises ConfigError for a feature whose name an artifact or torch cannot give to a table."""
    for name in features:
        wanted = "up to 243 letters, digits, '_' and '-'" if not _TABLE_NAME.fullmatch(name) else ""
        if hasattr(nn.ModuleDict(), name):
            wanted = "a name that torch's modules do not use themselves"
        if wanted:
            raise ConfigError(f"features: got {name!r}, whose table is named so: want {wanted}; rename the column")


def _without_empty(interactions: Interactions) -> Interactions:
    """The interactions without features that no training row has a value of, of which nothing can be learned."""
    features = interactions.categorical_features
    empty = on_rank_0(lambda: [name for name in features if not has_values(interactions, name)])
    for name in empty:
        _logger.warning("features: %s has no value in the training rows; it is left out", name)
    kinds = {name: kind for name, kind in interactions.id_kinds.items() if name not in empty}
    return dataclasses.replace(interactions, id_kinds=kinds)


def _check_held_out(counts: SplitCounts, *, is_refit: bool) -> None:
    """Raises ConfigError where nothing is left to choose an epoch by, or to test on."""
    if is_refit and not counts.test:
        raise ConfigError("data: got no test rows, want some; without a column `split`, users need two rows")
    if not is_refit and not (counts.validation and counts.test):
        got = f"{counts.validation} validation and {counts.test} test rows"
        raise ConfigError(f"data: got {got}, want some of each; without a column `split`, users need three rows")


def _check_labels(interactions: Interactions) -> None:
    """One pass over the labels; raises ConfigError where a split has clicks alone, or none."""
    counts_SL = np.zeros((len(SplitCounts._fields), 2), np.int64)
    for piece in interactions.scan(("label",)):
        labels_N = piece.numbers["label"].astype(np.int64)
        counts_SL += np.bincount(2 * piece.splits_N + labels_N, minlength=counts_SL.size).reshape(counts_SL.shape)
    for split, (zeros, ones) in zip(SplitCounts._fields, counts_SL.tolist(), strict=True):
        if split == "validation" and interactions.validation_trains:
            continue
        if not (zeros and ones):
            raise ConfigError(f"label: got {zeros} of 0 and {ones} of 1 in the {split} rows, want some of each")


def _from_rank_0(interactions: Interactions, name: str, policy: VocabularyPolicy) -> ColumnVocabulary:
    """A column's vocabulary, and how often each row occurs: rank 0 reads for all, and sends arrays as they are."""
    built: list[ColumnVocabulary] = []

    def build() -> tuple[str, int, list[tuple[str, str, tuple[int, ...]]]]:
        vocabulary, counts_V = build_vocabulary(interactions, name, policy)
        built.append((vocabulary, counts_V))
        arrays = vocabulary.tensors().items()
        return vocabulary.kind, len(counts_V), [(key, each.dtype.str, each.shape) for key, each in arrays]

    kind, num_embeddings, described = on_rank_0(build)
    if dist.get_world_size() == 1:
        return built[0]
    arrays = built[0][0].tensors() if built else {}
    received = {key: _broadcast(arrays.get(key), dtype, shape) for key, dtype, shape in described}
    counts_V = _broadcast(built[0][1] if built else None, "<i8", (num_embeddings,))
    return built[0] if built else (load_vocabulary(kind, num_embeddings, received), counts_V)


def _broadcast(array: NDArray[Any] | None, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that rank 0 has, on every rank: as bytes, since not every dtype travels."""
    content = np.empty(shape, dtype) if array is None else np.array(array)
    dist.broadcast(torch.from_numpy(content.reshape(-1).view(np.uint8)), 0)
    return content
