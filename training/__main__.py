"""`torchrun --nproc-per-node N -m training RECIPE --data PATH --out DIR`: train, freeze, measure."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dpq_rec import ConfigError, DpqRecError
from training.config import RunConfig, options_of, value_of, with_changes
from training.flags import add_flag
from training.recipes import ANYWHERE, RECIPES, load
from training.refusals import (
    options_of_others,
    refuse_meaningless,
    refuse_options_of_others,
    refuse_quantized_rate,
)

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


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: settings that make no sense.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    recipe = given.pop(0) if given and not given[0].startswith("-") else None
    before = _config_file(given)
    if recipe is None and before is None and (not given or {"-h", "--help"} & set(given)):
        _overview().print_help()
        sys.exit(0)
    name = recipe or (before or {}).get("recipe")
    if name not in RECIPES:
        _overview().error(f"got {name or given[0]}; the recipe comes first, one of {', '.join(RECIPES)}")
    if before is not None and name != before["recipe"]:
        raise ConfigError(f"--config: got a run of {before['recipe']}, and the recipe {name}; want the same")
    start = before or RECIPES[name](ANYWHERE, "run").as_dict()
    flags = vars(_recipe_parser(name, start, is_rerun=before is not None).parse_args(given))
    flags.pop("config", None)
    refuse_options_of_others(name, RECIPES, flags)
    options = options_of(name)
    refuse_meaningless(options, {option.flag: value_of(start, option) for option in options} | flags, flags)
    config = with_changes(start, flags)
    refuse_quantized_rate(config, flags)
    return config


def _config_file(given: Sequence[str]) -> dict[str, Any] | None:
    """The configuration that --config names."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(given)[0].config
    return None if path is None else load(path)


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Train a model with DPQ tables (or plain ones), freeze them into an artifact, measure it.",
        epilog=f"{PROGRAM} RECIPE --help shows a recipe's options and defaults.\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipes = parser.add_subparsers(title="recipes", metavar="RECIPE", required=True)
    for name, function in RECIPES.items():
        recipes.add_parser(name, help=(inspect.getdoc(function) or "").split("\n", 1)[0])
    return parser


def _recipe_parser(recipe: str, start: Mapping[str, Any], *, is_rerun: bool) -> argparse.ArgumentParser:
    """The parser of a recipe's options; `start` holds their defaults."""
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {recipe}",
        description=inspect.getdoc(RECIPES[recipe]),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="metrics.json of another run: begin with its configuration; give --out too"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(recipe):
        if option.path[0] not in groups:
            groups[option.path[0]] = parser.add_argument_group(option.group)
        required = option.flag == "out" or (option.flag == "data" and not is_rerun)
        add_flag(groups[option.path[0]], option, value_of(start, option), required=required)
    for flag in options_of_others(recipe, RECIPES):
        names = (f"--{flag}", f"--no-{flag}")
        parser.add_argument(*names, nargs="?", dest=flag, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for settings or data that make no sense, or files that cannot be read or written."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        config = parse(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torchrec and FBGEMM, which the user cannot mend
            from training.trainer import train

            result = train(config)
    except (DpqRecError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # of a connection: the user knows no better than the traceback
        if rank == 0:
            print(f"training: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        ratio, out = result["total"]["compression_ratio"], config.run.out
        print(f"test {metrics}; tables {ratio:.1f} times smaller; {out}/artifact, {out}/metrics.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
