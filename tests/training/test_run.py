"""Whole runs of `torchrun -m training`, on a small population: what they leave, how they go on, what they refuse."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpq_rec import EmbeddingStore, unpack_codes, verify
from tests.training.command_line import ROOT, alone, command, metrics_of, run

SIZES = ["--num-users", "3000", "--num-items", "500", "--num-interactions", "60000", "--data", "synthetic"]
SMALL = [*SIZES, "--embedding-dim", "16", "--batch-size", "512"]
QUICK = [*SMALL, "--num-negatives", "256", "--patience", "9", "--epochs", "3"]
DPQ = ["--num-subspaces", "8", "--num-codes", "16"]
QUANTIZED = [*DPQ, "--full-epochs", "0"]  # every epoch has codes and metrics
KINDS = {kind: ["--embedding", kind, *([] if kind == "full" else QUANTIZED)] for kind in ("full", "dpq-sx", "dpq-vq")}
RUNNING = [*KINDS["dpq-vq"], "--ema-decay", "0.95", "--revive-after", "5", "--full-epochs", "1", "--no-batch-norm"]


def differing(one, other):
    """What two runs of the same must agree in: metrics, and losses and metrics of every epoch."""
    return {k: (one[k], other[k]) for k in ("metrics", "history", "best_epoch") if one[k] != other[k]}


@pytest.fixture(scope="session")
def two_tower(tmp_path_factory):
    """Kind of table -> the folder of a finished run on two ranks, trained when it is first wanted."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind) / "run"
            more = {"running means": RUNNING, "history": [*RUNNING, "--history", "8"]}
            result = run("two-tower", *{**KINDS, **more}[kind], "--out", folder, *QUICK)
            assert result.returncode == 0, result.stderr[-3000:]
            folders[kind] = folder
        return folders[kind]

    return folder_of


@pytest.fixture(params=KINDS)
def finished(request, two_tower):
    return two_tower(request.param)


def test_run_leaves_what_the_contract_names(finished):
    metrics = metrics_of(finished)
    assert {"recipe", "embedding", "seed", "world_size", "config", "metrics", "tables", "total"} <= set(metrics)
    assert [metrics[name] for name in ("world_size", "batch_size", "num_negatives")] == [2, 512, 256]
    assert set(metrics["metrics"]) == {"recall@10", "ndcg@10", "recall@20", "ndcg@20"}
    sizes = {"num_embeddings", "embedding_dim", "full_bytes", "artifact_bytes", "vocabulary_bytes", "compression_ratio"}
    assert all(set(table) == {*sizes, "layout"} for table in metrics["tables"].values())
    assert set(metrics["total"]) == sizes
    layout = {"num_subspaces": 8, "num_codes": 16, "num_levels": 1, "values_dtype": "float32"}
    layout = None if metrics["embedding"] == "full" else layout
    assert [table["layout"] for table in metrics["tables"].values()] == [layout] * 2
    assert metrics["examples_per_second"] > 0
    assert metrics["seconds"] > 0
    assert load_file(finished / "model.safetensors")["temperature"] == np.float32(0.1)
    assert len(list((finished / "checkpoints").glob("epoch-*"))) == 1
    assert not list((finished / "checkpoints").glob("candidate-*"))


def test_run_leaves_an_artifact_with_the_bytes_it_reports(finished):
    artifact, metrics = verify(finished / "artifact"), metrics_of(finished)
    assert set(artifact.tables) == {"user_id", "item_id"}
    for name, table in artifact.tables.items():
        tensors = load_file(finished / "artifact" / table.manifest.file)
        stored = sum(tensors[n].nbytes for n in ("packed_codes", "values", "vectors") if n in tensors)
        assert metrics["tables"][name]["artifact_bytes"] == stored
        vocabulary = sum(tensors[n].nbytes for n in ("ids", "rows", "id_tree"))
        assert metrics["tables"][name]["vocabulary_bytes"] == vocabulary
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


