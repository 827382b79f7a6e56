import itertools

import numpy as np
import pytest

from tests.benchmarks.training import cost
from training.data.synthetic import SyntheticConfig, generate


def made_up_lines():
    """sx takes K percent more time than plain tables and D percent more memory, vq twice and three times that."""
    return [
        {
            "num_codes": k,
            "num_subspaces": d,
            "seconds": {"full": 0.5, "dpq-sx": 0.5 * (1 + k / 100), "dpq-vq": 0.5 * (1 + 2 * k / 100)},
            "memory": {"full": 200, "dpq-sx": 200 * (1 + d / 100), "dpq-vq": 200 * (1 + 3 * d / 100)},
        }
        for d, k in itertools.product(cost.NUM_SUBSPACES, reversed(cost.NUM_CODES))
    ]


def test_extra_is_in_percent_with_a_row_for_each_k_and_a_column_for_each_d():
    lines = made_up_lines()
    codes_KD = np.repeat(np.array(cost.NUM_CODES)[:, None], len(cost.NUM_SUBSPACES), 1)
    subspaces_KD = np.repeat(np.array(cost.NUM_SUBSPACES)[None], len(cost.NUM_CODES), 0)
    np.testing.assert_allclose(cost.extra(lines, "seconds", "dpq-sx"), codes_KD)
    np.testing.assert_allclose(cost.extra(lines, "seconds", "dpq-vq"), 2 * codes_KD)
    np.testing.assert_allclose(cost.extra(lines, "memory", "dpq-vq"), 3 * subspaces_KD)


def test_table_has_milliseconds_and_ratios_line_by_line():
    first, second, *rows = cost.table(made_up_lines()).splitlines()
    assert first.count("|") == second.count("|") == 8
    assert len(rows) == len(cost.NUM_CODES) * len(cost.NUM_SUBSPACES)
    assert rows[0] == "| 256 | 8 | 500 | 3.56 | 6.12 | 1.08 | 1.24 |"


def test_draw_leaves_a_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    cost.draw(made_up_lines(), tmp_path / "cost.png")
    pixels_HWC = image.imread(tmp_path / "cost.png", format="png")
    assert len(np.unique(pixels_HWC.reshape(-1, 4), axis=0)) > 20  # heat maps, not an empty page


def test_step_seconds_times_every_kind_of_tables(tmp_path):
    data = generate(SyntheticConfig(num_users=50, num_items=30, num_interactions=2000), tmp_path / "data")
    full = cost.Case("full", 0, 0, str(data), 64, 2)
    seconds = cost.step_seconds([full, full._replace(embedding="dpq-vq", num_codes=8, num_subspaces=8)])
    assert set(seconds) == {"full", "dpq-vq"}
    assert all(0 < each < 10 for each in seconds.values())
