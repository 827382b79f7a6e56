"""Whole runs of `torchrun -m training`, on a small population: what they leave, how they go on, what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dpq_rec import EmbeddingStore, verify

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--num-users", "3000", "--num-items", "500", "--num-interactions", "60000", "--data", "synthetic"]
SMALL = [*SIZES, "--embedding-dim", "16", "--num-subspaces", "8", "--num-codes", "16", "--batch-size", "512"]
QUICK = [*SMALL, "--num-negatives", "256", "--patience", "9"]


def command(*arguments, ranks=2):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, "-m", "training", "two-tower", *map(str, arguments)]


def run(*arguments, ranks=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make minutes of seconds
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module", params=["full", "dpq-sx", "dpq-vq"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    result = run("--embedding", request.param, "--epochs", 3, "--out", folder, *QUICK)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_run_leaves_what_the_contract_names(finished):
    metrics = metrics_of(finished)
    assert {"recipe", "embedding", "seed", "world_size", "config", "metrics", "tables", "total"} <= set(metrics)
    assert metrics["world_size"] == 2
    assert set(metrics["metrics"]) == {"recall@10", "ndcg@10", "recall@20", "ndcg@20"}
    sizes = {"num_embeddings", "embedding_dim", "full_bytes", "artifact_bytes", "vocabulary_bytes", "compression_ratio"}
    assert all(set(table) == sizes for table in [*metrics["tables"].values(), metrics["total"]])
    assert metrics["examples_per_second"] > 0
    assert metrics["seconds"] > 0
    assert load_file(finished / "model.safetensors")["temperature"] == np.float32(0.1)
    assert list((finished / "checkpoints").glob("epoch-*"))


def test_run_leaves_an_artifact_with_the_bytes_it_reports(finished):
    artifact, metrics = verify(finished / "artifact"), metrics_of(finished)
    assert set(artifact.tables) == {"user_id", "item_id"}
    for name, table in artifact.tables.items():
        tensors = load_file(finished / "artifact" / table.manifest.file)
        stored = sum(tensors[n].nbytes for n in ("packed_codes", "values", "vectors") if n in tensors)
        assert metrics["tables"][name]["artifact_bytes"] == stored
        assert metrics["tables"][name]["vocabulary_bytes"] == tensors["ids"].nbytes + tensors["rows"].nbytes
        full = 4 * 16 * metrics["tables"][name]["num_embeddings"]
        assert metrics["tables"][name]["compression_ratio"] == pytest.approx(full / stored)
    assert (table.manifest.kind == "dense") == (metrics["embedding"] == "full")


def test_reported_metrics_are_those_of_the_served_vectors(finished):
    """recall@10 of the artifact, by sorting every user's scores with numpy."""
    data = ds.dataset(finished / "synthetic", format="parquet", exclude_invalid_files=True).to_table()
    interactions = list(zip(*(data[name].to_pylist() for name in ("user_id", "item_id", "split")), strict=True))
    store, seen, hits = EmbeddingStore.open(finished / "artifact"), {}, []
    for user, item, split in interactions:
        if split < 2:
            seen.setdefault(user, set()).add(item)
    items = np.array(sorted({item for _, item, split in interactions if split == 0}))
    vectors = store.lookup("item_id", items).vectors
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for user, item, split in interactions:
        if split != 2:
            continue
        scores = vectors @ store.lookup("user_id", [user]).vectors[0]
        scores[np.isin(items, list(seen.get(user, set())))] = -np.inf
        at = np.searchsorted(items, item)
        known = at < len(items) and items[at] == item and np.isfinite(scores[at])
        hits.append(known and (scores >= scores[at] - 1e-5).sum() <= 10)
    assert metrics_of(finished)["metrics"]["recall@10"] == pytest.approx(np.mean(hits), abs=0.005)


def test_training_learns_the_planted_structure(finished):
    """A random ranking would find 20 of 500 items: recall@20 of 0.04."""
    assert metrics_of(finished)["metrics"]["recall@20"] > 0.08
    losses = [epoch["loss"] for epoch in metrics_of(finished)["history"]]
    assert losses[0] > losses[-1]


