"""Runs that train on the validation split too, beside runs on data whose validation rows were training rows before."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import EmbeddingStore
from training.__main__ import main
from training.models.dlrm import DLRMTask

NUM_ROWS, NUM_USERS, NUM_ITEMS = 3000, 100, 60
TRAIN, VALIDATION, TEST = 0, 1, 2
ONLY_IN_VALIDATION = 7000  # a user and an item
NOWHERE_ELSE = 8000  # a user of the validation rows that keep a run without --refit going
FEATURES = ["--features", "price,segment"]
DPQ = ["--num-subspaces", 4, "--num-codes", 8]


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def drawn():
    """Columns with rows of all splits."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, NUM_USERS, NUM_ROWS), rng.integers(0, NUM_ITEMS, NUM_ROWS)
    splits = rng.choice([TRAIN, VALIDATION, TEST], NUM_ROWS, p=[0.7, 0.2, 0.1]).astype(np.int8)
    users[np.flatnonzero(splits == VALIDATION)[:4]] = ONLY_IN_VALIDATION
    items[np.flatnonzero(splits == VALIDATION)[2:6]] = ONLY_IN_VALIDATION
    return {
        "user_id": users,
        "item_id": items,
        "split": splits,
        "label": ((users + items) % 3 == 0).astype(np.int8),
        "price": rng.normal(np.where(splits == VALIDATION, 5, 0), 1),  # other statistics with validation rows
        "segment": np.where(splits == VALIDATION, "late", np.array(["a", "b"])[items % 2]),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "interactions.parquet", drawn())


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The same rows, those of validation marked as training, and two that no metric or table depends on."""
    columns = drawn()
    columns["split"] = np.where(columns["split"] == VALIDATION, TRAIN, columns["split"]).astype(np.int8)
    more = {"user_id": [NOWHERE_ELSE] * 2, "item_id": [1, 2], "split": np.full(2, VALIDATION, np.int8)}
    more |= {"label": np.array([0, 1], np.int8), "price": [1e6, -1e9], "segment": ["x", "y"]}
    joined = {name: np.concatenate([values, more[name]]) for name, values in columns.items()}
    return write(tmp_path_factory.mktemp("marked") / "interactions.parquet", joined)


def run(*arguments):
    """One rank, in this process: its exit code."""
    return main([str(argument) for argument in arguments])


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def bytes_left(folder):
    """Every tensor of the artifact and outside it, file by file; the manifest says when it was made."""
    files = [folder / "model.safetensors", *(folder / "artifact").rglob("*.safetensors")]
    return {path.name: path.read_bytes() for path in files}


def common(recipe, kind):
    sizes = ["--batch-size", 128, "--embedding-dim", 16, "--embedding", kind]
    return [recipe, *sizes, *(FEATURES if recipe == "dlrm" else ["--num-negatives", 32])]


@pytest.mark.parametrize(
    ("recipe", "kind", "epochs"),
    [
        ("two-tower", "full", ["--epochs", 1]),
        ("two-tower", "dpq-vq", [*DPQ, "--epochs", 3, "--full-epochs", 2, "--min-count", 35]),
        ("dlrm", "dpq-sx", [*DPQ, "--epochs", 2, "--full-epochs", 1]),
    ],
)
def test_refit_is_a_run_whose_validation_rows_train(data, marked, tmp_path, recipe, kind, epochs):
    """The run without the flag measures one epoch, so that it keeps the last one too."""
    arguments = [*common(recipe, kind), *epochs]
    assert run(*arguments, "--data", data, "--refit", "--out", tmp_path / "refit") == 0
    assert run(*arguments, "--data", marked, "--out", tmp_path / "marked") == 0
    refit, other = metrics_of(tmp_path / "refit"), metrics_of(tmp_path / "marked")
    without = [{name: epoch[name] for name in ("epoch", "loss", "codes")} for epoch in other["history"]]
    assert refit["history"] == without != other["history"]
    assert [refit[name] == other[name] for name in ("metrics", "tables", "best_epoch")] == [True] * 3
    assert bytes_left(tmp_path / "refit") == bytes_left(tmp_path / "marked")


@pytest.fixture(scope="module")
def chosen(data, tmp_path_factory):
    """A run of dlrm that chose its epoch by validation, with its own patience of 3."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    arguments = [*common("dlrm", "dpq-vq"), *DPQ, "--epochs", 2, "--full-epochs", 1]
    assert run(*arguments, "--data", data, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def refitted(chosen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refitted") / "run"
    assert run("--config", chosen / "metrics.json", "--refit", "--epochs", 6, "--out", folder) == 0
    return folder


def test_refit_of_an_earlier_run_keeps_the_last_epoch_and_knows_what_only_validation_holds(chosen, refitted):
    """Also past the patience that the earlier run had."""
    metrics = metrics_of(refitted)
    assert metrics["best_epoch"] == len(metrics["history"]) == 6
    assert {name for epoch in metrics["history"] for name in epoch} == {"epoch", "loss", "codes"}
    assert set(metrics["metrics"]) == {"auc", "normalised_entropy"}
    for folder, missing in ((chosen, [0]), (refitted, [])):
        store = EmbeddingStore.open(folder / "artifact")
        found = [store.lookup(name, [ONLY_IN_VALIDATION]).missing.tolist() for name in ("user_id", "item_id")]
        assert found == [missing] * 2


@pytest.mark.parametrize("disturbed", [2, 6])
def test_refit_that_goes_on_ends_as_an_undisturbed_one(chosen, refitted, tmp_path, break_off, disturbed):
    arguments = ["--config", chosen / "metrics.json", "--refit", "--epochs", 6, "--out", tmp_path / "run"]
    break_off(DLRMTask, disturbed, lambda: run(*arguments))
    assert run(*arguments) == 0
    one, other = metrics_of(refitted), metrics_of(tmp_path / "run")
    assert [one[name] == other[name] for name in ("metrics", "history", "best_epoch")] == [True] * 3
    assert bytes_left(refitted) == bytes_left(tmp_path / "run")


def test_run_from_before_the_option_goes_on_and_is_no_refit(chosen, tmp_path, capsys):
    folder = shutil.copytree(chosen, tmp_path / "run")
    content = json.loads((folder / "config.json").read_text())
    del content["data"]["refit"]
    (folder / "config.json").write_text(json.dumps(content))
    arguments = ["--config", chosen / "metrics.json", "--out", folder]
    assert run(*arguments, "--refit") == 2
    assert "belongs to another run (data.refit: None there, True here)" in capsys.readouterr().err
    assert run(*arguments) == 0


def test_refit_takes_data_without_validation_rows_and_needs_test_rows(tmp_path, capsys):
    """Two rows a user: by the default split one trains and one is the test."""
    ids = {"user_id": np.repeat(np.arange(200), 2), "item_id": np.arange(400) * 7 % 30}
    arguments = ["two-tower", "--embedding", "full", "--epochs", 1, "--data", write(tmp_path / "ids.parquet", ids)]
    assert run(*arguments, "--out", tmp_path / "run") == 2
    assert "got 0 validation and 200 test rows, want some of each" in capsys.readouterr().err
    assert run(*arguments, "--refit", "--out", tmp_path / "run") == 0
    write(tmp_path / "ids.parquet", {**ids, "split": np.arange(400, dtype=np.int8) % 2})
    assert run(*arguments, "--refit", "--out", tmp_path / "other") == 2
    assert "data: got no test rows, want some; without a column `split`, users need two" in capsys.readouterr().err


def test_refit_generates_the_same_population(tmp_path):
    sizes = ["--num-users", 200, "--num-items", 50, "--num-interactions", 2000, "--epochs", 1, "--embedding", "full"]
    for name, flag in (("refit", "--refit"), ("plain", "--no-refit")):
        assert run("two-tower", "--data", "synthetic", *sizes, flag, "--out", tmp_path / name) == 0
    tables = [pq.read_table(tmp_path / name / "synthetic" / "part-00000.parquet") for name in ("refit", "plain")]
    assert tables[0].equals(tables[1])
