"""What a run can be told. Checked once, here; the whole of it is in metrics.json and enough to run again.

Options stand in groups: `data`, `model` (one class for each recipe), `embedding`, `optimisation`, `run`; those of data
and models are in `training.interaction_options` and `training.text_options`. Each option is a field of its group and a
flag of `python -m training RECIPE`; `training.flags` makes the flags of the fields.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.config import drop_inapplicable
from dpq_rec.sizing import choose_layout
from training import flags
from training.flags import check_positive
from training.interaction_options import DataOptions, DLRMOptions, TwoTowerOptions
from training.per_table import PerTable, checked, with_own
from training.text_options import (
    ClassifierOptimisation,
    ClassifierOptions,
    DocumentOptions,
    LanguageModelOptimisation,
    LanguageModelOptions,
    TextOptions,
)

_logger = logging.getLogger(__name__)
METHODS: dict[str, Literal["sx", "vq"]] = {"dpq-sx": "sx", "dpq-vq": "vq"}


ModelOptions: TypeAlias = TwoTowerOptions | DLRMOptions | LanguageModelOptions | ClassifierOptions
MODEL_OPTIONS: dict[str, type[ModelOptions]] = {
    "two-tower": TwoTowerOptions,
    "dlrm": DLRMOptions,
    "language-model": LanguageModelOptions,
    "text-classification": ClassifierOptions,
}


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """Embedding: the tables, plain or compressed.

    Attributes:
        kind: plain tables, or DPQ by softmax (dpq-sx) or by centroids (dpq-vq).
        embedding_dim: E, width of a vector.
        target_ratio: how many times smaller each table becomes, codes and values together: chooses num_subspaces,
            num_codes and num_levels for each by its rows, and fp16 values; none leaves them as they are. A table that
            is too small for it stays plain.
        dpq: how tables are quantized; None where they are plain.
        per_table: DPQ options that some tables have otherwise, each as its own flag takes it, with blanks between them:
            'item_id.num_levels=44 item_id.tiers=0.05:32,0.2:16'.
        start: keys and values begin uniformly, or as the k-means centroids of the queries they stand for.
        full_epochs: the first so many epochs train without quantizing, as plain tables do; after them keys and values
            begin as k-means centroids. none is two thirds of the epochs, where queries are as wide as vectors.
    """

    kind: Literal["full", "dpq-sx", "dpq-vq"] = field(default="dpq-vq", metadata={"flag": "embedding"})
    embedding_dim: int = 64
    target_ratio: float | None = None
    dpq: DPQConfig | None = field(
        default_factory=lambda: DPQConfig(method="vq"),
        metadata={"renamed": {"method": "", "temperature": "dpq-temperature"}},
    )
    per_table: PerTable = field(default_factory=dict)
    start: Literal["uniform", "kmeans"] = field(default="uniform", metadata={"flag": "start-from"})
    full_epochs: int | None = 0

    def __post_init__(self) -> None:
        check_positive(self, "embedding_dim")
        method = self.dpq.method if self.dpq else None
        if METHODS.get(self.kind) != method:
            raise ConfigError(f"embedding: got {self.kind} with a DPQ configuration of {method}, want the same")
        if self.dpq is None and self.start != "uniform":
            raise ConfigError(
                f"--start-from: got {self.start} with --embedding full: it has no keys and values; leave it out"
            )
        self._check_target_ratio()
        typed = checked(self.per_table, self.dpq, self.embedding_dim, self.target_ratio)
        object.__setattr__(self, "per_table", typed)  # the same of a flag and of JSON
        if self.dpq is not None and self.target_ratio is None:
            self.dpq.query_dim(self.embedding_dim)
        self._check_full_epochs()

    def dpq_of(self, name: str, num_embeddings: int) -> DPQConfig | None:
        """How a table of so many rows is quantized, if it is; None where tables are plain.

        Raises:
            ConfigError: the table cannot become as small as target_ratio asks.
        """
        if self.dpq is None:
            return None
        own = with_own(self.dpq, self.per_table.get(name, {}))
        if self.target_ratio is None:
            return own
        try:
            shared = self.dpq.share_subspaces
            chosen = choose_layout(num_embeddings, self.embedding_dim, self.target_ratio, share_subspaces=shared)
        except ConfigError as error:
            raise ConfigError(f"table {name!r}: {error}") from error
        return dataclasses.replace(own, **chosen)

    def dpq_by_table(self, num_embeddings: Mapping[str, int]) -> dict[str, DPQConfig | None]:
        """How each table of so many rows is quantized; None for one that stays plain, of which the log has the reason.

        Raises:
            ConfigError: no table can become as small as target_ratio asks; or one cannot, with quantize_small.
        """
        found, reasons = dict[str, DPQConfig | None](), dict[str, str]()
        for name, rows in num_embeddings.items():
            try:
                found[name] = config = self.dpq_of(name, rows)
                why = config and config.why_plain(rows, self.embedding_dim)
            except ConfigError as error:
                if with_own(self.dpq, self.per_table.get(name, {})).quantize_small:
                    raise
                why = str(error).partition(": ")[2]
            if why:
                found[name] = None
                reasons[name] = why
        if self.target_ratio is not None and len(reasons) == len(found):
            raise ConfigError("; ".join(f"table {name!r}: {why}" for name, why in reasons.items()))
        for name, why in reasons.items():
            _logger.info("table %r stays plain: %s; --quantize-small quantizes it", name, why)
        return found

    def _check_target_ratio(self) -> None:
        if self.target_ratio is None:
            return
        check_positive(self, "target_ratio")
        if self.dpq is None:
            reason = "with --embedding full, which has nothing to choose"
            raise ConfigError(f"--target-ratio: got {self.target_ratio:g} {reason}; leave it out")
        if self.dpq.key_dim is not None:
            reason = "which has no levels to choose from"
            raise ConfigError(f"--target-ratio: got {self.target_ratio:g} with --key-dim {self.dpq.key_dim}, {reason}")
        if self.dpq.tiers:
            raise ConfigError(f"--target-ratio: got {self.target_ratio:g} with --tiers, whose levels it would choose")

    def _check_full_epochs(self) -> None:
        if self.full_epochs is None:
            return
        if self.full_epochs < 0:
            raise ConfigError(f"--full-epochs: got {self.full_epochs}, want 0 or more")
        if self.full_epochs and self.dpq is None:
            raise ConfigError(
                f"--full-epochs: got {self.full_epochs} with --embedding full, whose epochs all are; leave it out"
            )
        if self.full_epochs and self.dpq is not None and not self._queries_are_vectors(self.dpq):
            reason = "queries have to be as wide as vectors to take their place"
            raise ConfigError(f"--full-epochs: got {self.full_epochs} with --key-dim {self.dpq.key_dim}: {reason}")

    def full_epochs_of(self, epochs: int) -> int:
        """How many of a run's epochs come before tables are quantized; 0 of plain tables."""
        if self.full_epochs is None:
            return 2 * epochs // 3 if self.dpq is not None and self._queries_are_vectors(self.dpq) else 0
        return self.full_epochs

    def _queries_are_vectors(self, dpq: DPQConfig) -> bool:
        all_tables = (dpq, *(with_own(dpq, own) for own in self.per_table.values()))
        return all(own.key_dim is None or own.key_dim == own.subspace_dim(self.embedding_dim) for own in all_tables)


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions:
    """Optimisation: how it learns, and for how long.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric; none goes on to the last one.
        batch_size: examples a rank takes per step; fewer where an epoch would have under 20 steps.
        optimizer: of plain tables and of queries, fused into the backward pass; adam wants CUDA.
        learning_rate: of that optimizer; 0.1 suits the two Adagrads (0.2 where it falls), 0.003 adam, more than 1 sgd.
        dense_learning_rate: of all other weights (Adam).
        value_rate: what dense_learning_rate is multiplied by for keys and values of DPQ tables. Adam's steps are as
            long as its rate, and values of late residual levels are short: 0.03 suits levels that k-means has placed.
        quantized_rate: what all rates are multiplied by after the full epochs: the less a row moves, the less often it
            changes its codes.
        rate_decay: all rates stay, or fall linearly to 0, over all steps of all epochs or, late, over the last third.
    """

    epochs: int = 20
    patience: int | None = 3
    batch_size: int = 4096
    optimizer: Literal["rowwise-adagrad", "adagrad", "sgd", "adam"] = "rowwise-adagrad"
    learning_rate: float = 0.1
    dense_learning_rate: float = 0.003
    value_rate: float = 1.0
    quantized_rate: float = 1.0
    rate_decay: Literal["none", "linear", "late"] = "none"

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "patience", "batch_size")
        check_positive(self, "learning_rate", "dense_learning_rate", "value_rate", "quantized_rate")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Run: where it goes and on what.

    Attributes:
        out: folder of the run: metrics.json, artifact/, model.safetensors, checkpoints/, tensorboard/.
        seed: of everything random.
        device: auto takes CUDA where present.
    """

    out: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("--out is missing")
        if self.seed < 0:
            raise ConfigError(f"--seed: got {self.seed}, want 0 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Attributes:
        recipe: what is trained: a name in `training.recipes`.
        data: what is read.
        model: the recipe's own options.
        embedding: the tables.
        optimisation: how it learns.
        run: where it goes and on what.
    """

    recipe: str
    data: DataOptions | TextOptions | DocumentOptions
    model: ModelOptions
    embedding: EmbeddingOptions
    optimisation: OptimisationOptions | LanguageModelOptimisation | ClassifierOptimisation
    run: RunOptions

    def __post_init__(self) -> None:
        wanted = groups_of(self.recipe) if self.recipe in MODEL_OPTIONS else {}
        if not wanted or not all(isinstance(getattr(self, name), kind) for name, kind in wanted.items()):
            got = f"{self.recipe!r} with {', '.join(type(getattr(self, name)).__name__ for name in _GROUPS)}"
            raise ConfigError(f"recipe: got {got}; want one of {', '.join(MODEL_OPTIONS)} with its own options")
        if self.full_epochs >= self.optimisation.epochs:
            got = f"{self.full_epochs} of {self.optimisation.epochs} epochs"
            raise ConfigError(f"--full-epochs: got {got}; want fewer than --epochs, or no table is ever quantized")
        if isinstance(self.model, TwoTowerOptions) and isinstance(self.data, DataOptions):
            self._check_two_tower(self.model, self.data)

    def _check_two_tower(self, model: TwoTowerOptions, data: DataOptions) -> None:
        if data.features:
            reason = "two-tower has no layer after its tables that they could enter; dlrm takes them"
            raise ConfigError(f"--features: got {','.join(data.features)}; {reason}")
        drawn = model.num_negatives or 0
        if model.negatives != "in-batch" and drawn > self.optimisation.batch_size:
            got = f"{drawn} negatives, a batch of {self.optimisation.batch_size}"
            raise ConfigError(f"--num-negatives: got {got}; want at most as many as the batch")

    @property
    def full_epochs(self) -> int:
        """How many epochs train without quantizing, before those that do."""
        return self.embedding.full_epochs_of(self.optimisation.epochs)

    @property
    def is_refit(self) -> bool:
        """Whether the validation split trains, so that no epoch is chosen by it and the last one is kept."""
        return isinstance(self.data, DataOptions) and self.data.refit

    def as_dict(self) -> dict[str, Any]:
        """Every setting, as metrics.json holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunConfig:
        """The configuration that `as_dict` gave, also after JSON.

        Raises:
            ConfigError: something is missing or no option, of another type, or makes no sense.
        """
        recipe = content.get("recipe")
        if recipe not in MODEL_OPTIONS:
            raise ConfigError(f"recipe: got {recipe!r}, want one of {', '.join(MODEL_OPTIONS)}")
        groups = groups_of(recipe)
        if set(content) != {"recipe", *groups}:
            raise ConfigError(f"configuration: got {', '.join(content)}; want recipe, {', '.join(groups)}")
        built: dict[str, Any] = {name: flags.build(kind, content[name], f"{name}.") for name, kind in groups.items()}
        return cls(recipe=recipe, **built)


_GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": TwoTowerOptions,
    "embedding": EmbeddingOptions,
    "optimisation": OptimisationOptions,
    "run": RunOptions,
}
_OWN_GROUPS: dict[str, dict[str, type]] = {
    "language-model": {"data": TextOptions, "optimisation": LanguageModelOptimisation},
    "text-classification": {"data": DocumentOptions, "optimisation": ClassifierOptimisation},
}


def groups_of(recipe: str) -> dict[str, type]:
    """Name of each group of a recipe's options -> its class."""
    return {**_GROUPS, **_OWN_GROUPS.get(recipe, {}), "model": MODEL_OPTIONS[recipe]}


