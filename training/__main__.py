"""`torchrun --nproc-per-node N -m training RECIPE --data PATH --out DIR`: train, freeze, measure."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from dpq_rec import DpqRecError
from training.config import RunConfig

EXAMPLES = """examples:
  torchrun --nproc-per-node 2 -m training two-tower --data interactions/ --out runs/dpq
  torchrun --nproc-per-node 2 -m training two-tower --data interactions/ --out runs/full --embedding full
  torchrun --nproc-per-node 2 -m training two-tower --data synthetic --num-users 1000000 --out runs/big

A run that was killed goes on where it stood when it is started again with the same --out."""


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: settings that make no sense.
    """
    parser = argparse.ArgumentParser(
        "python -m training",
        description="Train a recommender with DPQ tables (or plain ones), freeze them into an artifact, measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=["two-tower"], help="two-tower: retrieval, users and items by cosine")
    for field in dataclasses.fields(RunConfig):
        if field.metadata.get("hidden"):
            continue
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.type == "bool":
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=field.default,
                help=f"{text} (default: {field.default})",
            )
            continue
        required = field.default == ""
        choices = field.metadata.get("choices", "").split() or None
        parser.add_argument(
            flag,
            type={"int": int, "float": float}.get(str(field.type), str),
            default=field.default,
            required=required,
            choices=choices,
            metavar=None if choices else {"int": "N", "float": "X"}.get(str(field.type), "PATH"),
            help=text if required else f"{text} (default: {field.default})",
        )
    return RunConfig(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 for settings or data that make no sense."""
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
    except DpqRecError as error:
        if rank == 0:
            print(f"training: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        ratio = result["total"]["compression_ratio"]
        print(f"test {metrics}; tables {ratio:.1f} times smaller; {config.out}/artifact, {config.out}/metrics.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
