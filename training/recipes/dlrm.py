"""Recipe dlrm, click-through: its options, checked, and its defaults. The model is in `training.models.dlrm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from dpq_rec import ConfigError, DPQConfig
from training.config import EmbeddingOptions, RunConfig, RunOptions
from training.options import Options
from training.recipes.interactions import DataOptions, TableOptimisation

DLRMConfig: TypeAlias = "RunConfig[DataOptions, DLRMOptions, TableOptimisation]"


@dataclass(frozen=True, kw_only=True)
class DLRMOptions(Options):
    """Model dlrm: click-through from ids, categorical and dense features, by TorchRec's DLRM; wants a column `label`.

    Attributes:
        dense_layers: widths of the layers over the dense features; one as wide as a vector follows them.
        over_layers: widths of the layers over the interactions of vectors; one of width 1 follows them.
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "two-tower": "dlrm scores a pair by itself and has labels: it draws no items and compares no two vectors"
    }

    dense_layers: tuple[int, ...] = (64,)
    over_layers: tuple[int, ...] = (128, 64)

    def __post_init__(self) -> None:
        for name in ("dense_layers", "over_layers"):
            if any(width < 1 for width in getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, want widths of 1 or more")
        if not self.over_layers:
            raise ConfigError("--over-layers: got none, want one width at least")


def dlrm(data: str, out: str) -> DLRMConfig:
    """Click-through: how likely is the label of a user, an item and their features to be 1.

    Ids and categorical features are tables, lists are averaged, dense features are standardised by the training split.
    Measured by AUC and normalised entropy. The data have a column `label` of 0 and 1.
    """
    return RunConfig(
        recipe="dlrm",
        data=DataOptions(path=data),
        model=DLRMOptions(),
        embedding=EmbeddingOptions(embedding_dim=32, dpq=DPQConfig(method="vq", num_subspaces=16, num_codes=32)),
        optimisation=TableOptimisation(batch_size=1024, learning_rate=0.02, dense_learning_rate=0.001),
        run=RunOptions(out=out),
    )