def options_of(recipe: str) -> list[flags.Option]:
    """Every option that a recipe has, group by group."""
    return [option for name, kind in groups_of(recipe).items() for option in flags.options(kind, (name,))]


def value_of(content: Mapping[str, Any], option: flags.Option) -> Any:
    """An option's value in what `as_dict` gave; where that has no DPQ, the default of what is DPQ's."""
    value: Any = content
    for name in option.path:
        value = (value if value is not None else dataclasses.asdict(DPQConfig()))[name]
    return value


def with_changes(content: Mapping[str, Any], changes: Mapping[str, Any]) -> RunConfig:
    """The configuration that `as_dict` gave, with other values for some flags.

    Raises:
        ConfigError: a flag that makes no sense there.
    """
    config: dict[str, Any] = copy.deepcopy(dict(content))
    by_flag = {option.flag: option for option in options_of(config["recipe"])}
    kind = changes.get("embedding", config["embedding"]["kind"])
    of_dpq = [flag for flag in changes if by_flag[flag].path[1] == "dpq" or (flag == "per-table" and changes[flag])]
    if kind == "full" and of_dpq:
        raise ConfigError(f"--{of_dpq[0]}: --embedding full has plain tables, without such an option; leave it out")
    method = METHODS.get(str(kind))
    before = {**(config["embedding"]["dpq"] or {}), "method": method}
    given = {by_flag[flag].path[-1]: value for flag, value in changes.items() if by_flag[flag].path[1] == "dpq"}
    config["embedding"]["dpq"] = None if method is None else drop_inapplicable(before, given)
    if kind == "full":
        config["embedding"]["per_table"] = {}
    for flag, value in changes.items():
        *above, name = by_flag[flag].path
        group = config
        for each in above:
            group = group[each]
        group[name] = value
    return RunConfig.from_dict(config)
