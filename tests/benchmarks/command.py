"""`python -m PACKAGE NAME ...`. In: the benchmarks of a package, each a module with main(flags). Out: an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

from dpq_rec.errors import ConfigError, MissingDependencyError

_EXTRAS = {
    "faiss": "dev",
    "fbgemm_gpu": "train",
    "hiredis": "dev",
    "httpx": "dev",
    "matplotlib": "dev",
    "redis": "dev",
    "threadpoolctl": "dev",
    "torch": "train",
    "tqdm": "train",
}


def run(package: str, benchmarks: Mapping[str, str]) -> int:
    """Run the benchmark that the first argument names, with the arguments after it; 2 where that is not possible.

    Args:
        package: that holds a module for each.
        benchmarks: name -> what it measures.
    """
    usage = f"usage: python -m {package} {{{','.join(benchmarks)}}} ..."
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        sys.stdout.write("\n".join([usage, "", *(f"  {name:8s}{what}" for name, what in benchmarks.items()), ""]))
        return 0
    try:
        if name not in benchmarks:
            raise ConfigError(f"{usage}\ngot {name or 'nothing'}, want one of {', '.join(benchmarks)}")
        try:
            importlib.import_module(f"{package}.{name}").main(flags)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            raise MissingDependencyError(f"{error.name}, which this needs,", _EXTRAS[error.name]) from error
    except (ConfigError, MissingDependencyError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
