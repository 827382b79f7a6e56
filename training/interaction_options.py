"""What the recipes over interactions can be told. In: values of flags. Out: their groups of options, checked.

As in `training.config`, of which these are groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpq_rec import ConfigError
from training.data.vocabularies import VocabularyPolicy
from training.flags import check_positive

SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data: what is read, and which id gets which row.

    Attributes:
        path: Parquet file or folder with user_id and item_id; or 'synthetic', which generates a population.
        features: more columns to learn from: numbers are dense, strings and lists are categorical.
        vocabulary: how ids of users and items get rows; categorical features have a row for each value.
        refit: train on the training and validation splits together, for all epochs, and keep the last one; --patience,
            which needs validation metrics, then has no effect.
        num_users: users that 'synthetic' generates.
        num_items: items that 'synthetic' generates.
        num_interactions: interactions that 'synthetic' generates; for dlrm with label, price (a number), segment (a
            string) and tags (a list).
        string_ids: whether 'synthetic' generates ids that are strings.
    """

    path: str = field(metadata={"flag": "data"})
    features: tuple[str, ...] = ()
    vocabulary: VocabularyPolicy = field(default_factory=VocabularyPolicy, metadata={"renamed": {"kind": "vocabulary"}})
    refit: bool = False
    num_users: int = 100_000
    num_items: int = 20_000
    num_interactions: int = 2_000_000
    string_ids: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_users", "num_items", "num_interactions")
        if not self.path:
            raise ConfigError("--data is missing")
        if self.path != SYNTHETIC and not Path(self.path).exists():
            raise ConfigError(f"--data: {self.path} does not exist")


@dataclass(frozen=True, kw_only=True)
class TwoTowerOptions:
    """Model two-tower: similarity of a user's and an item's vector, softmax against sampled items.

    Attributes:
        similarity: what is searched by: the vectors' cosine or their dot product.
        temperature: divides the similarity before the softmax; 0.1 suits cosines, 1 dot products.
        negatives: what an example's item is told from: items drawn uniformly, the other examples' items, or both.
        num_negatives: uniform negatives a rank draws per step, shared by its examples; none: as many as these.
        history: a user's vector is the mean of the items that it chose, and users have no table: in a step of at most
            so many items, drawn, and never of the example's own; of all where metrics are measured. 0 gives users rows.
        log_q: subtract the logarithm of how likely an item is to be a candidate (Yi et al., 2019).
        max_eval_users: measure metrics on at most so many users, drawn at random.
    """

    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.1
    negatives: Literal["uniform", "in-batch", "both"] = "uniform"
    num_negatives: int | None = None
    history: int = 0
    log_q: bool = True
    max_eval_users: int = 50_000

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "num_negatives", "max_eval_users")
        if self.history < 0:
            raise ConfigError(f"--history: got {self.history}, want 0 or more")


@dataclass(frozen=True, kw_only=True)
class DLRMOptions:
    """Model dlrm: click-through from ids, categorical and dense features, by TorchRec's DLRM; wants a column `label`.

    Attributes:
        dense_layers: widths of the layers over the dense features; one as wide as a vector follows them.
        over_layers: widths of the layers over the interactions of vectors; one of width 1 follows them.
    """

    dense_layers: tuple[int, ...] = (64,)
    over_layers: tuple[int, ...] = (128, 64)

    def __post_init__(self) -> None:
        for name in ("dense_layers", "over_layers"):
            if any(width < 1 for width in getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, want widths of 1 or more")
        if not self.over_layers:
            raise ConfigError("--over-layers: got none, want one width at least")
