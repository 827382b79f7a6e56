"""What a run can be told. Checked once, here; the whole of it is in metrics.json and enough to run again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dpq_rec import ConfigError, DPQConfig

Embedding = Literal["full", "dpq-sx", "dpq-vq"]
SYNTHETIC = "synthetic"


def _option(default: Any, text: str, **more: Any) -> Any:
    """A field, and what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Each field is a flag of `python -m training`, by the same name."""

    data: str = _option("", "Parquet file or folder with user_id and item_id; or 'synthetic'")
    out: str = _option("", "folder of the run: metrics.json, artifact/, model.safetensors, checkpoints/")
    recipe: str = _option("two-tower", "", hidden=True)

    embedding: Embedding = _option(
        "dpq-vq", "tables: plain, or DPQ by softmax or by centroids", choices="full dpq-sx dpq-vq"
    )
    embedding_dim: int = _option(64, "E, width of a vector")
    num_subspaces: int = _option(16, "D, groups a vector is split into; must divide E")
    num_codes: int = _option(32, "K, choices per group; a row takes D * log2(K) bits")
    num_levels: int = _option(1, "L, residual levels; 1, plain DPQ, is what trains today")
    batch_norm: bool = _option(True, "normalise the scores of each code")
    penalty_weight: float = _option(1.0, "dpq-vq: weight of the term that draws values to their queries")

    epochs: int = _option(20, "passes over the training split, at most")
    patience: int = _option(3, "stop after so many epochs without a better validation metric")
    batch_size: int = _option(4096, "examples a rank takes per step; fewer where an epoch would have under 20 steps")
    num_negatives: int = _option(
        2048, "uniform negatives a rank draws per step, shared by its examples; at most batch_size"
    )
    temperature: float = _option(0.1, "divides the cosine of user and item before the softmax")
    learning_rate: float = _option(
        0.1, "of plain tables and of queries (row-wise Adagrad, fused into the backward pass)"
    )
    quantizer_learning_rate: float = _option(0.003, "of keys and values (Adam)")
    seed: int = _option(0, "of everything random")
    device: str = _option("auto", "auto takes CUDA where present", choices="auto cpu cuda")
    max_eval_users: int = _option(50_000, "measure metrics on at most so many users, drawn at random")

    num_users: int = _option(100_000, "synthetic: users")
    num_items: int = _option(20_000, "synthetic: items")
    num_interactions: int = _option(2_000_000, "synthetic: interactions")

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = field.metadata.get("choices", "").split()
            if choices and value not in choices:
                raise ConfigError(f"--{field.name}: got {value!r}, want one of {', '.join(choices)}")
            if field.type in ("int", "float") and field.name != "seed" and value <= 0:
                raise ConfigError(f"--{field.name.replace('_', '-')}: got {value}, want more than 0")
        if self.num_levels != 1:
            raise ConfigError(f"--num-levels: got {self.num_levels}, want 1: residual levels are read, not trained yet")
        if self.seed < 0:
            raise ConfigError(f"--seed: got {self.seed}, want 0 or more")
        if self.num_negatives > self.batch_size:
            got = f"{self.num_negatives} negatives, a batch of {self.batch_size}"
            raise ConfigError(f"--num-negatives: got {got}; want at most as many as the batch")
        if self.data != SYNTHETIC and not Path(self.data).exists():
            raise ConfigError(f"--data: {self.data} does not exist")
        if self.dpq is not None:
            self.dpq.subspace_dim(self.embedding_dim)

    @property
    def dpq(self) -> DPQConfig | None:
        """How tables are quantized; None for plain ones."""
        if self.embedding == "full":
            return None
        return DPQConfig(
            method="sx" if self.embedding == "dpq-sx" else "vq",
            num_subspaces=self.num_subspaces,
            num_codes=self.num_codes,
            batch_norm=self.batch_norm,
            penalty_weight=self.penalty_weight,
        )

    def as_dict(self) -> dict[str, Any]:
        """Every setting, as metrics.json holds it."""
        return dataclasses.asdict(self)
