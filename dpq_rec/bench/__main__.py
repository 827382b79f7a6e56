"""`python -m dpq_rec.bench NAME ...`: each benchmark with options of its own, see NAME --help."""

from __future__ import annotations

import importlib
import sys

from dpq_rec.errors import ConfigError, MissingDependencyError

BENCHMARKS = {
    "decode": "rows to vectors, beside torch.index_select from the fp32 table",
    "search": "the best ids for a query, beside a matrix product and faiss",
}
_EXTRAS = {"torch": "train", "fbgemm_gpu": "train", "tqdm": "train", "faiss": "dev", "threadpoolctl": "dev"}
_USAGE = "usage: python -m dpq_rec.bench {" + ",".join(BENCHMARKS) + "} ..."


def main() -> int:
    """Run the benchmark that the first argument names; 2 where that is not possible."""
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        sys.stdout.write("\n".join([_USAGE, "", *(f"  {name:8s}{what}" for name, what in BENCHMARKS.items()), ""]))
        return 0
    try:
        if name not in BENCHMARKS:
            raise ConfigError(f"{_USAGE}\ngot {name or 'nothing'}, want one of {', '.join(BENCHMARKS)}")
        try:
            module = importlib.import_module(f"dpq_rec.bench.{name}")
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            raise MissingDependencyError(f"{error.name}, which this compares with,", _EXTRAS[error.name]) from error
        module.main(flags)
    except (ConfigError, MissingDependencyError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
