"""The command line of a run. In: arguments. Out: a RunConfig, or what is wrong with them.

tyro makes flags of the groups of options, and help of their docstrings.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dpq_rec import ConfigError
from training.config import RunConfig
from training.options import from_text, to_text, typed, without_none
from training.recipes import RECIPES, default_config, flags_of, groups_of, load, value_of, with_changes

PROGRAM = "python -m training"
EXAMPLES = """examples:
  torchrun --nproc-per-node 2 -m training two-tower --data interactions/ --out runs/dpq
  torchrun --nproc-per-node 2 -m training two-tower --data interactions/ --out runs/full --embedding full
  torchrun --nproc-per-node 2 -m training two-tower --data synthetic --num-users 1000000 --out runs/big
  torchrun --nproc-per-node 2 -m training dlrm --data clicks/ --features age,genres --out runs/clicks
  torchrun --nproc-per-node 2 -m training language-model --data text/ --out runs/words
  torchrun --nproc-per-node 2 -m training text-classification --data news/ --out runs/news
  torchrun --nproc-per-node 2 -m training --config runs/dpq/metrics.json --out runs/again

A run that was killed goes on where it stood when it is started again with the same --out; with torchrun's
--max-restarts it does so by itself. TensorBoard shows how a run goes: tensorboard --logdir runs"""
_CONFIG_HELP = "metrics.json of another run: begin with its configuration; give --out too"


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: settings that make no sense.
        SystemExit: 2, with a message on stderr, for usage errors; 0 for --help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    recipe = given.pop(0) if given and not given[0].startswith("-") else None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")  # the defaults of all other flags
    path = early.parse_known_args(given)[0].config
    before = None if path is None else load(path)
    if recipe is None and before is None and (not given or {"-h", "--help"} & set(given)):
        sys.stdout.write(_overview())
        sys.exit(0)
    name = recipe or (before or {}).get("recipe")
    if name not in RECIPES:
        raise ConfigError(f"got {name or given[0]}; the recipe comes first, one of {', '.join(RECIPES)}")
    if before is not None and name != before["recipe"]:
        raise ConfigError(f"--config: got a run of {before['recipe']}, and the recipe {name}; want the same")
    flags = _given_flags(name, before, given)
    start = before or default_config(name).as_dict()
    _check_useful(name, {flag: value_of(start, option) for flag, option in flags_of(name).items()} | flags, flags)
    config = with_changes(start, flags)
    if "quantized-rate" in flags and not config.full_epochs:
        plain = config.embedding.dpq is None
        reason = "plain tables never are quantized" if plain else "without full epochs tables are from the start"
        raise ConfigError(f"--quantized-rate: {reason}; leave it out")
    return config


def _overview() -> str:
    recipes = "\n".join(f"  {name:20} {inspect.getdoc(each)}".partition("\n")[0] for name, each in RECIPES.items())
    return (
        f"usage: {PROGRAM} RECIPE [OPTIONS]\n\n"
        "Train a model with DPQ tables (or plain ones), freeze them into an artifact, measure it.\n\n"
        f"recipes:\n{recipes}\n\n{PROGRAM} RECIPE --help shows a recipe's options and defaults.\n\n{EXAMPLES}\n"
    )


def _given_flags(recipe: str, before: Mapping[str, Any] | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Flag -> value, of those that were given.

    Raises:
        ConfigError: a flag that other recipes have, or a default of another type in the file of --config.
    """
    named = [re.sub("^--(no-)?", "", each.partition("=")[0]) for each in arguments if each.startswith("--")]
    named = [name.replace("_", "-") for name in named]  # as tyro takes them too
    _check_own(recipe, named)
    flags, start = flags_of(recipe), before or default_config(recipe).as_dict()
    # tyro reads groups without checks: options are checked together, once those that were not given have given way.
    groups: dict[str, tuple[type, list[Any]]] = {}
    for option in flags.values():
        spec = () if option.kind is bool else (_in_one_text(option.kind),)
        annotation: Any = Annotated[(bool if option.kind is bool else Any, tyro.conf.arg(name=option.flag), *spec)]
        default = typed(option.kind, value_of(start, option), ".".join(option.path))
        is_required = option.flag == "out" or (option.flag == "data" and before is None)
        field = dataclasses.field() if is_required else dataclasses.field(default_factory=partial(copy.copy, default))
        groups.setdefault("_".join(option.path[:-1]), (option.group, []))[1].append(
            (option.path[-1], annotation, field)
        )
    config = Annotated[str | None, _in_one_text(str | None), tyro.conf.arg(metavar="FILE", help=_CONFIG_HELP)]
    fields: list[Any] = [("config", config, dataclasses.field(default=None))]
    for name, (group, members) in groups.items():
        kind = dataclasses.make_dataclass(name, members, kw_only=True, namespace={"__doc__": group.__doc__})
        fields.append((name, kind, dataclasses.field()))
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Run", fields, kw_only=True),
        prog=f"{PROGRAM} {recipe}",
        description=f"{inspect.getdoc(RECIPES[recipe])}\n\n{EXAMPLES}",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    given = [flags[flag] for flag in named if flag in flags]
    return {option.flag: getattr(getattr(parsed, "_".join(option.path[:-1])), option.path[-1]) for option in given}


def _in_one_text(kind: Any) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads and shows an option whose value is one text: `none`, A,B, or a choice."""
    inner = without_none(kind)
    metavar = {int: "N", float: "X", str: "TEXT"}.get(inner, "")
    if get_origin(inner) is dict:
        metavar = "TABLE.OPTION=VALUE ..."
    elif get_origin(inner) is tuple:
        metavar = "A:B,..." if get_origin(get_args(inner)[0]) is tuple else "A,B,..."
    elif get_origin(inner) is Literal:
        metavar = "{" + ",".join(map(str, get_args(inner))) + "}"

    def read(texts: list[str]) -> Any:
        try:
            value = from_text(kind, texts[0])
        except ValueError as error:
            want = {"N": "a whole number", "X": "a number"}.get(metavar, metavar)
            raise ValueError(str(error) if "want" in str(error) else f"got {texts[0]!r}, want {want}") from error
        if get_origin(inner) is Literal and value is not None and value not in get_args(inner):
            raise ValueError(f"got {value!r}, want one of {', '.join(map(str, get_args(inner)))}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [to_text(value)],
    )


def _check_own(recipe: str, named: Sequence[str]) -> None:
    """Raises ConfigError for a flag that other recipes have."""
    own, lacks = flags_of(recipe), groups_of(recipe)["model"].lacks
    for flag in named:
        owners = [] if flag in own else [other for other in RECIPES if flag in flags_of(other)]
        if owners:
            reason = next((lacks[each] for each in (flag, *owners) if each in lacks), "")
            why = f": {reason}" if reason else f", and {recipe} has none such"
            raise ConfigError(f"--{flag} is an option of {' and '.join(owners)}{why}; leave it out")


def _check_useful(recipe: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raises ConfigError for a flag that was given and has no use beside the values of others."""
    for kind in groups_of(recipe).values():
        for flag, reason in kind.useless_flags(values).items():
            if flag in flags:
                raise ConfigError(f"--{flag}: {reason}; leave it out")
