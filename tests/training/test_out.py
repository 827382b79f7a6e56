"""Where a run writes: what it says and leaves on a full disk, and folders with names like those of other things."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from dpq_rec import verify
from dpq_rec.files import replace_file
from tests.limits import files_up_to
from tests.training.command_line import alone, metrics_of
from training.checkpoint import Checkpoints
from training.data.synthetic import SyntheticConfig, generate
from training.tensorboard import TensorBoard
from training.trainer import Run

QUICK = ["--embedding-dim", 16, "--full-epochs", 0, "--num-codes", 4, "--batch-size", 512, "--num-negatives", 64]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "a.parquet"
    columns = {"user_id": rng.integers(0, 400, 2000), "item_id": rng.integers(0, 100, 2000)}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def names(tmp_path):
    """What lies in a run's folder."""
    return lambda: {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}


def call_in_a_small_space(monkeypatch, owner, name, num_bytes, when=lambda *arguments: True):
    """Let a method write no larger file than that."""
    whole = getattr(owner, name)

    def limited(*arguments):
        if not when(*arguments):
            return whole(*arguments)
        with files_up_to(num_bytes):
            return whole(*arguments)

    monkeypatch.setattr(owner, name, limited)


def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_the_one_before(data, tmp_path, names, monkeypatch, capsys):
    arguments = ["two-tower", "--data", data, "--out", tmp_path / "run", *QUICK, "--epochs", 2]
    with monkeypatch.context() as patch:
        call_in_a_small_space(patch, Checkpoints, "save", 10_000, lambda _, progress: progress.epoch == 2)
        assert alone(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/run/checkpoints/epoch-0002 could not be written: [Errno 27] File too large" in error
    assert "epoch-0001 is there: make room, or mend what it says, and start the run again" in error
    assert {"checkpoints/epoch-0001/.metadata", "checkpoints/epoch-0001/progress.json"} < names()
    assert not {"checkpoints/.writing", "checkpoints/epoch-0002"} & names()
    assert alone(*arguments) == 0
    assert [epoch["epoch"] for epoch in metrics_of(tmp_path / "run")["history"]] == [1, 2]


@pytest.mark.parametrize(
    ("method", "num_bytes", "named", "absent"),
    [
        ("_freeze", 1000, "checkpoints/candidate-0001/artifact", "checkpoints/candidate-0001"),
        ("_keep_best", 500, "metrics.json", "metrics.json"),
    ],
)
def test_what_does_not_fit_is_named_and_not_left_in_part(
    data, tmp_path, names, monkeypatch, capsys, method, num_bytes, named, absent
):
    arguments = ["two-tower", "--data", data, "--out", tmp_path / "run", *QUICK, "--epochs", 1]
    with monkeypatch.context() as patch:
        call_in_a_small_space(patch, Run, method, num_bytes)
        assert alone(*arguments) == 2
    assert f"training: [Errno 27] File too large: '{tmp_path}/run/{named}'" in capsys.readouterr().err
    assert absent not in names()
    assert not [name for name in names() if name.endswith(".tmp")]
    assert alone(*arguments) == 0
    assert verify(tmp_path / "run" / "artifact").tables.keys() == {"user_id", "item_id"}


def test_weights_that_do_not_fit_are_named_and_not_left_in_part(tmp_path):
    with files_up_to(1000), pytest.raises(OSError, match=r"File too large: '.*/model\.safetensors'"):
        replace_file(tmp_path / "model.safetensors", save({"a": torch.zeros(1000)}))
    assert list(tmp_path.iterdir()) == []


def test_a_population_that_does_not_fit_is_named_and_not_left_in_part(tmp_path):
    config = SyntheticConfig(num_users=100, num_items=50, num_interactions=2000)
    with files_up_to(1000), pytest.raises(OSError, match=r"File too large: '.*/s3:x'"):
        generate(config, tmp_path / "s3:x")
    assert list(tmp_path.iterdir()) == []
    assert (generate(config, tmp_path / "s3:x") / "part-00000.parquet").is_file()


def test_event_files_that_do_not_fit_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of the thread that writes, which ends by this
    before = set(threading.enumerate())
    with files_up_to(500), pytest.raises(OSError, match=r"File too large: '.*/run:1'"):
        show_much(tmp_path / "run:1")
    for thread in set(threading.enumerate()) - before:
        thread.join()


def show_much(folder):
    with TensorBoard(folder, 0, is_writer=True).closing() as board:
        for step in range(100):
            board.numbers("train", {"loss": 1.0}, step)
        board.flush()


@pytest.mark.parametrize("name", ["s3://run:1", "~"])
def test_a_run_goes_into_a_folder_whatever_its_name_looks_like(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    sizes = ["--num-users", 60, "--num-items", 20, "--num-interactions", 600]
    arguments = ["two-tower", "--data", "synthetic", *sizes, "--embedding", "full", "--epochs", 1, "--out", name]
    assert alone(*arguments) == 0
    assert {"synthetic", "artifact", "tensorboard"} < {path.name for path in Path(name).iterdir()}
    assert alone("two-tower", "--data", f"{name}/synthetic", *arguments[9:-1], f"{name}/{name}") == 0
