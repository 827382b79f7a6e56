"""What can be trained. In: a recipe's name, and flags to change. Out: a RunConfig.

A recipe is a function that returns the configuration it starts with, for any data and any folder; every value in it can
be changed by a flag.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpq_rec import ConfigError, DPQConfig
from training.config import (
    EmbeddingOptions,
    OptimisationOptions,
    RunConfig,
    RunOptions,
)
from training.interaction_options import DataOptions, DLRMOptions, TwoTowerOptions
from training.text_options import (
    ClassifierOptimisation,
    ClassifierOptions,
    DocumentOptions,
    LanguageModelOptimisation,
    LanguageModelOptions,
    TextOptions,
)

ANYWHERE = "."  # a place that exists, for configurations whose data are not known yet


def two_tower(data: str, out: str) -> RunConfig:
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
        # At half the rates tables are quantized with less noise: Gowalla's validation, in README.md.
        optimisation=OptimisationOptions(
            patience=None, learning_rate=0.2, rate_decay="late", value_rate=0.03, quantized_rate=0.5
        ),
        run=RunOptions(out=out),
    )


def dlrm(data: str, out: str) -> RunConfig:
    """Click-through: how likely is the label of a user, an item and their features to be 1.

    Ids and categorical features are tables, lists are averaged, dense features are standardised by the training split.
    Measured by AUC and normalised entropy. The data have a column `label` of 0 and 1.
    """
    return RunConfig(
        recipe="dlrm",
        data=DataOptions(path=data),
        model=DLRMOptions(),
        embedding=EmbeddingOptions(embedding_dim=32, dpq=DPQConfig(method="vq", num_subspaces=16, num_codes=32)),
        optimisation=OptimisationOptions(batch_size=1024, learning_rate=0.02, dense_learning_rate=0.001),
        run=RunOptions(out=out),
    )


def language_model(data: str, out: str) -> RunConfig:
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


def text_classification(data: str, out: str) -> RunConfig:
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
        optimisation=ClassifierOptimisation(),
        run=RunOptions(out=out),
    )


RECIPES: dict[str, Callable[[str, str], RunConfig]] = {
    "two-tower": two_tower,
    "dlrm": dlrm,
    "language-model": language_model,
    "text-classification": text_classification,
}


def load(path: str) -> dict[str, Any]:
    """The configuration of a run that was, from its metrics.json, for `with_changes`; not checked yet.

    What it lacks has the recipe's default: options that came later, and DPQ's where tables were plain.

    Raises:
        ConfigError: the file holds none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # an editor may have put a mark before it
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}; want a run's metrics.json") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(f"--config: {path} holds no configuration; want a run's metrics.json")
    recipe = content["config"].get("recipe")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConfigError(f"--config: {path} is of recipe {recipe!r}; want {', '.join(RECIPES)}")
    return _completed(content["config"], RECIPES[recipe](ANYWHERE, "run").as_dict(), f"--config: {path}: ")


def _completed(given: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """Options as given, groups of them too, and the defaults of those that are not there."""
    completed = {**defaults, **given}
    for name, default in defaults.items():
        if name == "dpq" and completed[name] is None and completed.get("kind") == "full":
            completed[name] = default
        elif isinstance(default, dict):
            if not isinstance(completed[name], dict):
                raise ConfigError(f"{where}{name}: got {completed[name]!r}, want a group of options")
            completed[name] = _completed(completed[name], default, f"{where}{name}.")
        elif isinstance(completed[name], dict):
            raise ConfigError(f"{where}{name}: got {completed[name]!r}, want one value")
    return completed
