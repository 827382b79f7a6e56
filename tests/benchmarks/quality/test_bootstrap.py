"""The paired bootstrap held to loops over users and to sklearn."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dpq_rec import ConfigError
from tests.benchmarks.quality import bootstrap
from tests.benchmarks.quality.bootstrap import auc_of, compare, mean_of, relative_difference
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.command import main
from tests.benchmarks.quality.judge import BY_USER
from tests.benchmarks.quality.worker import RUN

RNG = np.random.default_rng(3)
NUM_USERS = 40
USERS = np.repeat(np.arange(NUM_USERS), RNG.integers(2, 9, NUM_USERS))
LABELS = (RNG.random(len(USERS)) < 0.4).astype(np.float32)
LOGITS = np.round(RNG.standard_normal(len(USERS)) + LABELS, 1).astype(np.float32)  # with ties


def test_auc_of_drawn_users_is_sklearns_of_their_examples_repeated():
    auc = auc_of(LOGITS, LABELS, USERS)
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(NUM_USERS, size=NUM_USERS)
        examples = np.concatenate([np.flatnonzero(user == USERS) for user in drawn])
        times = np.bincount(drawn, minlength=NUM_USERS)
        assert auc(times) == pytest.approx(roc_auc_score(LABELS[examples], LOGITS[examples]), abs=1e-12)


def test_difference_is_that_of_a_loop_over_draws():
    one, other = RNG.random(NUM_USERS), RNG.random(NUM_USERS)
    found = relative_difference([mean_of(one)], [mean_of(other)], NUM_USERS, num_draws=300)
    rng, draws = np.random.default_rng(0), []
    for _ in range(300):
        drawn = rng.integers(NUM_USERS, size=NUM_USERS)
        draws.append(sum(one[user] for user in drawn) / sum(other[user] for user in drawn) - 1)
    draws.sort()
    assert found.observed == pytest.approx(one.mean() / other.mean() - 1)
    assert found.lower_95 == pytest.approx(np.quantile(draws, 0.05))
    assert found.interval_95 == pytest.approx((np.quantile(draws, 0.025), np.quantile(draws, 0.975)))
    assert found.interval_95[0] <= found.lower_95 <= found.observed <= found.interval_95[1]


def test_pairing_makes_the_interval_of_equal_methods_empty():
    values = RNG.random(NUM_USERS)
    assert relative_difference([mean_of(values)], [mean_of(values)], NUM_USERS, num_draws=50).interval_95 == (0, 0)


def test_interval_holds_the_true_difference_about_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(120):
        other = rng.random(60) + 0.5
        one = 0.9 * other + 0.1 * rng.standard_normal(60)  # of all users: 0.9 times
        low, high = relative_difference([mean_of(one)], [mean_of(other)], 60, num_draws=150).interval_95
        held += low <= -0.1 <= high
    assert 104 <= held <= 120


def case(method, seed, recipe):
    return Case(dataset="d", recipe=recipe, method=method, stage="final", seed=seed)


def leave(out, one, **arrays):
    folder = out / one.name / RUN
    folder.mkdir(parents=True)
    np.savez(folder / BY_USER, **arrays)
    return {"case": one.as_dict(), "stage": one.stage}


def test_compare_averages_the_seeds_that_both_methods_have(tmp_path):
    values = {(m, s): RNG.random(NUM_USERS) for m in ("full", "dpq-vq") for s in (0, 1)}
    values["full", 2] = np.zeros(NUM_USERS)  # has no partner
    lines = [
        leave(tmp_path, case(m, s, "two-tower"), user_ids_U=np.arange(NUM_USERS), **{"ndcg@10": v, "ndcg@20": v / 2})
        for (m, s), v in values.items()
    ]
    found = compare(lines, tmp_path, num_draws=40)
    expected = (values["dpq-vq", 0] + values["dpq-vq", 1]).mean() / (values["full", 0] + values["full", 1]).mean() - 1
    assert [each["metric"] for each in found] == ["ndcg@10", "ndcg@20"]
    assert all(each["observed"] == pytest.approx(expected) and each["seeds"] == [0, 1] for each in found)
    bootstrap.write(found, tmp_path)
    assert bootstrap.read(tmp_path) == json.loads(json.dumps(found))


def test_some_cases_are_compared_where_the_others_are_not_and_those_stay_in_the_file(tmp_path):
    values = {method: RNG.random(NUM_USERS) for method in ("full", "dpq-vq", "pq")}
    lines = [
        leave(tmp_path, case(m, 0, "two-tower"), user_ids_U=np.arange(NUM_USERS), **{"ndcg@10": v, "ndcg@20": v})
        for m, v in values.items()
    ]
    results = tmp_path / "quality.jsonl"
    results.write_text("".join(json.dumps({**line, "method": line["case"]["method"]}) + "\n" for line in lines))
    arguments = ["--results", str(results), "--out", str(tmp_path), "--compare"]
    assert main(arguments) == 0
    every = bootstrap.read(tmp_path)
    assert [(each["method"], each["metric"]) for each in every] == [
        (method, metric) for method in ("dpq-vq", "pq") for metric in ("ndcg@10", "ndcg@20")
    ]
    (tmp_path / case("dpq-vq", 0, "two-tower").name / RUN / BY_USER).unlink()
    np.savez(
        tmp_path / case("pq", 0, "two-tower").name / RUN / BY_USER,
        user_ids_U=np.arange(NUM_USERS),
        **{"ndcg@10": values["full"], "ndcg@20": values["full"]},
    )
    assert main([*arguments, "--only", "d/pq"]) == 0
    again = bootstrap.read(tmp_path)
    assert again[:2] == every[:2]
    assert [each["observed"] for each in again[2:]] == [0, 0]
    assert main(arguments) == 2  # a case that is wanted has left nothing
    assert main([*arguments, "--only", "d/opq"]) == 2
    assert bootstrap.read(tmp_path) == again


def test_compare_of_clicks_is_by_auc(tmp_path):
    by_method = {"full": LOGITS, "dpq-sx": LOGITS + RNG.standard_normal(len(LOGITS)).astype(np.float32)}
    lines = [
        leave(tmp_path, case(m, 0, "dlrm"), user_rows_N=USERS, logits_N=logits, labels_N=LABELS)
        for m, logits in by_method.items()
    ]
    (found,) = compare(lines, tmp_path, num_draws=40)
    of_full, of_dpq = (roc_auc_score(LABELS, logits) for logits in by_method.values())
    assert found["observed"] == pytest.approx(of_dpq / of_full - 1)
    assert found["num_users"] == NUM_USERS


def test_compare_refuses_other_users_and_a_folder_without_them(tmp_path):
    users = np.arange(NUM_USERS)
    metrics = {"ndcg@10": RNG.random(NUM_USERS), "ndcg@20": RNG.random(NUM_USERS)}
    lines = [
        leave(tmp_path, case(method, 0, "two-tower"), user_ids_U=ids, **metrics)
        for method, ids in (("full", users), ("pq", users + 1))
    ]
    with pytest.raises(ConfigError, match="cases of other users"):
        compare(lines, tmp_path)
    with pytest.raises(ConfigError, match=r"got no .*by_user"):
        compare(lines, tmp_path / "elsewhere")
