"""Whole runs of dlrm, on a small population and on data of few rows: what they report, and what they refuse."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import log_loss, roc_auc_score

from dpq_rec import EmbeddingStore
from tests.training.command_line import alone, metrics_of, run
from training.data.batches import eval_batches
from training.models import dlrm

CLICKS = ["--num-users", "500", "--num-items", "200", "--num-interactions", "12000", "--data", "synthetic"]


@pytest.fixture(scope="session")
def clicks(tmp_path_factory):
    """A finished run of dlrm on two ranks, with string ids and features of every kind."""
    folder = tmp_path_factory.mktemp("clicks") / "run"
    features = ["--features", "price,segment,tags", "--string-ids"]
    result = run("dlrm", *CLICKS, *features, "--num-codes", 8, "--epochs", 4, "--patience", 9, "--out", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_dlrm_reports_the_metrics_of_what_it_leaves(clicks):
    """AUC by sklearn and entropy by its definition, from the served vectors and DLRM's saved weights alone."""
    data = ds.dataset(clicks / "synthetic", format="parquet", exclude_invalid_files=True).to_table().to_pydict()
    rows = [at for at, split in enumerate(data["split"]) if split == 2]
    store, weights = EmbeddingStore.open(clicks / "artifact"), load_file(clicks / "model.safetensors")
    vectors = [
        store.lookup(name, [data[name][at] for at in rows]).vectors for name in ("user_id", "item_id", "segment")
    ]
    tags = [store.lookup("tags", list(data["tags"][at])).vectors for at in rows]
    vectors.append(np.stack([each.mean(0) if len(each) else np.zeros(32) for each in tags]))
    price = np.array([[data["price"][at]] for at in rows])
    x = (price - weights["means_F"]) / weights["deviations_F"]
    for name in ("dense_arch.model._mlp.0._linear", "dense_arch.model._mlp.1._linear"):
        x = np.maximum(x @ weights[f"dlrm.{name}.weight"].T + weights[f"dlrm.{name}.bias"], 0)
    every = [x, *vectors]
    products = [(every[a] * every[b]).sum(1) for a in range(5) for b in range(a + 1, 5)]
    x = np.concatenate([x, np.stack(products, 1)], 1)
    for at in range(2):
        name = f"dlrm.over_arch.model.0._mlp.{at}._linear"
        x = np.maximum(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
    logits = (x @ weights["dlrm.over_arch.model.1.weight"].T + weights["dlrm.over_arch.model.1.bias"])[:, 0]
    labels = np.array([data["label"][at] for at in rows])
    metrics, share = metrics_of(clicks)["metrics"], labels.mean()
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-4)
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert metrics["normalised_entropy"] == pytest.approx(
        log_loss(labels, 1 / (1 + np.exp(-logits))) / entropy, rel=1e-3
    )


def test_dlrm_learns_from_features_and_chooses_its_epoch_by_auc(clicks):
    metrics = metrics_of(clicks)
    assert set(metrics["tables"]) == {"user_id", "item_id", "segment", "tags"}
    assert metrics["metrics"]["auc"] > 0.6
    aucs = [epoch["auc"] for epoch in metrics["history"]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(aucs))
    assert not [name for name in load_file(clicks / "model.safetensors") if "embedding" in name]


def test_dlrm_needs_no_features(tmp_path):
    arguments = [*CLICKS, "--embedding", "full", "--epochs", 2, "--vocabulary", "modulo", "--num-buckets", 64]
    assert alone("dlrm", *arguments, "--out", tmp_path / "run") == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["tables"]["user_id"]["num_embeddings"] == 64
    assert metrics["metrics"]["auc"] > 0.5