def test_a_finished_run_started_again_returns_at_once(finished):
    before = metrics_of(finished)
    result = run("--embedding", before["embedding"], "--epochs", 3, "--out", finished, *QUICK)
    assert result.returncode == 0
    assert metrics_of(finished)["metrics"] == before["metrics"]
    assert metrics_of(finished)["history"] == before["history"]


def test_run_refuses_the_folder_of_another_configuration(finished):
    result = run("--embedding", metrics_of(finished)["embedding"], "--epochs", 4, "--out", finished, *QUICK)
    assert result.returncode != 0
    assert "belongs to another run (epochs: 3 there, 4 here); name another folder" in result.stderr


def test_run_refuses_a_folder_with_other_things(tmp_path):
    (tmp_path / "thesis.tex").touch()
    result = run("--out", tmp_path, *QUICK, ranks=1)
    assert "is not empty and holds no run" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def start(*arguments):
    return subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL)


def ranks_of(process):
    """The ranks' process ids: torchrun's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        assert process.poll() is None, f"the run ended before {path} came"
        time.sleep(0.01)


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    arguments = ["--embedding", "dpq-sx", "--epochs", 6, *QUICK]
    process = start(*arguments, "--out", tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoints" / "epoch-0002", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = run(*arguments, "--out", tmp_path / "killed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert re.search("going on after epoch [2-5] ", again.stderr)
    assert run(*arguments, "--out", tmp_path / "whole").returncode == 0
    killed, whole = metrics_of(tmp_path / "killed"), metrics_of(tmp_path / "whole")
    assert killed["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
    assert [e["loss"] for e in killed["history"]] == pytest.approx([e["loss"] for e in whole["history"]], abs=1e-5)


def test_run_refuses_a_folder_in_which_a_run_is_going_on(tmp_path):
    arguments = [*SMALL, "--num-negatives", 256, "--epochs", 9999, "--patience", 9999, "--out", tmp_path / "run"]
    process = start(*arguments)
    try:
        wait_for(tmp_path / "run" / "config.json", process)
        second = run(*arguments, ranks=1)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert second.returncode != 0
    assert "a run is going on in" in second.stderr


def test_a_corrected_setting_may_use_the_folder_of_a_run_that_trained_nothing(tmp_path):
    refused = run(*SMALL, "--num-negatives", 256, "--num-interactions", 10, "--out", tmp_path / "run")
    assert refused.returncode != 0
    assert "training: num_interactions: got 10, want at least" in refused.stderr
    corrected = run(*QUICK, "--epochs", 1, "--out", tmp_path / "run")
    assert corrected.returncode == 0, corrected.stderr[-3000:]


def test_run_takes_data_smaller_than_a_batch(tmp_path):
    """Forty users of five items, in the order of their rows: no split column, no options."""
    table = pa.table({"user_id": np.repeat(np.arange(40), 5), "item_id": np.arange(200) * 7 % 30})
    pq.write_table(table, tmp_path / "data.parquet")
    result = run("--data", tmp_path / "data.parquet", "--out", tmp_path / "run", "--epochs", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "batches of 3, not 4096: there are 120 examples" in result.stderr
    assert metrics_of(tmp_path / "run")["tables"]["user_id"]["num_embeddings"] == 40


def test_run_refuses_data_without_a_test_split_before_it_trains(tmp_path):
    ids = np.arange(5000) % 50
    table = pa.table({"user_id": ids, "item_id": ids, "split": np.where(ids < 49, 0, 1).astype(np.int8)})
    pq.write_table(table, tmp_path / "data.parquet")
    result = run(*QUICK, "--data", tmp_path / "data.parquet", "--out", tmp_path / "run", ranks=1)
    assert "got 100 validation and 0 test rows, want some of each" in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_stops_early_and_keeps_the_best_epoch(tmp_path):
    arguments = [*SMALL, "--num-negatives", 256, "--epochs", 60, "--patience", 1, "--learning-rate", 3]
    result = run(*arguments, "--out", tmp_path / "run", ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = metrics_of(tmp_path / "run")
    validation = [epoch["ndcg@10"] for epoch in metrics["history"]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(validation))
    assert len(validation) == metrics["best_epoch"] + 1 < 60
