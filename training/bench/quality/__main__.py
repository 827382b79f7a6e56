"""`python -m training.bench.quality`, as `python -m training.bench quality`."""

import sys

from training.bench.quality.command import main

sys.exit(main())
