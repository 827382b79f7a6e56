"""Cases as real processes on tiny data: what a line holds, and how a grid goes on that was killed."""

import json
import os
import signal
import time

import numpy as np
import pyarrow.dataset as ds
import pytest

from dpq_rec import EmbeddingStore
from tests.benchmarks.quality import runner
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.command import estimate, listing, main
from tests.benchmarks.quality.judge import BY_USER
from tests.benchmarks.quality.runner import Places, missing, read_lines, run
from tests.benchmarks.quality.worker import LINE, RUN, work
from training.checkpoint import find_checkpoints
from training.data.interactions import TEST
from training.data.synthetic import SyntheticConfig, generate

FLAGS = {"embedding-dim": 16, "batch-size": 256, "num-negatives": 64, "patience": 9}
FULL = Case(dataset="tiny", recipe="two-tower", method="full", stage="final", epochs=2, flags=FLAGS)
PQ = Case(
    dataset="tiny", recipe="two-tower", method="pq", stage="final", ratio=4.0, settings={"num_codes": 8}, of=FULL.name
)
QR = Case(dataset="tiny", recipe="two-tower", method="qr", stage="final", ratio=4.0, epochs=1, flags=FLAGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(SyntheticConfig(num_users=300, num_items=100, num_interactions=6000), folder / "tiny")
    clicks = SyntheticConfig(num_users=60, num_items=40, num_interactions=3000, with_clicks=True)
    generate(clicks, folder / "clicks")
    return folder


@pytest.fixture(scope="module")
def worked(data, tmp_path_factory):
    """Lines of a full run, its tables compressed, and a baseline; and the folder they lie in."""
    out = tmp_path_factory.mktemp("out")
    return {case.method: work(case, data, out) for case in (FULL, PQ, QR)}, out


def test_line_holds_what_metrics_json_says_of_the_artifact(worked, data):
    lines, out = worked
    of_run = json.loads((out / FULL.name / RUN / "metrics.json").read_text())
    line = json.loads((out / FULL.name / LINE).read_text())
    same = ("metrics", "seconds", "best_epoch", "examples_per_second", "peak_memory_bytes")
    assert {name: line[name] for name in same} == {name: of_run[name] for name in same}
    assert (line["method"], line["bytes"], line["ratio"]) == ("full", of_run["total"]["full_bytes"], 1)
    best = of_run["history"][of_run["best_epoch"] - 1]
    assert line["validation"] == {name: best[name] for name in line["metrics"]}
    assert {"date", "machine", "versions"} <= set(line)
    for each in lines.values():
        assert str(out) not in json.dumps(each)
        assert str(data) not in json.dumps(each)


def test_compressed_line_has_the_bytes_of_its_artifact_and_other_metrics(worked):
    lines, out = worked
    artifact = EmbeddingStore.open(out / PQ.name / RUN / "artifact")
    assert lines["pq"]["bytes"] == sum(table.artifact_bytes for table in artifact.tables.values())
    assert lines["pq"]["ratio"] >= 4
    assert lines["pq"]["metrics"] != lines["full"]["metrics"]


def test_baseline_line_has_bytes_within_its_ratio(worked):
    lines, _ = worked
    assert 4 <= lines["qr"]["ratio"] < 6
    assert lines["qr"]["ratio"] == lines["full"]["bytes"] / lines["qr"]["bytes"]


@pytest.mark.parametrize("case", [FULL, PQ, QR], ids=lambda case: case.method)
def test_metrics_by_user_have_the_means_of_the_line(worked, case):
    lines, out = worked
    with np.load(out / case.name / RUN / BY_USER) as arrays:
        for name, value in lines[case.method]["metrics"].items():
            assert arrays[name].mean() == pytest.approx(value)
            assert len(arrays[name]) == len(arrays["user_ids_U"])


def test_clicks_by_user_have_the_auc_of_the_line(data, tmp_path):
    flags = {"embedding-dim": 8, "features": ["price", "segment", "tags"], "num-subspaces": 4, "num-codes": 4}
    case = Case(dataset="clicks", recipe="dlrm", method="dpq-vq", stage="final", epochs=1, flags=flags)
    line = work(case, data, tmp_path)
    with np.load(tmp_path / case.name / RUN / BY_USER) as arrays:
        logits, labels = arrays["logits_N"], arrays["labels_N"]
        above = (logits[labels == 1][:, None] > logits[labels == 0]).mean()
        tied = (logits[labels == 1][:, None] == logits[labels == 0]).mean()
        assert above + tied / 2 == pytest.approx(line["metrics"]["auc"])
        ids = ds.dataset(data / "clicks").to_table(filter=ds.field("split") == TEST)["user_id"].to_numpy()
        users = EmbeddingStore.open(tmp_path / case.name / RUN / "artifact").table("user_id")
        np.testing.assert_array_equal(np.sort(arrays["user_rows_N"]), np.sort(users.vocabulary.rows(ids)))


def test_grid_that_was_killed_goes_on_and_does_nothing_twice(data, tmp_path, monkeypatch):
    slow = Case(**{**FULL.as_dict(), "epochs": 4, "seed": 5})
    places = Places(data, tmp_path / "out", tmp_path / "results.jsonl")
    broken = Case(**{**FULL.as_dict(), "dataset": "absent"})
    folder = places.out / slow.name
    process = runner._begin(slow, places)
    while not find_checkpoints(folder / RUN / "checkpoints"):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / LINE).exists()

    assert run(lambda lines: [slow, broken], places) == [broken]
    assert "does not exist" in (places.out / broken.name / "log").read_text()
    (line,) = read_lines(places.results)
    assert "going on after epoch" in (folder / "log").read_text()
    history = json.loads((folder / RUN / "metrics.json").read_text())["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4]
    assert missing(lambda lines: [slow, broken], [line]) == [broken]

    monkeypatch.setattr(runner.subprocess, "Popen", None)  # a process would raise
    assert run(lambda lines: [slow], places) == []
    assert len(read_lines(places.results)) == 1


def test_case_that_is_done_gets_the_line_that_a_killed_runner_did_not_add(worked, tmp_path):
    _, out = worked
    places = Places(tmp_path, out, tmp_path / "results.jsonl")  # no data there: it cannot be trained again
    assert run(lambda lines: [FULL, *([PQ] if lines else [])], places, jobs=2) == []
    assert [Case.from_dict(line["case"]) for line in read_lines(places.results)] == [FULL, PQ]


def test_second_runner_is_refused(tmp_path, capsys):
    with runner._claimed(tmp_path):
        code = main(["--data", str(tmp_path), "--out", str(tmp_path), "--results", str(tmp_path / "r.jsonl")])
    assert code == 2
    assert "another run of the grid is at work" in capsys.readouterr().err


def test_list_says_what_is_done_and_left_and_for_how_long(worked):
    lines = [{**worked[0]["full"], "seconds": 10.0, "dataset": "movielens_1m"}]
    text = listing([], ["movielens_1m/full"])
    assert text.count("left") == 5  # four trials, and the sum
    assert "?" in text
    longer = Case(**{**FULL.as_dict(), "epochs": 8, "dataset": "movielens_1m"})
    assert estimate(longer, lines) == pytest.approx(40)
    assert estimate(Case(**{**longer.as_dict(), "dataset": "gowalla"}), lines) is None