def test_with_a_history_users_have_no_table_and_are_told_by_the_mean_of_their_items(two_tower):
    """recall@10 of the artifact, as the one above, each user's vector averaged over the items of its training rows."""
    finished = two_tower("history")
    assert list(metrics_of(finished)["tables"]) == list(verify(finished / "artifact").tables) == ["item_id"]
    data = ds.dataset(finished / "synthetic", format="parquet", exclude_invalid_files=True).to_table()
    columns = [data[name].to_pylist() for name in ("user_id", "item_id", "split")]
    chosen, seen, hits = {}, {}, []
    for user, item, split in zip(*columns, strict=True):
        chosen.setdefault(user, set()).update([item] if split == 0 else [])
        seen.setdefault(user, set()).update([item] if split < 2 else [])
    items = np.array(sorted(set.union(*chosen.values())))
    vectors = EmbeddingStore.open(finished / "artifact").lookup("item_id", items).vectors
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for user, item, split in zip(*columns, strict=True):
        if split == 2:
            scores = directions @ vectors[np.isin(items, list(chosen[user]))].mean(0)
            scores[np.isin(items, list(seen[user]))] = -np.inf
            at = np.searchsorted(items, item)
            known = at < len(items) and items[at] == item and np.isfinite(scores[at])
            hits.append(known and (scores >= scores[at] - 1e-5).sum() <= 10)
    assert metrics_of(finished)["metrics"]["recall@10"] == pytest.approx(np.mean(hits), abs=0.005)
    assert metrics_of(finished)["metrics"]["recall@20"] > 0.08  # a random ranking: 0.04


def test_training_learns_the_planted_structure(finished):
    """A random ranking would find 20 of 500 items: recall@20 of 0.04."""
    assert metrics_of(finished)["metrics"]["recall@20"] > 0.08
    losses = [epoch["loss"] for epoch in metrics_of(finished)["history"]]
    assert losses[0] > losses[-1]


def test_metrics_hold_the_codes_of_every_epoch(two_tower):
    """The last epoch's code statistics, where it is the best, are those of the artifact that the run leaves."""
    assert all(epoch["codes"] == {} for epoch in metrics_of(two_tower("full"))["history"])
    metrics = metrics_of(two_tower("dpq-vq"))
    first, *_, last = metrics["history"]
    assert all(first["codes"][name]["changed"] is None for name in ("user_id", "item_id"))
    assert all(0 < share < 1 for name in ("user_id", "item_id") for share in last["codes"][name]["changed"])
    best = metrics["history"][metrics["best_epoch"] - 1]["codes"]["item_id"]
    table = verify(two_tower("dpq-vq") / "artifact").tables["item_id"]
    codes_VM = unpack_codes(table.tensors["packed_codes"], table.manifest.layout)
    assert best["used_codes"] == [len(set(column)) for column in codes_VM.T.tolist()]
    assert all(1 < perplexity <= used for perplexity, used in zip(best["perplexity"], best["used_codes"], strict=True))


