"""`python -m training.bench quality|cost|throughput`: each with options of its own, see --help."""

from __future__ import annotations

import runpy
import sys

MODULES = {
    "quality": "training.bench.quality",
    "cost": "training.bench.cost",
    "throughput": "training.bench.throughput",
}


def main() -> None:
    """Run the benchmark that the first argument names, with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MODULES:
        wanted = ", ".join(MODULES)
        print(f"usage: python -m training.bench {{{wanted.replace(', ', ',')}}} ...", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else f"training.bench: got {name or 'nothing'}, want one of {wanted}")
    sys.argv[:2] = [f"python -m training.bench {name}"]
    runpy.run_module(MODULES[name], run_name="__main__")


if __name__ == "__main__":
    main()
