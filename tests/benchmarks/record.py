"""Measurements to lines of results. In: what was measured. Out: JSON, with machine, versions, date and command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpq_rec.errors import ConfigError
from tests.benchmarks.machine import where_and_when

PACKAGES = ("dpq-rec", "numpy", "torch")


def add_config_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """A flag for each of a config's numbers."""
    for field, default in vars(config).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"{default:,}")


def check_counts(config: Any, *names: str) -> None:
    """Raises ConfigError where one of a config's counts is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: got {getattr(config, name)}, want 1 or more")


def add_results_flag(parser: argparse.ArgumentParser) -> None:
    """`--results FILE`, which lines are added to."""
    parser.add_argument("--results", type=Path, metavar="FILE", help="add lines of results to this file")


def line_of(bench: str, measured: dict[str, Any], packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """A line of results.

    Args:
        bench: what was measured.
        measured: settings and figures.
        packages: whose versions matter.
    """
    return {"bench": bench, **measured, "command": _command(), **where_and_when(packages)}


def append(path: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines to a file of results; without one, do nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def head(line: dict[str, Any]) -> str:
    """Two lines of text above a table: when and where, with what."""
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    return f"{line['date']}, {line['machine']}\nPython {line['python']}, {versions}"


def _command() -> str:
    """What the user typed, without folders of this machine."""
    main = sys.modules["__main__"].__spec__
    name = main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).name
    flags = [Path(flag).name if Path(flag).is_absolute() else flag for flag in sys.argv[1:]]
    if "--results" in flags:
        del flags[flags.index("--results") : flags.index("--results") + 2]
    return " ".join(["python", "-m", name, *flags])
