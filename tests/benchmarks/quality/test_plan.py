"""The order of the grid, played through with made-up results: what is run, and what choices can see."""

import dataclasses
import zlib
from collections import Counter

import pytest

from tests.benchmarks.quality import baselines, grid, post_training
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.grid import METHODS, STUDIES
from tests.benchmarks.quality.plan import Known, plan
from tests.benchmarks.quality.worker import config_of_case
from training.recipes import RECIPES, with_changes

STUDY = STUDIES[0]
METRICS = {study.metric for study in STUDIES}


def line_of(case, validation, test=0.5, num_bytes=None):
    budget = 10_000 if case.ratio is None else int(1_000_000 / case.ratio)
    return {
        "case": case.as_dict(),
        "validation": dict.fromkeys(METRICS, validation),
        "metrics": dict.fromkeys(METRICS, test),
        "bytes": budget if num_bytes is None else num_bytes,
        "full_bytes": 1_000_000,
    }


def play(score, test=lambda case: 0.5, num_bytes=lambda case: None, study=STUDY):
    """Every case of one study, in the order it was run; the study that it is tuned on was run before."""
    before = [other for other in STUDIES if other.dataset == study.tuned_on]
    lines = []
    while True:
        done = {line["case"] and Case.from_dict(line["case"]).name for line in lines}
        left = [case for case in plan(lines, [*before, study]) if case.name not in done]
        if not left:
            return [case for line in lines if (case := Case.from_dict(line["case"])).dataset == study.dataset]
        lines += [line_of(case, score(case), test(case), num_bytes(case)) for case in left]


def position(case):
    """Of a case's settings among its method's trials, more or less; larger is better here."""
    return zlib.crc32(str(sorted([*case.flags.items(), *case.settings.items()])).encode()) / 2**32


BEST = {"full": 0.9, "dpq-vq": 0.8, "opq": 0.7, "qr": 0.6}


def by_method(case):
    """Among methods as BEST says; within a method, by its settings."""
    return BEST.get(case.method, 0.1) + position(case) / 100


@pytest.fixture(scope="module")
def cases():
    return play(by_method)


def finals(cases, **wanted):
    return [case for case in cases if case.stage == "final" and all(getattr(case, k) == v for k, v in wanted.items())]


def test_trials_are_four_of_half_the_epochs_for_every_method_that_is_tuned(cases):
    counted = Counter((case.method, case.ratio) for case in cases if case.stage == "trial")
    tuned = {key: count for key, count in counted.items() if key[1] in (None, grid.TUNING_RATIO)}
    assert tuned.pop(("opq", grid.TUNING_RATIO)) == 3  # K=256 and a rotation take more
    assert set(tuned.values()) == {grid.NUM_TRIALS}
    assert max(counted.values()) == grid.NUM_TRIALS
    assert counted["pq", 40.0] == 3  # K=256 alone takes more there
    assert {method for method, _ in counted} == {name for name, m in METHODS.items() if len(m.trials) > 1}
    assert {c.epochs for c in cases if c.stage == "trial" and not c.of} == {STUDY.epochs // 2}
    assert {c.epochs for c in finals(cases) if not c.of} == {STUDY.epochs}


def test_finals_are_of_every_method_at_every_ratio(cases):
    for name, method in METHODS.items():
        ratios = {case.ratio for case in finals(cases, method=name, seed=0)}
        if name == "full" or not method.has_sizes:
            assert ratios == {None}
        else:
            assert ratios >= set(STUDY.ratios)


def test_more_seeds_are_for_full_the_best_dpq_and_the_two_best_baselines(cases):
    assert {case.method for case in cases if case.seed > 0} == {"full", "dpq-vq", "opq", "qr"}
    assert [case.seed for case in finals(cases, method="dpq-vq", ratio=40.0)] == [0, 1, 2]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.dataset)
def test_more_seeds_do_not_wait_for_a_method_that_no_bytes_suffice_for(study):
    """OPQ's rotations alone are more than a twentieth of MovieLens-100K's tables."""
    seeded = {case.method for case in play(by_method, study=study) if case.seed > 0}
    assert len(seeded) == 4
    assert ("opq" in seeded) == (study.dataset != "movielens_100k")


def test_compressed_cases_come_after_the_full_run_of_their_seed(cases):
    names = [case.name for case in cases]
    for at, case in enumerate(cases):
        if case.of:
            full = cases[names.index(case.of)]
            assert (full.method, full.stage, full.seed) == ("full", "final", case.seed)
            assert names.index(case.of) < at


def test_finals_take_the_settings_of_the_best_trial(cases):
    for name in ("full", "low-dim", "pq"):
        for final in finals(cases, method=name, seed=0):
            ratio = grid.TUNING_RATIO if name == "low-dim" else final.ratio
            trials = [c for c in cases if c.method == name and c.stage == "trial" and c.ratio == ratio]
            winner = max(trials, key=by_method)
            assert (final.flags, final.settings) == (winner.flags, winner.settings)


