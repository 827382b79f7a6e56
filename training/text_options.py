"""What the recipes over text can be told. In: values of flags. Out: their groups of options, checked.

As in `training.config`, of which these are the groups that other recipes have not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpq_rec import ConfigError
from training.flags import check_positive


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Data: a folder of text.

    Attributes:
        path: folder of files with train, valid and test in their names, as .txt, .gz or .xz; every line is a sentence.
    """

    path: str = field(metadata={"flag": "data"})

    def __post_init__(self) -> None:
        check_text_path(self.path)


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
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
class LanguageModelOptimisation:
    """Optimisation: SGD over all weights together, tables too, the gradient's norm being clipped.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric.
        batch_size: stretches of the text that are read side by side, shared out over the ranks.
        learning_rate: of the first epochs, for the loss summed over the steps.
        value_rate: what the learning rate is multiplied by for keys and values of a DPQ table: each of them is part of
            the vectors of many words, and gets the gradients of all.
        full_rate_epochs: epochs before the learning rate falls.
        rate_decay: each epoch after them takes the learning rate of the one before times this.
        clip_norm: the largest norm of the gradient of all weights together.
    """

    epochs: int = 13
    patience: int = 13
    batch_size: int = 20
    learning_rate: float = 1.0
    value_rate: float = 0.005
    full_rate_epochs: int = 4
    rate_decay: float = 0.5
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "patience", "batch_size")
        check_positive(self, "learning_rate", "value_rate", "rate_decay", "clip_norm")
        if self.full_rate_epochs < 0:
            raise ConfigError(f"--full-rate-epochs: got {self.full_rate_epochs}, want 0 or more")

    def rate_of(self, epoch: int) -> float:
        """The learning rate of an epoch, the first being 1."""
        return self.learning_rate * self.rate_decay ** max(0, epoch - self.full_rate_epochs)


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Data: documents with labels.

    Attributes:
        path: Parquet file or folder of them, with train and test in their names or a column split (0, 1, 2).
        text: column of the documents' text.
        label: column of their labels, integers or strings.
        min_count: words that occur less often in the training split have no row.
        max_words: rows at most, for the words that occur most.
    """

    path: str = field(metadata={"flag": "data"})
    text: str = field(default="text", metadata={"flag": "text-column"})
    label: str = field(default="label", metadata={"flag": "label-column"})
    min_count: int = 2
    max_words: int = 1_000_000

    def __post_init__(self) -> None:
        check_text_path(self.path)
        check_positive(self, "min_count", "max_words")
        if self.text == self.label:
            raise ConfigError(f"--label-column: got {self.label}, which is the text; want another column")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Model text-classification: one hidden layer over the mean of a document's word vectors.

    Attributes:
        hidden_dim: width of the hidden layer.
        dropout: share of the mean and of the hidden layer that a step leaves out.
        word_dropout: share of the documents' words that a step leaves out.
    """

    hidden_dim: int = 300
    dropout: float = 0.7
    word_dropout: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "hidden_dim")
        check_share(self, "dropout", "word_dropout")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptimisation:
    """Optimisation: Adam over all weights, tables too.

    Attributes:
        epochs: passes over the training split, at most.
        patience: stop after so many epochs without a better validation metric.
        batch_size: documents of a step, shared out over the ranks.
        learning_rate: of Adam.
    """

    epochs: int = 15
    patience: int = 3
    batch_size: int = 64
    learning_rate: float = 0.001

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "patience", "batch_size", "learning_rate")


def check_text_path(path: str) -> None:
    """Raises ConfigError where no text can be read."""
    if not path:
        raise ConfigError("--data is missing")
    if not Path(path).exists():
        reason = ": only interactions can be generated" if path == "synthetic" else ""
        raise ConfigError(f"--data: {path} does not exist{reason}")


def check_share(options: Any, *names: str) -> None:
    """Raises ConfigError for a share to be left out that leaves nothing."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            got = f"--{name.replace('_', '-')}: got {getattr(options, name)}"
            raise ConfigError(f"{got}, want 0 or more and less than 1")
