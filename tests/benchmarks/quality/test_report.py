"""Pictures and tables of made-up lines."""

import numpy as np
import pytest

from tests.benchmarks.quality import pictures, report
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.grid import METHODS


def line_of(dataset, method, stage, quality, *, ratio=None, seed=0, flags=None, settings=None):
    case = Case(
        dataset=dataset, recipe="two-tower", method=method, stage=stage, ratio=ratio, seed=seed,
        flags=flags or {}, settings=settings or {},
    )  # fmt: skip
    names = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
    line = {"dataset": dataset, "method": method, "stage": stage, "case": case.as_dict(), "seed": seed}
    line |= {"metrics": {name: quality + number for number, name in enumerate(names)}, "best_epoch": 3}
    line |= {"ratio": ratio or 1.0, "bytes": int(1e6 / (ratio or 1)), "full_bytes": 1_000_000}
    if METHODS.get(method) is None or METHODS[method].kind != "post-training":
        line |= {"examples_per_second": 1000 * (1 + quality), "peak_memory_bytes": 10**9}
    return line


LINES = [
    *(line_of("gowalla", "full", "final", 0.3 + seed / 100, seed=seed) for seed in (0, 1)),
    *(line_of("gowalla", "dpq-vq", "final", 0.31 + s / 100, ratio=r, seed=s) for r in (40.0, 20.0) for s in (0, 1)),
    line_of("gowalla", "pq", "final", 0.2, ratio=20.0),
    line_of("movielens_1m", "full", "final", 0.1),
    *(
        line_of("movielens_1m", method, "sweep", k * d / 1000, flags={"num-codes": k, "num-subspaces": d})
        for method in ("dpq-sx", "dpq-vq")
        for k, d in ((4, 8), (16, 8), (16, 32))
    ),
    line_of("gowalla", "rq", "same-codes", 0.25, settings={"num_subspaces": 8, "num_codes": 64, "num_levels": 2}),
]


def test_curve_has_means_over_seeds_by_rising_ratio():
    gowalla = [line for line in LINES if line["dataset"] == "gowalla" and line["stage"] == "final"]
    assert pictures.curve(gowalla, "dpq-vq", "recall@10") == [
        (20.0, pytest.approx(0.315)),
        (40.0, pytest.approx(0.315)),
    ]
    assert pictures.curve(gowalla, "opq", "recall@10") == []


def test_grid_has_a_row_for_each_k_and_a_gap_where_nothing_was_run():
    sweep = [line for line in LINES if line["stage"] == "sweep"]
    codes, subspaces, values = pictures.grid_of(sweep, "dpq-sx", lambda line: line["metrics"]["recall@10"])
    assert (codes, subspaces) == ([4, 16], [8, 32])
    np.testing.assert_allclose(values, [[0.032, np.nan], [0.128, 0.512]])


def test_draw_leaves_pictures_of_what_the_lines_suffice_for(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    paths = pictures.draw(LINES, tmp_path)
    assert [path.name for path in paths] == ["quality_ratio.png", "quality_cost.png", "quality_k_d.png"]
    for path in paths:
        pixels_HWC = image.imread(path, format="png")
        assert len(np.unique(pixels_HWC.reshape(-1, 4), axis=0)) > 20  # curves and maps, not an empty page
    assert pictures.draw([], tmp_path) == []


def test_tables_have_means_of_seeds_and_what_is_kept_of_full():
    compared = [{"dataset": "gowalla", "method": "dpq-vq", "ratio": 20.0, "metric": "ndcg@20", "lower_95": -0.004}]
    text = report.tables(LINES, compared)
    rows = [line for line in text.splitlines() if line.startswith("| dpq-vq")]
    kept = (0.315 + 3) / (0.305 + 3)
    assert rows[0] == (
        f"| dpq-vq | 20 | 20.0 | 50,000 | 0.3150 | 1.3150 | 2.3150 | 3.3150 | {kept:.1%} | 99.6% | 0, 1 | 3, 3 |"
    )
    assert rows[1].endswith(f"| {kept:.1%} |  | 0, 1 | 3, 3 |")
    assert "| rq | 8 | 64 | 2 | 1.0 | 0.2500 |" in text
    assert text.index("movielens_1m") != text.index("gowalla")


def test_ablations_stand_beside_the_trial_that_was_chosen():
    tried = [line_of("movielens_1m", "dpq-vq", "trial", quality, ratio=20.0) for quality in (0.02, 0.05, 0.04)]
    changed = line_of("movielens_1m", "dpq-vq", "ablation", 0.03, ratio=20.0, settings={"changed": "no full phase"})
    lines = [line | {"validation": {"ndcg@10": line["metrics"]["ndcg@10"] - 1}} for line in (*tried, changed)]
    text = report.tables(lines, [])
    assert "|  | 20.0 | 0.0500 | 100.0% |\n| no full phase | 20.0 | 0.0300 | 60.0% |" in text
