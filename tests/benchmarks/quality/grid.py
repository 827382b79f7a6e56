"""What is run: data sets, methods, settings to try, ratios, seeds. The one place to change; see `plan` for the order.

Every method gets NUM_TRIALS trials of half the epochs. For methods that are trained they are run at TUNING_RATIO, and
what they chose holds for the other ratios, and for a data set that is `tuned_on` this one; but see `_COMMITTED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

NUM_TRIALS = 4
TUNING_RATIO = 20.0
SEEDS = (0, 1, 2)
NUM_BEST_BASELINES = 2  # that get all seeds, beside full and the best DPQ

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A data set and how it is learned, the same for all methods.

    Attributes:
        dataset: folder in the folder of data sets.
        recipe: of the trainer.
        rows: of every table: what does not fit into its bytes is not tried.
        epochs: of a final run, at most.
        metric: that choices go by, on the validation split; the larger the better. Epochs are the trainer's choice.
        flags: of the trainer.
        full_share: of the epochs, those that a DPQ with a warm-up trains before it is quantized; one at least.
        full_phase: more flags of a DPQ that has one.
        tuned_on: the data set on which methods that are trained have their trials, where it is another one.
        ratios: at which methods that are trained are run.
        more_ratios: at which tables are compressed after training, too.
    """

    dataset: str
    recipe: str
    rows: tuple[int, ...]
    epochs: int
    metric: str
    flags: Settings
    full_share: float
    full_phase: Settings = dataclasses.field(default_factory=dict)
    tuned_on: str = ""
    ratios: tuple[float, ...] = (20.0, 40.0)
    more_ratios: tuple[float, ...] = (10.0, 80.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing to try.

    Attributes:
        flags: of the trainer.
        times: flag -> what the study's value of it is multiplied by.
        has_full_phase: whether the study's share of the epochs comes before tables are quantized.
        settings: of the method itself.
        sizes: of DPQ: data set -> ratio -> the flags of a table that fits, and what goes with them.
    """

    flags: Settings = dataclasses.field(default_factory=dict)
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    has_full_phase: bool = False
    settings: Settings = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Mapping[float, Settings]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its trials.

    Attributes:
        kind: "full"; "dpq"; "trained", see `baselines`; "post-training", see `post_training`.
        trials: what is tried; one alone is taken as it is.
        has_sizes: False where it has one size only, and so no ratio to reach.
    """

    kind: Literal["full", "dpq", "trained", "post-training"]
    trials: tuple[Trial, ...]
    has_sizes: bool = True


STUDIES = (
    Study(
        dataset="movielens_1m",
        recipe="two-tower",
        rows=(3416,),
        epochs=8,
        metric="ndcg@10",
        flags={
            "embedding-dim": 64,
            "learning-rate": 0.2,
            "dense-learning-rate": 0.003,
            "num-negatives": 2048,
            "history": 32,
        },
        full_share=3 / 4,
    ),
    Study(
        dataset="gowalla",
        recipe="two-tower",
        rows=(40979,),
        epochs=24,
        metric="ndcg@20",
        flags={
            "embedding-dim": 64,
            "learning-rate": 0.2,
            "dense-learning-rate": 0.003,
            "num-negatives": 4096,
            "history": 32,
        },
        full_share=2 / 3,
        tuned_on="movielens_1m",  # a trial takes minutes there, and tens of them here
    ),
    Study(
        dataset="movielens_100k",
        recipe="dlrm",
        rows=(943, 1617, 2, 21, 382, 19),
        epochs=12,
        metric="auc",
        flags={
            "embedding-dim": 64,
            "features": ["age", "gender", "occupation", "zip3", "genres"],
            "learning-rate": 0.02,
            "dense-learning-rate": 0.001,
        },
        full_phase={"value-rate": 0.1},
        full_share=1 / 6,  # full tables are best after three of twelve epochs
    ),
)


def codes(num_subspaces: int, num_codes: int, num_levels: int = 1) -> Settings:
    """D, K and L as flags, and fp16 values."""
    size = {"num-subspaces": num_subspaces, "num-codes": num_codes, "num-levels": num_levels}
    return {**size, "values-dtype": "float16"}


def _tiers(num_levels: int, *rarer: tuple[float, int]) -> Settings:
    """Bytes by frequency: levels of the most frequent rows; of those from a share of the rows on. Values are shared."""
    return {**codes(4, 256, num_levels), "share-subspaces": True, "tiers": [list(tier) for tier in rarer]}


# Data set -> ratio -> D, K and L that keep within it, all tables together. One level, all else as the recipe has it.
_DPQ_PLAIN = {
    "gowalla": {20.0: codes(16, 64), 40.0: codes(8, 64)},
    "movielens_1m": {20.0: codes(16, 32), 40.0: codes(8, 32)},
    "movielens_100k": {20.0: codes(16, 16), 40.0: codes(8, 8)},
}
_DPQ_LEVELS = {
    "gowalla": {20.0: codes(8, 64, 2), 40.0: codes(4, 16, 3)},
    "movielens_1m": {20.0: codes(8, 32, 2), 40.0: codes(4, 8, 3)},
    "movielens_100k": {20.0: codes(8, 8, 2), 40.0: codes(8, 4, 2)},
}
# Commitment was chosen on Gowalla's validation, beside the trials: rare rows' queries drift from their few codes.
_COMMITTED: Settings = {"commitment-weight": 10.0}
_DPQ_TIERS: Mapping[str, Mapping[float, Settings]] = {
    "gowalla": {
        20.0: {**_tiers(8, (0.02, 6), (0.06, 4), (0.2, 3), (0.42, 2)), **_COMMITTED},
        40.0: {**_tiers(5, (0.02, 3), (0.06, 2), (0.22, 1)), **_COMMITTED},
    },
    "movielens_1m": {20.0: codes(32, 8), 40.0: codes(16, 8)},  # few rows leave room for few values
    "movielens_100k": _DPQ_LEVELS["movielens_100k"],
}
# A warm-up first; then values that the task's gradient moves, and nothing else, in steps shorter than theirs are.
_WARM_VQ = {"value-gradient": True, "penalty-weight": 0.0, "batch-norm": False}
_WARM_SX = {"metric": "euclidean", "hard-values": True, "batch-norm": False}
_RATES = tuple(Trial(times={"learning-rate": factor}) for factor in (1, 0.5, 2, 4))
# A tensor train has no tables: its cores move at the dense rate.
_DENSE_RATES = tuple(Trial(times={"dense-learning-rate": factor}) for factor in (1, 0.1, 0.3, 3))
_NUM_CODES = (8, 16, 64, 256)
_SUBSPACES_AND_CODES = ((1, 16), (4, 8), (4, 64), (8, 16))


METHODS: dict[str, Method] = {
    "full": Method(kind="full", trials=_RATES),
    "dpq-vq": Method(
        kind="dpq",
        trials=(
            Trial(sizes=_DPQ_PLAIN),
            Trial(sizes=_DPQ_LEVELS, flags=_WARM_VQ, has_full_phase=True, times={"learning-rate": 4}),
            Trial(sizes=_DPQ_TIERS, flags=_WARM_VQ, has_full_phase=True),
            Trial(sizes=_DPQ_TIERS, flags={**_WARM_VQ, **_COMMITTED}, has_full_phase=True),
        ),
    ),
    "dpq-sx": Method(
        kind="dpq",
        trials=(
            Trial(sizes=_DPQ_PLAIN),
            Trial(sizes=_DPQ_PLAIN, flags=_WARM_SX, has_full_phase=True),
            Trial(sizes=_DPQ_LEVELS, flags=_WARM_SX, has_full_phase=True),
            Trial(sizes=_DPQ_LEVELS, flags=_WARM_SX, has_full_phase=True, times={"learning-rate": 4}),
        ),
    ),
    "low-dim": Method(kind="trained", trials=_RATES),
    "hashing": Method(
        kind="trained",
        trials=(*_RATES[:3], Trial(settings={"hash": "mixed"})),
    ),
    "qr": Method(kind="trained", trials=_RATES),
    "tensor-train": Method(kind="trained", trials=_DENSE_RATES),
    "low-rank": Method(kind="post-training", trials=(Trial(),)),
    "int8": Method(kind="post-training", trials=(Trial(),), has_sizes=False),
    "int4": Method(kind="post-training", trials=(Trial(),), has_sizes=False),
    "pq": Method(kind="post-training", trials=tuple(Trial(settings={"num_codes": k}) for k in _NUM_CODES)),
    "opq": Method(kind="post-training", trials=tuple(Trial(settings={"num_codes": k}) for k in _NUM_CODES)),
    "rq": Method(
        kind="post-training",
        trials=tuple(Trial(settings={"num_subspaces": d, "num_codes": k}) for d, k in _SUBSPACES_AND_CODES),
    ),
    "aq": Method(
        kind="post-training",
        trials=tuple(Trial(settings={"num_subspaces": d, "num_codes": k}) for d, k in _SUBSPACES_AND_CODES),
    ),
}

# K and L given, the same as a final DPQ's: how its codes are fitted to the trained full table.
RECONSTRUCTIONS: tuple[Settings, ...] = (
    {"start": "kmeans", "batch_norm": False},
    {"start": "uniform", "batch_norm": True},
)

# What each part of the chosen DPQ-VQ is worth: its trial again, at equal bytes, with one thing changed.
ABLATION_DATASETS = ("movielens_1m",)
ABLATION_METHOD = "dpq-vq"
_TASK_OFF = {"value-gradient": False, "penalty-weight": 1.0}
ABLATIONS: dict[str, Trial] = {
    "one level, narrow subspaces": Trial(sizes=_DPQ_PLAIN),
    "no full phase, k-means of random queries": Trial(flags={"full-epochs": 0, "start-from": "kmeans"}),
    "no full phase, uniform start": Trial(flags={"full-epochs": 0}),
    "values drawn to their queries by the penalty": Trial(flags=_TASK_OFF),
    "values as running means of their queries": Trial(flags={**_TASK_OFF, "ema-decay": 0.99}),
    "quantized rate 1": Trial(flags={"quantized-rate": 1.0}),
    "value rate 1": Trial(flags={"value-rate": 1.0}),
    "value rate 0.01": Trial(flags={"value-rate": 0.01}),
    "commitment of queries, 0.25": Trial(flags={"commitment-weight": 0.25}),
    "batch norm of scores (balances the codes)": Trial(flags={"batch-norm": True}),
    "unused codes revived after 100 batches": Trial(flags={"revive-after": 100}),
}

# The heat maps of the paper's figures 3 and 7, half the epochs each.
SWEEP_DATASETS = ("movielens_100k",)
SWEEP_METHODS = ("dpq-sx", "dpq-vq")
SWEEP_NUM_CODES = (4, 16, 64, 256)
SWEEP_NUM_SUBSPACES = (4, 8, 16, 32)