def test_dlrm_measures_a_split_of_fewer_rows_than_ranks(tmp_path, monkeypatch):
    """One rank reads what three would, one of which has no row."""
    ids, splits = np.arange(60), np.zeros(60, np.int8)
    splits[:4] = [1, 1, 2, 2]
    columns = {"user_id": ids % 20, "item_id": ids % 7, "label": ids % 2, "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    counts = []

    def of_three_ranks(*arguments, **options):
        for rank in range(3):
            counts.append([])
            for batch in eval_batches(*arguments, **{**options, "rank": rank, "world_size": 3}):
                counts[-1].append(batch.num_examples)
                yield batch

    monkeypatch.setattr(dlrm, "eval_batches", of_three_ranks)
    arguments = ["--data", tmp_path / "data.parquet", "--embedding", "full", "--epochs", 1]
    assert alone("dlrm", *arguments, "--out", tmp_path / "run") == 0
    assert counts == [[1], [1], [0]] * 2
    assert set(metrics_of(tmp_path / "run")["metrics"]) == {"auc", "normalised_entropy"}


def test_dlrm_refuses_data_without_labels_and_features_that_are_not_there(tmp_path, capsys):
    ids = np.arange(60)
    pq.write_table(pa.table({"user_id": ids % 20, "item_id": ids % 7}), tmp_path / "data.parquet")
    arguments = ["--data", tmp_path / "data.parquet", "--out", tmp_path / "run"]
    assert alone("dlrm", *arguments) == 2
    assert "label: got no such column" in capsys.readouterr().err
    pq.write_table(pa.table({"user_id": ids, "item_id": ids, "label": ids % 2}), tmp_path / "data.parquet")
    assert alone("dlrm", *arguments, "--features", "age") == 2
    assert "features: got age, which is not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "name", "counts"), [(0, "train", "0 of 0 and 20 of 1"), (1, "validation", "20 of 0 and 0 of 1")]
)
def test_dlrm_refuses_labels_that_are_all_the_same_in_a_split(tmp_path, capsys, split, name, counts):
    ids, splits = np.arange(60), np.repeat([0, 1, 2], 20).astype(np.int8)
    labels = np.where(splits == split, 1 - split, ids % 2)
    pq.write_table(
        pa.table({"user_id": ids % 20, "item_id": ids % 7, "label": labels, "split": splits}), tmp_path / "data.parquet"
    )
    assert alone("dlrm", "--data", tmp_path / "data.parquet", "--out", tmp_path / "run") == 2
    assert f"label: got {counts} in the {name} rows, want some of each" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["a.b", "items", "type", "größe", "two words", "-x"])
def test_dlrm_refuses_a_feature_whose_name_no_table_can_have(tmp_path, capsys, name):
    ids = np.arange(60)
    columns = {"user_id": ids % 20, "item_id": ids % 7, "label": ids % 2, name: ["x"] * 60}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert alone("dlrm", "--data", tmp_path / "data.parquet", "--out", tmp_path / "run", f"--features={name}") == 2
    assert f"features: got {name!r}, whose table is named so" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def write_clicks(path, **features):
    """2,000 interactions of which every tenth is held out; the label is by chance."""
    rng, ids = np.random.default_rng(0), np.arange(2000)
    columns = {"user_id": ids % 20, "item_id": ids % 7, "label": rng.integers(0, 2, 2000)}
    splits = np.where(ids % 10 == 9, 1, np.where(ids % 10 == 8, 2, 0)).astype(np.int8)
    pq.write_table(pa.table({**columns, "split": splits, **features}), path)
    return ["--data", path, "--embedding", "full", "--out", path.with_name("run")]


def test_dlrm_learns_from_seconds_since_1970(tmp_path):
    """As float32 they would all be one number: it tells 128 seconds apart there."""
    seconds = np.random.default_rng(1).integers(0, 60, 2000)
    arguments = write_clicks(tmp_path / "a.parquet", at=1_700_000_000 + seconds, label=(seconds >= 30).astype(np.int8))
    assert alone("dlrm", *arguments, "--features", "at", "--epochs", 3) == 0
    assert metrics_of(tmp_path / "run")["metrics"]["auc"] > 0.95


def test_dlrm_leaves_out_features_without_values_and_says_so(tmp_path, caplog):
    nothing = {
        "unknown": pa.nulls(2000),
        "number": pa.nulls(2000, pa.float64()),
        "word": pa.nulls(2000, pa.string()),
        "coded": pa.nulls(2000, pa.dictionary(pa.int8(), pa.string())),
        "words": pa.nulls(2000, pa.list_(pa.string())),
        "lists": pa.array([[]] * 2000, pa.list_(pa.null())),
        "held_out": pa.array(["x" if row % 10 == 8 else None for row in range(2000)]),
    }
    arguments = write_clicks(tmp_path / "a.parquet", **nothing, one=["a", "b"] * 1000)
    assert alone("dlrm", *arguments, "--features", ",".join([*nothing, "one"]), "--epochs", 1) == 0
    assert set(metrics_of(tmp_path / "run")["tables"]) == {"user_id", "item_id", "one"}
    for name in ("unknown", "lists"):
        assert f"features: {name} has no values in any file; it is left out" in caplog.text
    for name in ("word", "coded", "words", "held_out"):
        assert f"features: {name} has no value in the training rows; it is left out" in caplog.text
    assert "number: 1600 of 1600 training rows have no number; they count as 0" in caplog.text
