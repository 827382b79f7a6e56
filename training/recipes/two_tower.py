"""Recipe two-tower, retrieval: its options, checked, and its defaults. The model is in `training.models.two_tower`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from dpq_rec import ConfigError, DPQConfig
from training.config import EmbeddingOptions, RunConfig, RunOptions
from training.options import Options, check_positive
from training.recipes.interactions import DataOptions, TableOptimisation

TwoTowerConfig: TypeAlias = "RunConfig[DataOptions, TwoTowerOptions, TableOptimisation]"


@dataclass(frozen=True, kw_only=True)
class TwoTowerOptions(Options):
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

    lacks: ClassVar[Mapping[str, str]] = {"dlrm": "two-tower has no layer after its tables"}

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

    def check_run(self, run: TwoTowerConfig) -> None:
        """See `Options.check_run`."""
        if run.data.features:
            reason = "two-tower has no layer after its tables that they could enter; dlrm takes them"
            raise ConfigError(f"--features: got {','.join(run.data.features)}; {reason}")
        drawn = self.num_negatives or 0
        if self.negatives != "in-batch" and drawn > run.optimisation.batch_size:
            got = f"{drawn} negatives, a batch of {run.optimisation.batch_size}"
            raise ConfigError(f"--num-negatives: got {got}; want at most as many as the batch")

    @classmethod
    def useless_flags(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """See `Options.useless_flags`."""
        if values["negatives"] == "in-batch":
            return {"num-negatives": "--negatives in-batch draws none"}
        if values["negatives"] == "uniform":
            return {"log-q": "with --negatives uniform all candidates are as likely, and it cancels out"}
        return {}


def two_tower(data: str, out: str) -> TwoTowerConfig:
    """Retrieval: the vectors that are served are the ones to search with.

    A user's and an item's vector are compared, and a softmax tells the item that the user chose from sampled ones.
    Measured by recall and ndcg over all items.
    """
    # Values that k-means of trained queries has placed and the task's gradient moves, in steps as short as they are.
    # The metric is that of k-means, for DPQ-SX too.
    dpq = DPQConfig(method="vq", metric="euclidean", value_gradient=True, penalty_weight=0.0, batch_norm=False)
    return RunConfig(
        recipe="two-tower",
        data=DataOptions(path=data),
        model=TwoTowerOptions(),
        embedding=EmbeddingOptions(dpq=dpq, full_epochs=None),
        # Without patience: a run that ended early would never have learned at a low rate.
        # At half the rates tables are quantized with less noise: Gowalla's validation, in tests/benchmarks/results.
        optimisation=TableOptimisation(
            patience=None, learning_rate=0.2, rate_decay="late", value_rate=0.03, quantized_rate=0.5
        ),
        run=RunOptions(out=out),
    )
