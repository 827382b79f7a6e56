"""What the recipes over interactions, two-tower and dlrm, can both be told: their data, and how tables learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from training.config import OptimisationOptions
from training.data.vocabularies import VocabularyPolicy
from training.options import SYNTHETIC, Options, check_path, check_positive


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
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
        check_path(self.path, can_be_generated=True)

    @classmethod
    def useless_flags(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """See `Options.useless_flags`."""
        found: dict[str, str] = {}
        if values["data"] != SYNTHETIC:
            of_generated = ("num-users", "num-items", "num-interactions", "string-ids")
            found = dict.fromkeys(of_generated, f"--data {values['data']} is read, not generated")
        if values["vocabulary"] == "modulo":
            reason = "with --vocabulary modulo all ids share --num-buckets rows"
            found |= dict.fromkeys(("min-count", "rare-buckets"), reason)
            found["tiers"] = "with --vocabulary modulo rows are not sorted by frequency"
        if values["refit"]:
            found["patience"] = "with --refit the validation split trains, and no run ends before --epochs"
        return found


@dataclass(frozen=True, kw_only=True)
class TableOptimisation(OptimisationOptions):
    """Optimisation: how it learns, and for how long.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric; none disables early stopping.
        batch_size: examples a rank takes per step; fewer where an epoch would have under 20 steps.
        learning_rate: of `optimizer`; 0.1 suits the two Adagrads (0.2 where it falls), 0.003 adam, more than 1 sgd.
        optimizer: of plain tables and of queries, fused into the backward pass; adam wants CUDA.
        dense_learning_rate: of all other weights (Adam).
        value_rate: multiplies dense_learning_rate for keys and values of DPQ tables. Adam's steps are as long as its
            rate, and values of late residual levels are short: 0.03 suits levels that k-means has placed.
        quantized_rate: multiplies all rates after the warm-up: the less a row moves, the less often it changes its
            codes.
        rate_decay: all rates stay, or fall linearly to 0, over all steps of all epochs or, late, over the last third.
    """

    epochs: int = 20
    batch_size: int = 4096
    learning_rate: float = 0.1
    optimizer: Literal["rowwise-adagrad", "adagrad", "sgd", "adam"] = "rowwise-adagrad"
    dense_learning_rate: float = 0.003
    value_rate: float = 1.0
    quantized_rate: float = 1.0
    rate_decay: Literal["none", "linear", "late"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "dense_learning_rate", "value_rate", "quantized_rate")

    def rate_factor(self, step: int, steps_per_epoch: int, full_epochs: int) -> float:
        """See `OptimisationOptions.rate_factor`."""
        num_steps = self.epochs * steps_per_epoch
        first = {"none": num_steps, "late": num_steps * 2 // 3, "linear": 0}[self.rate_decay]  # of those that fall
        factor = min(1.0, (num_steps - step) / (num_steps - first)) if first < num_steps else 1.0
        is_quantized = full_epochs > 0 and step >= full_epochs * steps_per_epoch
        return factor * self.quantized_rate if is_quantized else factor
