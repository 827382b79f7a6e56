"""Recipe language-model: its options, checked, and its defaults. The model is in `training.models.language_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from dpq_rec import ConfigError, DPQConfig
from training.config import EmbeddingOptions, OptimisationOptions, RunConfig, RunOptions
from training.options import Options, check_path, check_positive, check_share

LanguageModelConfig: TypeAlias = "RunConfig[TextOptions, LanguageModelOptions, LanguageModelOptimisation]"
_ONE_SGD = "language-model clips and moves all its weights together, by SGD"


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Data: a folder of text.

    Attributes:
        path: folder of files with train, valid and test in their names, as .txt, .gz or .xz; every line is a sentence.
    """

    path: str = field(metadata={"flag": "data"})

    def __post_init__(self) -> None:
        check_path(self.path)


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions(Options):
    """Model language-model: the LSTM of Zaremba et al. (2014); the defaults are its small configuration.

    Attributes:
        num_layers: layers of the LSTM.
        hidden_dim: width of a layer.
        num_steps: words that a gradient goes back through.
        init_scale: weights start uniform between minus and plus this, biases at 0.
        query_scale: the same of the queries of a DPQ table: the smaller, the sooner a step changes a code.
        value_scale: the same of its keys and values.
        dropout: share of the inputs of each layer, and of the last one's outputs, that a step leaves out.
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "optimizer": _ONE_SGD,
        "dense-learning-rate": _ONE_SGD,
        "num-negatives": "language-model tells a word from all others, and draws none",
    }

    num_layers: int = 2
    hidden_dim: int = 200
    num_steps: int = 20
    init_scale: float = 0.1
    query_scale: float = 0.03
    value_scale: float = 0.5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "num_layers", "hidden_dim", "num_steps", "init_scale", "query_scale", "value_scale")
        check_share(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptimisation(OptimisationOptions):
    """Optimisation: SGD over all weights together, tables too, the gradient's norm being clipped.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric; none disables early stopping.
        batch_size: parts of the text that are read side by side, divided among the ranks.
        learning_rate: of the first epochs, for the loss summed over the steps.
        value_rate: multiplies the learning rate for keys and values of a DPQ table: each of them is part of the vectors
            of many words, and gets the gradients of all.
        full_rate_epochs: epochs before the learning rate falls.
        rate_decay: each epoch after them multiplies the learning rate of the one before by this.
        clip_norm: the largest norm of the gradient of all weights together.
    """

    epochs: int = 13
    patience: int | None = 13
    batch_size: int = 20
    learning_rate: float = 1.0
    value_rate: float = 0.005
    full_rate_epochs: int = 4
    rate_decay: float = 0.5
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "value_rate", "rate_decay", "clip_norm")
        if self.full_rate_epochs < 0:
            raise ConfigError(f"--full-rate-epochs: got {self.full_rate_epochs}, want 0 or more")

    def rate_factor(self, step: int, steps_per_epoch: int, full_epochs: int) -> float:
        """See `OptimisationOptions.rate_factor`."""
        epoch = step // steps_per_epoch + 1
        return float(self.rate_decay ** max(0, epoch - self.full_rate_epochs))


def language_model(data: str, out: str) -> LanguageModelConfig:
    """Language model: how likely is each word of a text after those before it.

    The LSTM of Zaremba et al. (2014), whose input embedding is the table; the output layer has weights of its own.
    Measured by perplexity over all words of a split, read as one text. The data are a folder of text files.
    """
    dpq = DPQConfig(method="sx", num_subspaces=25, num_codes=8, share_subspaces=True)
    return RunConfig(
        recipe="language-model",
        data=TextOptions(path=data),
        model=LanguageModelOptions(),
        embedding=EmbeddingOptions(kind="dpq-sx", embedding_dim=200, dpq=dpq),
        optimisation=LanguageModelOptimisation(),
        run=RunOptions(out=out),
    )
