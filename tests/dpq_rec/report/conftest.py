"""What several files of this folder need."""

import numpy as np
import pytest

from dpq_rec import Int64Vocabulary
from tests.dpq_rec.builders import dpq_contents
from tests.dpq_rec.report.reading import LAYOUT, report


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A table of integers that live in their order in rows: 100 + row."""
    contents = dpq_contents(50, LAYOUT, vocabulary=Int64Vocabulary.from_ids(np.arange(50) + 100))
    return report(tmp_path_factory.mktemp("small"), contents, ids=("107", "100"))
