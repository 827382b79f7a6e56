"""What `dpq-rec inspect --report` reads of a run."""

import json
import math

import numpy as np
import pytest

from dpq_rec import CodeLayout, ConfigError, open_artifact, write_artifact
from dpq_rec.cli import find_run, read_run
from tests.dpq_rec.builders import dense_contents, dpq_contents

FIRST = {"used_codes": [3, 4], "perplexity": [2.5, 3.5], "changed": None}
SECOND = {"used_codes": [2, 4], "perplexity": [2.0, 4.0], "changed": [0.25, 0.5]}


def metrics(**changes):
    history = [{"epoch": 1, "loss": 1.0, "codes": {"item_id": FIRST}}, {"epoch": 2, "codes": {"item_id": SECOND}}]
    whole = {"recipe": "two-tower", "embedding": "dpq-vq", "seed": 3, "metrics": {"ndcg@10": 0.5}, "best_epoch": 2}
    return {**whole, "history": history, **changes}


@pytest.fixture
def run(tmp_path):
    """A run's folder: an artifact with a table of two codes a row and a dense one, and no metrics.json yet."""
    contents = {
        "item_id": dpq_contents(9, CodeLayout(num_subspaces=2, num_codes=4)),
        "user_id": dense_contents(np.eye(2, dtype=np.float32)),
    }
    write_artifact(tmp_path / "run/artifact", contents)
    return tmp_path / "run"


def read(run, content):
    (run / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_run(run, open_artifact(run / "artifact").tables)


def test_history_is_what_the_run_wrote(run):
    found = read(run, metrics())
    assert found.about == {"recipe": "two-tower", "embedding": "dpq-vq", "seed": 3, "epoch": "2 of 2"}
    assert found.best_epoch == 2
    assert found.metrics == {"ndcg@10": 0.5}
    assert list(found.codes) == ["item_id"]
    codes = found.codes["item_id"]
    assert codes.epochs_T.tolist() == [1, 2]
    assert np.isnan(codes.changed_TM[0]).all()
    assert codes.changed_TM[1].tolist() == [0.25, 0.5]
    assert codes.perplexity_TM.tolist() == [[2.5, 3.5], [2, 4]]


def test_history_of_a_run_that_counted_no_codes_has_none(run):
    assert read(run, metrics(history=[{"epoch": 1, "codes": {}}])).codes == {}
    assert read(run, {"metrics": {}}).codes == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        (metrics(metrics={"ndcg@10": "high"}), "ValueError"),
        (metrics(history=[{"epoch": 1, "codes": {"item_id": {**SECOND, "changed": [0.5]}}}]), "had .1,. codes a row"),
        (metrics(history=[{"epoch": 1, "codes": {"item_id": {**SECOND, "perplexity": [1, 2, 3]}}}]), "codes a row"),
        (metrics(history=[{"epoch": 1, "codes": {"item_id": {**SECOND, "perplexity": [1, math.inf]}}}]), "finite"),
        (metrics(history=[{"epoch": 1, "codes": {"item_id": {**SECOND, "changed": [0, 1.5]}}}]), "between 0 and 1"),
        (metrics(history=[{"codes": {"item_id": FIRST}}]), "KeyError: 'epoch'"),
    ],
)
def test_what_another_run_or_program_wrote_is_an_error(run, content, message):
    with pytest.raises(ConfigError, match=rf"metrics.json is not what the run .*{message}.*; name that run's folder"):
        read(run, content)


def test_a_folder_without_metrics_is_an_error(run):
    with pytest.raises(
        ConfigError, match=r"--run: .*run holds no metrics.json; name the folder of a run that has ended"
    ):
        read_run(run, {})


def test_find_run_finds_the_folder_around_an_artifact(run, tmp_path):
    artifact = open_artifact(run / "artifact")
    assert find_run(artifact) is None
    (run / "metrics.json").write_text("{}")
    assert find_run(artifact) == run
    (run / "artifact").rename(run / "copy")
    assert find_run(open_artifact(run / "copy")) is None
