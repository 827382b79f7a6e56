"""The recipes, and how one becomes a configuration. In: a recipe's name, and flags to change. Out: a RunConfig.

A recipe is a function that returns the configuration it starts with, for any data and any folder; every value in it can
be changed by a flag. Its groups of options are those of that configuration. Nothing here imports torch, so that
`--help` is quick: what trains a recipe is in `training.models`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.config import drop_inapplicable
from training.config import METHODS, RunConfig
from training.options import Option, Options, build, options_of
from training.recipes.dlrm import dlrm
from training.recipes.language_model import language_model
from training.recipes.text_classification import text_classification
from training.recipes.two_tower import two_tower

RECIPES: dict[str, Callable[[str, str], RunConfig]] = {
    "two-tower": two_tower,
    "dlrm": dlrm,
    "language-model": language_model,
    "text-classification": text_classification,
}


def default_config(recipe: str) -> RunConfig:
    """The configuration that a recipe starts with, of data and a folder that are not known yet."""
    return RECIPES[recipe](".", "run")


def groups_of(recipe: str) -> dict[str, type[Options]]:
    """Name of each group of a recipe's options -> its class."""
    start = default_config(recipe)
    names = [field.name for field in dataclasses.fields(start) if field.name != "recipe"]
    return {name: type(getattr(start, name)) for name in names}


def flags_of(recipe: str) -> dict[str, Option]:
    """Flag -> option, of every option that a recipe has, group by group."""
    return {option.flag: option for name, kind in groups_of(recipe).items() for option in options_of(kind, (name,))}


def value_of(content: Mapping[str, Any], option: Option) -> Any:
    """An option's value in what `RunConfig.as_dict` gave; where that has no DPQ, the default of what is DPQ's."""
    value: Any = content
    for name in option.path:
        value = (value if value is not None else dataclasses.asdict(DPQConfig()))[name]
    return value


def from_dict(content: Mapping[str, Any]) -> RunConfig:
    """The configuration that `RunConfig.as_dict` gave, also after JSON.

    Raises:
        ConfigError: something is missing or no option, of another type, or makes no sense.
    """
    recipe = content.get("recipe")
    if recipe not in RECIPES:
        raise ConfigError(f"recipe: got {recipe!r}, want one of {', '.join(RECIPES)}")
    groups = groups_of(recipe)
    if set(content) != {"recipe", *groups}:
        raise ConfigError(f"configuration: got {', '.join(content)}; want recipe, {', '.join(groups)}")
    built: dict[str, Any] = {name: build(kind, content[name], f"{name}.") for name, kind in groups.items()}
    return RunConfig(recipe=recipe, **built)


def with_changes(content: Mapping[str, Any], changes: Mapping[str, Any]) -> RunConfig:
    """The configuration that `RunConfig.as_dict` gave, with other values for some flags.

    Raises:
        ConfigError: a flag that makes no sense there.
    """
    config: dict[str, Any] = copy.deepcopy(dict(content))
    flags = flags_of(config["recipe"])
    embedding, kind = config["embedding"], changes.get("embedding", config["embedding"]["kind"])
    of_dpq = {flags[flag].path[-1]: value for flag, value in changes.items() if flags[flag].path[1] == "dpq"}
    if kind == "full":
        for flag, value in changes.items():
            if flags[flag].path[1] == "dpq" or (flag == "per-table" and value):
                raise ConfigError(f"--{flag}: --embedding full has plain tables, without such an option; leave it out")
        embedding["per_table"] = {}
    method = METHODS.get(str(kind))
    before = {**(embedding["dpq"] or {}), "method": method}
    embedding["dpq"] = None if method is None else drop_inapplicable(before, of_dpq)
    for flag, value in changes.items():
        *above, name = flags[flag].path
        group = config
        for each in above:
            group = group[each]
        group[name] = value
    return from_dict(config)


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
    return _completed(content["config"], default_config(recipe).as_dict(), f"--config: {path}: ")


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
