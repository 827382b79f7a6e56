"""`torchrun --nproc-per-node N -m training RECIPE --data PATH --out DIR`: train, freeze, measure."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from dpq_rec import DpqRecError
from training.command_line import parse


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
