"""What is run: data sets, methods, settings to try, ratios, seeds. The one place to change; see `plan` for the order.

Every method gets NUM_TRIALS trials of half the epochs. For methods that are trained they are run at TUNING_RATIO, and
what they chose holds for the other ratios.
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
        epochs: of a final run, at most.
        metric: that choices go by, on the validation split; the larger the better. Epochs are the trainer's choice.
        flags: of the trainer.
        ratios: at which methods that are trained are run.
        more_ratios: at which tables are compressed afterwards, too.
    """

    dataset: str
    recipe: str
    epochs: int
    metric: str
    flags: Settings
    ratios: tuple[float, ...] = (20.0, 40.0)
    more_ratios: tuple[float, ...] = (10.0, 80.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing to try.

    Attributes:
        flags: of the trainer.
        settings: of the method itself.
        sizes: of DPQ: data set -> ratio -> the flags of a table that fits.
    """

    flags: Settings = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Mapping[float, Settings]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method and its trials.

    Attributes:
        kind: "full"; "dpq"; "trained", see `baselines`; "afterwards", see `afterwards`.
        trials: what is tried; one alone is taken as it is.
        has_sizes: False where it has one size only, and so no ratio to reach.
    """

    kind: Literal["full", "dpq", "trained", "afterwards"]
    trials: tuple[Trial, ...]
    has_sizes: bool = True


STUDIES = (
    Study(dataset="movielens_1m", recipe="two-tower", epochs=24, metric="ndcg@10", flags={"embedding-dim": 64}),
    Study(dataset="gowalla", recipe="two-tower", epochs=24, metric="ndcg@20", flags={"embedding-dim": 64}),
    Study(
        dataset="movielens_100k",
        recipe="dlrm",
        epochs=12,
        metric="auc",
        flags={"embedding-dim": 64, "features": ["age", "gender", "occupation", "zip3", "genres"]},
    ),
)


def _codes(num_subspaces: int, num_codes: int, num_levels: int = 1) -> Settings:
    size = {"num-subspaces": num_subspaces, "num-codes": num_codes, "num-levels": num_levels}
    return {**size, "values-dtype": "float16"}


# Data set -> ratio -> D, K and L that keep within it, all tables together.
_DPQ_PLAIN = {
    "gowalla": {20.0: _codes(16, 64), 40.0: _codes(8, 64)},
    "movielens_1m": {20.0: _codes(16, 32), 40.0: _codes(8, 32)},
    "movielens_100k": {20.0: _codes(16, 16), 40.0: _codes(8, 8)},
}
_DPQ_LEVELS = {
    "gowalla": {20.0: _codes(8, 64, 2), 40.0: _codes(4, 16, 3)},
    "movielens_1m": {20.0: _codes(8, 32, 2), 40.0: _codes(4, 16, 2)},
    "movielens_100k": {20.0: _codes(8, 8, 2), 40.0: _codes(8, 4, 2)},
}
_RATES = ({"learning-rate": 0.1}, {"learning-rate": 0.05}, {"learning-rate": 0.2}, {"learning-rate": 0.4})
_DENSE_RATES = tuple({"dense-learning-rate": rate} for rate in (0.0003, 0.001, 0.003, 0.01))


METHODS: dict[str, Method] = {
    "full": Method(kind="full", trials=tuple(Trial(flags=flags) for flags in _RATES)),
    "dpq-vq": Method(
        kind="dpq",
        trials=(
            Trial(sizes=_DPQ_PLAIN),
            Trial(sizes=_DPQ_LEVELS),
            Trial(sizes=_DPQ_PLAIN, flags={"start-from": "kmeans", "value-gradient": True}),
            Trial(sizes=_DPQ_LEVELS, flags={"start-from": "kmeans", "value-gradient": True}),
        ),
    ),
    "dpq-sx": Method(
        kind="dpq",
        trials=(
            Trial(sizes=_DPQ_PLAIN),
            Trial(sizes=_DPQ_LEVELS),
            Trial(sizes=_DPQ_PLAIN, flags={"start-from": "kmeans", "metric": "euclidean"}),
            Trial(sizes=_DPQ_LEVELS, flags={"start-from": "kmeans", "metric": "euclidean"}),
        ),
    ),
    "low-dim": Method(kind="trained", trials=tuple(Trial(flags=flags) for flags in _RATES)),
    "hashing": Method(
        kind="trained",
        trials=(
            *(Trial(flags=flags) for flags in _RATES[:3]),
            Trial(settings={"hash": "mixed"}),
        ),
    ),
    "qr": Method(kind="trained", trials=tuple(Trial(flags=flags) for flags in _RATES)),
    "tensor-train": Method(kind="trained", trials=tuple(Trial(flags=flags) for flags in _DENSE_RATES)),
    "low-rank": Method(kind="afterwards", trials=(Trial(),)),
    "int8": Method(kind="afterwards", trials=(Trial(),), has_sizes=False),
    "int4": Method(kind="afterwards", trials=(Trial(),), has_sizes=False),
    "pq": Method(kind="afterwards", trials=tuple(Trial(settings={"num_codes": k}) for k in (16, 32, 64, 256))),
    "opq": Method(kind="afterwards", trials=tuple(Trial(settings={"num_codes": k}) for k in (16, 32, 64, 256))),
    "rq": Method(
        kind="afterwards",
        trials=tuple(
            Trial(settings={"num_subspaces": d, "num_codes": k}) for d, k in ((1, 32), (4, 16), (4, 64), (8, 16))
        ),
    ),
    "aq": Method(
        kind="afterwards",
        trials=tuple(
            Trial(settings={"num_subspaces": d, "num_codes": k}) for d, k in ((1, 32), (4, 16), (4, 64), (8, 16))
        ),
    ),
}

# K and L given, the same as a final DPQ's: how its codes are fitted to the trained full table afterwards.
RECONSTRUCTIONS: tuple[Settings, ...] = (
    {"start": "kmeans", "batch_norm": False},
    {"start": "uniform", "batch_norm": True},
)

# The heat maps of the paper's figures 3 and 7, half the epochs each.
SWEEP_DATASETS = ("movielens_1m",)
SWEEP_METHODS = ("dpq-sx", "dpq-vq")
SWEEP_NUM_CODES = (4, 16, 64, 256)
SWEEP_NUM_SUBSPACES = (4, 8, 16, 32)
