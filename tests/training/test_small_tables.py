"""Runs with tables of few rows: those that codes and values make no smaller stay plain, and are counted as such."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import EmbeddingStore, verify
from dpq_rec.cli import main as dpq_rec
from tests.training.command_line import alone, metrics_of, run
from training.models.dlrm import DLRMTask
from training.models.interactions import make_tables
from training.recipes import RECIPES, with_changes

QUICK = ["--epochs", 2, "--batch-size", 256]


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Clicks of 150 users on 100 items, seen in `place`, of which there are two, with a list of five `tags`."""
    rng, count = np.random.default_rng(0), 3000
    places = np.array(["left", "right"])[rng.integers(0, 2, count)]
    columns = {
        "user_id": rng.integers(0, 150, count),
        "item_id": rng.integers(0, 100, count),
        "place": places,
        "tags": [list(rng.choice(list("abcde"), 2)) for _ in range(count)],
        "label": ((places == "left") ^ (rng.random(count) < 0.2)).astype(float),
    }
    path = tmp_path_factory.mktemp("clicks") / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return ["dlrm", "--data", path, "--features", "place,tags", *QUICK]


@pytest.fixture(scope="module")
def finished(clicks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run(*clicks, "--out", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stderr


def test_small_features_of_dlrm_stay_plain_and_are_said_once(finished):
    folder, shown = finished
    tables, total = metrics_of(folder)["tables"], metrics_of(folder)["total"]
    assert {name: table["layout"] is None for name, table in tables.items()} == {
        "user_id": False,
        "item_id": False,
        "place": True,
        "tags": True,
    }
    assert {name: tables[name]["artifact_bytes"] for name in ("place", "tags")} == {"place": 256, "tags": 640}
    assert all(table["compression_ratio"] >= 1 for table in tables.values())
    assert total["artifact_bytes"] == sum(table["artifact_bytes"] for table in tables.values())
    assert total["compression_ratio"] == total["full_bytes"] / total["artifact_bytes"] > 1
    said = (
        "table 'place' stays plain: its codes and values would take 4,116 bytes, its 2 rows take 256; --quantize-small"
    )
    assert [shown.count(text) for text in (said, "table 'tags' stays plain", "stays plain")] == [1, 1, 2]
    assert all(set(epoch["codes"]) == {"user_id", "item_id"} for epoch in metrics_of(folder)["history"])
    assert metrics_of(folder)["metrics"]["auc"] > 0.6


def test_artifact_of_small_tables_is_sound_looked_up_and_inspected(finished, capsys):
    artifact = finished[0] / "artifact"
    kinds = {name: table.manifest.kind for name, table in verify(artifact).tables.items()}
    assert kinds == {"user_id": "dpq", "item_id": "dpq", "place": "dense", "tags": "dense"}
    found = EmbeddingStore.open(artifact).lookup("place", ["left", "right", "below"])
    assert (found.vectors.shape, found.missing.tolist()) == ((3, 32), [2])
    assert dpq_rec(["inspect", str(artifact), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    shown = {name: table["kind"] for name, table in tables.items()}
    assert shown == kinds


def test_target_ratio_is_no_reason_to_refuse_a_run_for_its_small_tables(clicks, tmp_path, caplog):
    assert alone(*clicks, "--target-ratio", 10, "--out", tmp_path / "run") == 0
    tables = metrics_of(tmp_path / "run")["tables"]
    assert all(tables[name]["compression_ratio"] >= 10 for name in ("user_id", "item_id"))
    assert all(tables[name]["layout"] is None for name in ("place", "tags"))
    assert "table 'place' stays plain: target_ratio: got 10 for a table of 2 rows" in caplog.text
    assert metrics_of(tmp_path / "run")["total"]["compression_ratio"] > 7


def test_small_tables_are_quantized_where_that_is_asked_for(clicks, tmp_path):
    more = ["--epochs", 1, "--num-codes", 2, "--per-table", "place.quantize_small=true"]
    assert alone(*clicks, *more, "--out", tmp_path / "run") == 0
    plain = {name: table["layout"] is None for name, table in metrics_of(tmp_path / "run")["tables"].items()}
    assert plain == {"user_id": False, "item_id": False, "place": False, "tags": False}
    options = with_changes(RECIPES["dlrm"](".", "run").as_dict(), {"quantize-small": True}).embedding
    assert all(options.dpq_by_table({"place": 2}).values())


def test_run_of_small_tables_goes_on_as_an_undisturbed_one(clicks, finished, tmp_path, break_off):
    for folder, disturb in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        arguments = [*clicks, "--out", folder]
        if disturb:
            break_off(DLRMTask, 2, lambda arguments=arguments: alone(*arguments))
        assert alone(*arguments) == 0
    one, other = (metrics_of(tmp_path / name) for name in ("whole", "killed"))
    assert [one[name] == other[name] for name in ("metrics", "history", "tables", "total")] == [True] * 4


@pytest.mark.parametrize("more", [["--full-epochs", 1], ["--full-epochs", 0, "--start-from", "kmeans"]])
def test_run_whose_tables_are_all_small_trains_and_serves_plain_ones(clicks, tmp_path, more):
    """As --embedding full does, but for its epochs without metrics."""
    arguments = [*clicks, "--num-codes", 4096, *more]
    assert alone(*arguments, "--out", tmp_path / "run") == 0
    assert {table.manifest.kind for table in verify(tmp_path / "run" / "artifact").tables.values()} == {"dense"}
    assert metrics_of(tmp_path / "run")["total"]["compression_ratio"] == 1


def test_two_tower_trains_small_tables_plain_after_full_epochs(tmp_path):
    """Where rows of quantized tables are cut to length one, those of plain ones stay as they are."""
    sizes = ["--num-users", 400, "--num-items", 30, "--num-interactions", 3000, "--data", "synthetic"]
    arguments = [*sizes, "--num-negatives", 16, "--batch-size", 128, "--embedding-dim", 16, "--epochs", 3]
    assert alone("two-tower", *arguments, "--num-subspaces", 8, "--out", tmp_path / "run") == 0
    tables = verify(tmp_path / "run" / "artifact").tables
    assert {name: table.manifest.kind for name, table in tables.items()} == {"user_id": "dpq", "item_id": "dense"}
    lengths = np.linalg.norm(tables["item_id"].tensors["vectors"], axis=1)
    assert not np.allclose(lengths, 1, atol=1e-3)


def test_a_small_word_table_of_text_stays_plain(tmp_path):
    config = with_changes(RECIPES["language-model"](".", "run").as_dict(), {"num-codes": 256})
    assert config.embedding.dpq_by_table({"word": 9}) == {"word": None}


def test_no_table_is_asked_for_that_the_collection_would_warn_of(recwarn):
    options = RECIPES["dlrm"](".", "run").embedding
    make_tables({"a": ["a"], "b": ["b"]}, {"a": 2, "b": 900}, options)
    assert not [each for each in recwarn if "stays plain" in str(each.message)]