def scalars(folder):
    """Tag -> [(step, value)] as TensorBoard would show them."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_loss_metrics_and_codes(two_tower):
    metrics, shown = metrics_of(two_tower("dpq-vq")), scalars(two_tower("dpq-vq"))
    num_steps = (60000 - 2 * 3000) // (512 * 2)
    assert [step for step, _ in shown["validation/ndcg@10"]] == [num_steps, 2 * num_steps, 3 * num_steps]
    assert [v for _, v in shown["validation/ndcg@10"]] == pytest.approx([e["ndcg@10"] for e in metrics["history"]])
    losses = [value for step, value in shown["train/loss"] if step <= num_steps]
    assert np.mean(losses) == pytest.approx(metrics["history"][0]["loss"], rel=0.1)
    codes = metrics["history"][-1]["codes"]["item_id"]
    assert shown["perplexity/item_id/level0_subspace007"][-1][1] == pytest.approx(codes["perplexity"][7])
    assert shown["used_codes/item_id/level0_subspace000"][-1][1] == codes["used_codes"][0]
    assert len(shown["changed_codes/user_id/level0_subspace000"]) == 2  # nothing to compare the first epoch with


def test_a_finished_run_started_again_returns_at_once(two_tower):
    """Without its data, and without writing: on both ranks, or the one that reads would wait for the other."""
    folder = two_tower("dpq-vq")
    before = (folder / "metrics.json").read_bytes(), (folder / "metrics.json").stat().st_mtime_ns
    (folder / "synthetic").rename(folder / "hidden")
    try:
        result = run("two-tower", *KINDS["dpq-vq"], "--out", folder, *QUICK)
        assert not (folder / "synthetic").exists()
    finally:
        (folder / "hidden").rename(folder / "synthetic")
    assert result.returncode == 0, result.stderr[-3000:]
    assert ((folder / "metrics.json").read_bytes(), (folder / "metrics.json").stat().st_mtime_ns) == before
    assert f"ndcg@10 {metrics_of(folder)['metrics']['ndcg@10']:.4f}" in result.stdout


@pytest.mark.parametrize("left", ["metrics.json", "artifact"])
def test_a_run_without_checkpoints_is_a_run_as_long_as_it_has_results(two_tower, tmp_path, capsys, left):
    for name in ("config.json", left):
        copy = shutil.copytree if name == "artifact" else shutil.copy
        copy(two_tower("full") / name, tmp_path / name)
    arguments = ["--config", two_tower("full") / "metrics.json", "--out", tmp_path, "--seed", 1]
    assert alone(*arguments) == 2
    assert "belongs to another run (run.seed: 0 there, 1 here" in capsys.readouterr().err


def write_interactions(path, num_users):
    table = pa.table({"user_id": np.repeat(np.arange(num_users), 5), "item_id": np.arange(5 * num_users) * 7 % 30})
    pq.write_table(table, path)


def test_run_goes_on_with_the_data_it_began_with_alone(tmp_path, capsys):
    write_interactions(tmp_path / "data.parquet", 40)
    arguments = ["two-tower", "--data", tmp_path / "data.parquet", "--out", tmp_path / "run", "--epochs", 1]
    arguments += ["--embedding", "full"]
    assert alone(*arguments) == 0
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been killed before it measured
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    write_interactions(tmp_path / "data.parquet", 41)
    capsys.readouterr()
    assert alone(*arguments) == 2
    assert "--data: the data have changed since epoch 1; name another --out" in capsys.readouterr().err
    write_interactions(tmp_path / "data.parquet", 40)
    assert alone(*arguments) == 0


def test_the_configuration_in_metrics_json_is_enough_to_run_again(two_tower, tmp_path):
    result = run("--config", two_tower("dpq-sx") / "metrics.json", "--out", tmp_path / "again")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not differing(metrics_of(tmp_path / "again"), metrics_of(two_tower("dpq-sx")))


def test_run_refuses_the_folder_of_another_configuration(two_tower, capsys):
    arguments = ["--config", two_tower("full") / "metrics.json", "--out", two_tower("full"), "--epochs", 4]
    assert alone(*arguments) == 2
    shown = capsys.readouterr().err
    assert "belongs to another run (optimisation.epochs: 3 there, 4 here; world_size: 2 there, 1 here)" in shown


def test_run_refuses_a_folder_with_other_things(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert alone("two-tower", "--out", tmp_path, *QUICK) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "options",
    [
        "--negatives in-batch --similarity dot --temperature 1 --optimizer adagrad",
        "--negatives both --optimizer sgd --learning-rate 5 --start-from kmeans --num-levels 2 --values-dtype float16",
        "--embedding dpq-sx --key-dim 4 --share-subspaces --string-ids --min-count 2",
        "--num-levels 4 --tiers 0.1:3,0.5:1 --per-table user_id.num_codes=8 --full-epochs 1",
    ],
)
def test_options_train_together(tmp_path, options):
    """A random ranking would find 20 of 500 items: recall@20 of 0.04."""
    drawn = [] if "in-batch" in options else ["--num-negatives", 256]
    arguments = [*SMALL, "--epochs", 2, *drawn, *DPQ, *options.split(), "--out", tmp_path / "run"]
    assert alone("two-tower", *arguments) == 0
    found = metrics_of(tmp_path / "run")
    assert found["metrics"]["recall@20"] > 0.05
    if "tiers" in options:
        layouts = {name: table["layout"] for name, table in found["tables"].items()}
        assert {name: layout["num_codes"] for name, layout in layouts.items()} == {"user_id": 8, "item_id": 16}
        assert [tier["num_levels"] for tier in layouts["item_id"]["tiers"]] == [4, 3, 1]
        rows = [tier["rows"] for tier in layouts["item_id"]["tiers"]]
        code_bits = sum(n * levels * 8 * 4 for n, levels in zip(rows, (4, 3, 1), strict=True))
        full_bits = 32 * 16 * sum(rows)
        values_bits = 4 * 16 * 16 * 32  # levels, codes, numbers
        assert found["paper_ratios"]["item_id"] == pytest.approx(full_bits / (code_bits + values_bits))
        assert found["tables"]["item_id"]["artifact_bytes"] == (code_bits + values_bits) // 8
        verify(tmp_path / "run" / "artifact")


def start(*arguments, **more):
    return subprocess.Popen(command(*arguments, **more), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ranks_of(process):
    """The ranks' process ids: torchrun's children."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        assert process.poll() is None, f"the run ended before {path} came"
        time.sleep(0.01)


