"""Flags that mean nothing where they were given. In: a recipe, its starting configuration, flags. Out: ConfigErrors.

Only flags that were given count: a configuration holds a value for every option, also for those without a use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpq_rec import ConfigError
from training.config import RunConfig, options_of
from training.flags import Option
from training.interaction_options import SYNTHETIC

_ONE_SGD = "language-model clips and moves all its weights together, by SGD"
_ONE_ADAM = "text-classification moves all its weights alike, by Adam"
_REASONS_OF_FLAGS = {  # of the recipe, and the flag that it has not
    ("language-model", "optimizer"): _ONE_SGD,
    ("language-model", "dense-learning-rate"): _ONE_SGD,
    ("language-model", "num-negatives"): "language-model tells a word from all others, and draws none",
    ("text-classification", "optimizer"): _ONE_ADAM,
    ("text-classification", "dense-learning-rate"): _ONE_ADAM,
}
_REASONS = {  # of the recipe, and the one whose option it has not
    ("dlrm", "two-tower"): "dlrm scores a pair by itself and has labels: it draws no items and compares no two vectors",
    ("two-tower", "dlrm"): "two-tower has no layer after its tables",
}
_OF_GENERATED = ("num-users", "num-items", "num-interactions", "string-ids")


def options_of_others(recipe: str, recipes: Iterable[str]) -> dict[str, list[str]]:
    """Flag -> the other recipes that have it, where the recipe itself has not."""
    own, found = {option.flag for option in options_of(recipe)}, dict[str, list[str]]()
    for other in recipes:
        for option in options_of(other):
            if option.flag not in own:
                found.setdefault(option.flag, []).append(other)
    return found


def refuse_options_of_others(recipe: str, recipes: Iterable[str], flags: Mapping[str, Any]) -> None:
    """Raises ConfigError for a flag that other recipes have."""
    for flag, owners in options_of_others(recipe, recipes).items():
        if flag in flags:
            known = [_REASONS_OF_FLAGS.get((recipe, flag)), *(_REASONS.get((recipe, each)) for each in owners)]
            reason = next(filter(None, known), "")
            why = f": {reason}" if reason else f", and {recipe} has none such"
            raise ConfigError(f"--{flag} is an option of {' and '.join(owners)}{why}; leave it out")


def refuse_quantized_rate(config: RunConfig, flags: Mapping[str, Any]) -> None:
    """Raises ConfigError for a rate after the full epochs where there are none.

    Args:
        config: what all flags together make.
        flags: those that were given.
    """
    if "quantized-rate" in flags and not config.full_epochs:
        plain = config.embedding.dpq is None
        reason = "plain tables never are quantized" if plain else "without full epochs tables are from the start"
        raise ConfigError(f"--quantized-rate: {reason}; leave it out")


def refuse_meaningless(options: Iterable[Option], values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raises ConfigError for a flag without a use beside other options.

    Args:
        options: the recipe's.
        values: of all options, by flag.
        flags: those that were given.
    """
    names = {option.flag for option in options}
    wrong: dict[str, str] = {}
    if values["data"] != SYNTHETIC:
        wrong |= dict.fromkeys(_OF_GENERATED, f"--data {values['data']} is read, not generated")
    if values.get("vocabulary") == "modulo":
        reason = "with --vocabulary modulo all ids share --num-buckets rows"
        wrong |= dict.fromkeys(("min-count", "rare-buckets"), reason)
        wrong["tiers"] = "with --vocabulary modulo rows are not sorted by frequency"
    negatives = values.get("negatives")
    if negatives == "in-batch":
        wrong["num-negatives"] = "--negatives in-batch draws none"
    if negatives == "uniform":
        wrong["log-q"] = "with --negatives uniform all candidates are as likely, and it cancels out"
    if values.get("target-ratio") is not None:
        reason = "--target-ratio chooses it for each table by its rows"
        wrong |= dict.fromkeys(("num-subspaces", "num-codes", "num-levels", "tiers", "values-dtype"), reason)
    if values.get("refit"):
        wrong["patience"] = "with --refit the validation split trains, and no run ends before --epochs"
    if values.get("embedding") == "full":
        wrong["value-rate"] = "plain tables have no keys and values"
    is_phased_by_default = values.get("full-epochs", 0) is None and values.get("key-dim") is None
    if values.get("full-epochs") or (is_phased_by_default and flags.get("start-from") == "uniform"):
        wrong["start-from"] = "after --full-epochs keys and values always begin as k-means centroids"
    for flag, reason in wrong.items():
        if flag in names and flag in flags:
            raise ConfigError(f"--{flag}: {reason}; leave it out")
