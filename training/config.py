"""Configuration of a run: RunConfig. Checked once, here; the whole of it is in metrics.json and enough to run again.

A RunConfig has five groups of options. Those of the tables and of the run are here; a recipe (`training.recipes`)
brings its own for the data, the model and the optimisation. Each option is a flag of `python -m training RECIPE`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.sizing import choose_layout
from training.options import Options, check_positive, from_text, options_of, typed

_logger = logging.getLogger(__name__)
METHODS: dict[str, Literal["sx", "vq"]] = {"dpq-sx": "sx", "dpq-vq": "vq"}
_SIZES = ("num_subspaces", "num_codes", "num_levels", "tiers", "values_dtype")  # target_ratio chooses them
_CHOSEN = "--target-ratio chooses it for each table by its rows"
DataT = TypeVar("DataT")
ModelT = TypeVar("ModelT", bound=Options)
OptimisationT = TypeVar("OptimisationT", bound="OptimisationOptions")


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(Options):
    """Embedding: the tables, plain or compressed.

    Attributes:
        kind: plain tables, or DPQ by softmax (dpq-sx) or by centroids (dpq-vq).
        embedding_dim: E, width of a vector.
        target_ratio: how many times smaller each table becomes, codes and values together: chooses num_subspaces,
            num_codes and num_levels for each by its rows, and fp16 values; none leaves them as they are. A table that
            is too small for it stays plain.
        dpq: how tables are quantized; None where they are plain.
        per_table: DPQ options that differ for some tables, each as its own flag takes it, with blanks between them:
            'item_id.num_levels=44 item_id.tiers=0.05:32,0.2:16'.
        start: keys and values begin uniformly, or as the k-means centroids of the queries they stand for.
        full_epochs: warm-up: train for so many epochs without quantizing, as plain tables do; after it keys and values
            begin as k-means centroids. none is two thirds of the epochs, where queries are as wide as vectors.
    """

    kind: Literal["full", "dpq-sx", "dpq-vq"] = field(default="dpq-vq", metadata={"flag": "embedding"})
    embedding_dim: int = 64
    target_ratio: float | None = None
    dpq: DPQConfig | None = field(
        default_factory=lambda: DPQConfig(method="vq"),
        metadata={"renamed": {"method": "", "temperature": "dpq-temperature"}},
    )
    per_table: dict[str, dict[str, Any]] = field(default_factory=dict)  # table -> option -> value
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
        if self.per_table and self.dpq is None:
            raise ConfigError("--per-table: --embedding full has plain tables, without such options; leave it out")
        own = {name: self._checked_own(f"--per-table: {name}.", each) for name, each in self.per_table.items()}
        object.__setattr__(self, "per_table", own)  # the same of a flag and of JSON
        if self.dpq is not None and self.target_ratio is None:
            self.dpq.query_dim(self.embedding_dim)
        self._check_full_epochs()

    def _check_target_ratio(self) -> None:
        if self.target_ratio is None:
            return
        check_positive(self, "target_ratio")
        got = f"--target-ratio: got {self.target_ratio:g} with"
        if self.dpq is None:
            raise ConfigError(f"{got} --embedding full, which has nothing to choose; leave it out")
        if self.dpq.key_dim is not None:
            raise ConfigError(f"{got} --key-dim {self.dpq.key_dim}, which has no levels to choose from")
        if self.dpq.tiers:
            raise ConfigError(f"{got} --tiers, whose levels it would choose")

    def _checked_own(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a table has of its own, of JSON or as texts that their flags take, as DPQConfig has them."""
        kinds, own = {option.path[0]: option.kind for option in options_of(DPQConfig)}, dict[str, Any]()
        for name, value in given.items():
            if name == "method":
                raise ConfigError(f"{where}method: --embedding says it for all tables; leave it out")
            if self.target_ratio is not None and name in _SIZES:
                raise ConfigError(f"{where}{name}: {_CHOSEN}; leave it out")
            if name not in kinds:
                raise ConfigError(f"{where}{name}: there is no such option; want some of {', '.join(kinds)}")
            try:
                read = from_text(kinds[name], value) if isinstance(value, str) else value
            except ValueError as error:
                raise ConfigError(f"{where}{name}: got {value!r}, want what its flag takes") from error
            own[name] = typed(kinds[name], read, f"{where}{name}")
        try:
            self._with(own).query_dim(self.embedding_dim)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        return own

    def _check_full_epochs(self) -> None:
        if self.full_epochs is None:
            return
        got = f"--full-epochs: got {self.full_epochs}"
        if self.full_epochs < 0:
            raise ConfigError(f"{got}, want 0 or more")
        if self.full_epochs and self.dpq is None:
            raise ConfigError(f"{got} with --embedding full, whose epochs all are; leave it out")
        if self.full_epochs and self.dpq is not None and not self._queries_are_vectors():
            reason = "queries have to be as wide as vectors to take their place"
            raise ConfigError(f"{got} with --key-dim {self.dpq.key_dim}: {reason}")

    @classmethod
    def useless_flags(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """See `Options.useless_flags`."""
        found = {}
        if values["target-ratio"] is not None:
            found = {name.replace("_", "-"): _CHOSEN for name in _SIZES}
        if values["embedding"] == "full":
            found["value-rate"] = "plain tables have no keys and values"
        has_default_warm_up = values["full-epochs"] is None and values["key-dim"] is None
        if values["full-epochs"] or (has_default_warm_up and values["start-from"] == "uniform"):
            found["start-from"] = "after --full-epochs keys and values always begin as k-means centroids"
        return found

    def dpq_of(self, name: str, num_embeddings: int) -> DPQConfig | None:
        """How a table of so many rows is quantized, if it is; None where tables are plain.

        Raises:
            ConfigError: the table cannot become as small as target_ratio asks.
        """
        if self.dpq is None:
            return None
        own = self._with(self.per_table.get(name, {}))
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
            ConfigError: no table can become as small as target_ratio asks; or one cannot, with quantize_small; or
                per_table names a table that is not there.
        """
        if unknown := sorted(set(self.per_table) - set(num_embeddings)):
            raise ConfigError(f"--per-table: got table {', '.join(unknown)}; the tables: {', '.join(num_embeddings)}")
        found, reasons = dict[str, DPQConfig | None](), dict[str, str]()
        for name, rows in num_embeddings.items():
            try:
                found[name] = config = self.dpq_of(name, rows)
                why = config and config.why_plain(rows, self.embedding_dim)
            except ConfigError as error:
                if self._with(self.per_table.get(name, {})).quantize_small:
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

    def full_epochs_of(self, epochs: int) -> int:
        """How many of a run's epochs come before tables are quantized; 0 of plain tables."""
        if self.full_epochs is None:
            return 2 * epochs // 3 if self.dpq is not None and self._queries_are_vectors() else 0
        return self.full_epochs

    def _queries_are_vectors(self) -> bool:
        all_tables = (self._with({}), *map(self._with, self.per_table.values()))
        return all(own.key_dim is None or own.key_dim == own.subspace_dim(self.embedding_dim) for own in all_tables)

    def _with(self, own: Mapping[str, Any]) -> DPQConfig:
        """How a table with options of its own is quantized."""
        assert self.dpq is not None, "plain tables have none"
        return dataclasses.replace(self.dpq, **own) if own else self.dpq


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions(Options):
    """Optimisation: Adam over all weights, tables too.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric; none disables early stopping.
        batch_size: examples of a step, divided among the ranks.
        learning_rate: of Adam.
    """

    epochs: int = 15
    patience: int | None = 3
    batch_size: int = 64
    learning_rate: float = 0.001

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "patience", "batch_size", "learning_rate")

    def rate_factor(self, step: int, steps_per_epoch: int, full_epochs: int) -> float:
        """What all learning rates are multiplied by in a step: a function of it alone, so that a checkpoint needs none.

        Args:
            step: steps of the whole run before it.
            steps_per_epoch: of this run.
            full_epochs: of the warm-up.
        """
        return 1.0


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
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
class RunConfig(Generic[DataT, ModelT, OptimisationT]):
    """One training run.

    Attributes:
        recipe: what is trained: a name in `training.recipes.RECIPES`.
        data: what is read.
        model: the recipe's own options.
        embedding: the tables.
        optimisation: how it learns.
        run: where it goes and on what.
    """

    recipe: str
    data: DataT
    model: ModelT
    embedding: EmbeddingOptions
    optimisation: OptimisationT
    run: RunOptions

    def __post_init__(self) -> None:
        if self.full_epochs >= self.optimisation.epochs:
            got = f"{self.full_epochs} of {self.optimisation.epochs} epochs"
            raise ConfigError(f"--full-epochs: got {got}; want fewer than --epochs, or no table is ever quantized")
        self.model.check_run(self)

    @property
    def full_epochs(self) -> int:
        """Epochs of the warm-up, which train without quantizing, before those that do."""
        return self.embedding.full_epochs_of(self.optimisation.epochs)

    def as_dict(self) -> dict[str, Any]:
        """Every setting, as metrics.json holds it."""
        return dataclasses.asdict(self)
