"""Recipe text-classification: its options, checked, and its defaults. `training.models` trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from dpq_rec import ConfigError, DPQConfig
from training.config import EmbeddingOptions, OptimisationOptions, RunConfig, RunOptions
from training.options import Options, check_path, check_positive, check_share

ClassifierConfig: TypeAlias = "RunConfig[DocumentOptions, ClassifierOptions, OptimisationOptions]"
_ONE_ADAM = "text-classification moves all its weights alike, by Adam"


@dataclass(frozen=True, kw_only=True)
class DocumentOptions(Options):
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
        check_path(self.path)
        check_positive(self, "min_count", "max_words")
        if self.text == self.label:
            raise ConfigError(f"--label-column: got {self.label}, which is the text; want another column")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Options):
    """Model text-classification: one hidden layer over the mean of a document's word vectors.

    Attributes:
        hidden_dim: width of the hidden layer.
        dropout: share of the mean and of the hidden layer that a step leaves out.
        word_dropout: share of the documents' words that a step leaves out.
    """

    lacks: ClassVar[Mapping[str, str]] = {"optimizer": _ONE_ADAM, "dense-learning-rate": _ONE_ADAM}

    hidden_dim: int = 300
    dropout: float = 0.7
    word_dropout: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "hidden_dim")
        check_share(self, "dropout", "word_dropout")


def text_classification(data: str, out: str) -> ClassifierConfig:
    """Text classification: which of several labels a document has.

    One hidden layer over the mean of the vectors of its words (much as Joulin et al., 2017), which are the table.
    Measured by accuracy. The data are Parquet files with a text and a label.
    """
    dpq = DPQConfig(method="sx", num_subspaces=100, num_codes=32, share_subspaces=True)
    return RunConfig(
        recipe="text-classification",
        data=DocumentOptions(path=data),
        model=ClassifierOptions(),
        embedding=EmbeddingOptions(kind="dpq-sx", embedding_dim=300, dpq=dpq),
        optimisation=OptimisationOptions(),
        run=RunOptions(out=out),
    )