def test_a_run_whose_rank_is_killed_goes_on_and_ends_as_an_undisturbed_one(two_tower, tmp_path):
    """With all that a quantizer holds: running means, and the steps since a code was used; from the warm-up on."""
    process = start("two-tower", *RUNNING, *QUICK, "--out", tmp_path / "run", restarts=1)
    wait_for(tmp_path / "run" / "checkpoints" / "epoch-0001", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown[-3000:]
    assert re.search("going on after epoch [12] ", shown)
    assert not differing(metrics_of(tmp_path / "run"), metrics_of(two_tower("running means")))
    whole, killed = scalars(two_tower("running means")), scalars(tmp_path / "run")
    assert killed == whole  # no point twice, none lost


def test_run_refuses_a_folder_in_which_a_run_is_going_on(tmp_path, capsys):
    arguments = ["two-tower", *SMALL, "--num-negatives", 256, "--epochs", 9999, "--patience", 9999]
    arguments += ["--out", tmp_path / "run"]
    process = start(*arguments)
    try:
        wait_for(tmp_path / "run" / "config.json", process)
        code = alone(*arguments)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert code == 2
    assert "a run is going on in" in capsys.readouterr().err


def test_a_corrected_setting_may_use_the_folder_of_a_run_that_trained_nothing(tmp_path, capsys):
    assert alone("two-tower", *QUICK, "--num-interactions", 10, "--out", tmp_path / "run") == 2
    assert "training: num_interactions: got 10, want at least" in capsys.readouterr().err
    assert alone("two-tower", *QUICK, "--epochs", 1, "--out", tmp_path / "run") == 0


def test_run_takes_data_smaller_than_a_batch(tmp_path, caplog):
    """Forty users of five items, in the order of their rows: no split column, no options."""
    write_interactions(tmp_path / "data.parquet", 40)
    assert alone("two-tower", "--data", tmp_path / "data.parquet", "--out", tmp_path / "run", "--epochs", 2) == 0
    assert "batches of 6, not 4096, with 6 negatives, not 4096: there are 120 examples" in caplog.text
    assert [metrics_of(tmp_path / "run")[name] for name in ("batch_size", "num_negatives")] == [6, 6]
    assert metrics_of(tmp_path / "run")["tables"]["user_id"]["num_embeddings"] == 40


def test_run_refuses_data_without_a_test_split_before_it_trains(tmp_path, capsys):
    ids = np.arange(5000) % 50
    table = pa.table({"user_id": ids, "item_id": ids, "split": np.where(ids < 49, 0, 1).astype(np.int8)})
    pq.write_table(table, tmp_path / "data.parquet")
    assert alone("two-tower", "--data", tmp_path / "data.parquet", "--out", tmp_path / "run") == 2
    assert "got 100 validation and 0 test rows, want some of each" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_stops_early_and_keeps_the_best_epoch(tmp_path):
    arguments = [
        *SMALL,
        "--num-negatives",
        256,
        "--epochs",
        60,
        "--patience",
        1,
        "--learning-rate",
        3,
        "--full-epochs",
        0,
    ]
    assert alone("two-tower", *arguments, "--out", tmp_path / "run") == 0
    metrics = metrics_of(tmp_path / "run")
    validation = [epoch["ndcg@10"] for epoch in metrics["history"]]
    assert metrics["best_epoch"] == 1 + int(np.argmax(validation))
    assert len(validation) == metrics["best_epoch"] + 1 < 60