def test_a_study_that_is_tuned_on_another_takes_what_was_best_there(cases):
    study = next(study for study in STUDIES if study.tuned_on)
    tuned = play(by_method, study=study)
    assert {case.method for case in tuned if case.stage == "trial"} == {"pq", "opq", "rq", "aq"}
    assert {case.method for case in finals(tuned)} == {*METHODS}
    chosen = {(c.method, c.ratio): c.settings for c in finals(cases, seed=0) if not c.of}
    assert {(c.method, c.ratio): c.settings for c in finals(tuned, seed=0) if not c.of} == chosen
    for name in ("full", "dpq-vq"):
        here, there = (finals(each, method=name, seed=0)[0].flags["learning-rate"] for each in (tuned, cases))
        assert here / study.flags["learning-rate"] == there / STUDY.flags["learning-rate"]


def test_choices_do_not_see_test_metrics(cases):
    """The same validation with test metrics turned around: not one case differs."""
    assert play(by_method, test=lambda case: 1 - by_method(case)) == cases
    assert "metrics" not in Known._fields


def test_choices_follow_validation(cases):
    other = play(lambda case: -by_method(case))
    assert {case.name for case in finals(other)} != {case.name for case in finals(cases)}


def test_trials_beyond_their_bytes_are_not_chosen(cases):
    winner = next(c for c in finals(cases, method="qr", seed=0, ratio=20.0))
    too_large = {c.name: 50_001 for c in cases if c.stage == "trial" and c.method == "qr" and c.flags == winner.flags}
    other = play(by_method, num_bytes=lambda case: too_large.get(case.name))
    assert next(c for c in finals(other, method="qr", seed=0, ratio=20.0)).flags != winner.flags


def test_final_dpq_has_its_codes_fitted_afterwards_too(cases):
    for final in [*finals(cases, method="dpq-vq", seed=0), *finals(cases, method="dpq-sx", seed=0)]:
        size = [final.flags[name] for name in ("num-subspaces", "num-codes", "num-levels")]
        same = [
            c.method
            for c in cases
            if c.stage == "same-codes"
            and [c.settings[name] for name in ("num_subspaces", "num_codes", "num_levels")] == size
        ]
        assert {"pq" if size[2] == 1 else "rq", "dpq-reconstruction"} <= set(same)


def test_sweep_has_every_k_and_d_once():
    study = next(study for study in STUDIES if study.dataset in grid.SWEEP_DATASETS)
    sweep = [case for case in play(by_method, study=study) if case.stage == "sweep"]
    swept = Counter((c.method, c.flags["num-codes"], c.flags["num-subspaces"]) for c in sweep)
    assert set(swept.values()) == {1}
    assert len(swept) == 2 * len(grid.SWEEP_NUM_CODES) * len(grid.SWEEP_NUM_SUBSPACES)


def test_an_ablation_is_the_best_trial_of_dpq_with_one_thing_changed(cases, tmp_path):
    (tmp_path / STUDY.dataset).mkdir()
    assert STUDY.dataset in grid.ABLATION_DATASETS
    winner = max((c for c in cases if (c.method, c.stage) == ("dpq-vq", "trial")), key=by_method)
    ablations = {c.settings["changed"]: c for c in cases if c.stage == "ablation"}
    assert ablations.keys() == grid.ABLATIONS.keys()
    for what, case in ablations.items():
        assert (case.ratio, case.epochs, case.seed) == (winner.ratio, winner.epochs, winner.seed)
        trial = grid.ABLATIONS[what]
        assert trial.flags.items() <= case.flags.items()
        for size in (trial.sizes[STUDY.dataset][winner.ratio],) if trial.sizes else ():
            assert size.items() <= case.flags.items()
        if not trial.sizes:
            assert {name: case.flags.get(name) for name in winner.flags if name not in trial.flags} == {
                name: value for name, value in winner.flags.items() if name not in trial.flags
            }
        config_of_case(case, tmp_path, tmp_path / "run")  # whose options make sense together


def test_case_has_another_name_for_other_settings_and_comes_back_from_json():
    case = Case(dataset="d", recipe="two-tower", method="pq", stage="final", settings={"num_codes": 16}, of="d/full")
    assert Case.from_dict(case.as_dict()) == case
    changed = [dataclasses.replace(case, seed=1), dataclasses.replace(case, settings={"num_codes": 17})]
    assert len({case.name, *(each.name for each in changed)}) == 3


def test_every_method_of_the_grid_exists():
    for name, method in METHODS.items():
        if method.kind == "post-training":
            assert all(post_training.METHODS[name](**trial.settings) for trial in method.trials)
        if method.kind == "trained":
            assert all(baselines.METHODS[name](**trial.settings) for trial in method.trials)


@pytest.mark.parametrize("method", ["dpq-vq", "dpq-sx"])
def test_dpq_sizes_keep_within_their_ratio_and_use_it(method):
    """Under the options that the trainer makes of them, table by table."""
    for study in STUDIES:
        for trial in METHODS[method].trials:
            for ratio, size in trial.sizes[study.dataset].items():
                flags = {**study.flags, **trial.flags, **size, "embedding": method}
                options = with_changes(RECIPES[study.recipe](".", ".").as_dict(), flags).embedding
                taken = 0
                for number, rows in enumerate(study.rows):
                    config = options.dpq_of(str(number), rows)
                    codes = sum(tier.num_rows * tier.layout.row_bytes for tier in config.tiers_of(rows))
                    shared = config.num_subspaces if config.share_subspaces else 1
                    taken += codes + 2 * config.num_levels * config.num_codes * 64 // shared
                assert ratio <= 256 * sum(study.rows) / taken < 1.4 * ratio, (study.dataset, ratio, size)
