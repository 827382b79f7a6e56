"""`python -m tests.benchmarks.quality ...`: see --help."""

import sys

from tests.benchmarks.quality.command import main

sys.exit(main())
