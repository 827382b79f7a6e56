"""Runs whose numbers cease to be finite: they end with the step and the table, whatever the recipe and its tables."""

import re

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.training.command_line import alone, run
from tests.training.test_language_model import sentences
from tests.training.test_text_classification import documents
from training import trainer
from training.models.two_tower import TwoTowerTask

SIZES = ["--num-users", "100", "--num-items", "40", "--num-interactions", "1500", "--data", "synthetic"]
SMALL = [*SIZES, "--embedding-dim", "8", "--batch-size", "64", "--epochs", "3", "--learning-rate", "1e38"]
TOWERS = ["two-tower", *SMALL, "--num-negatives", "16"]
DPQ = ["--num-subspaces", "4", "--num-codes", "8"]
RUNS = {
    "quantized": [*TOWERS, *DPQ, "--optimizer", "sgd", "--full-epochs", "0"],
    "quantized, sx": [*TOWERS, *DPQ, "--embedding", "dpq-sx", "--optimizer", "sgd", "--full-epochs", "0"],
    "warm-up": [*TOWERS, *DPQ, "--optimizer", "sgd", "--full-epochs", "2"],
    "warm-up, dot": [*TOWERS, *DPQ, "--optimizer", "rowwise-adagrad", "--full-epochs", "2", "--similarity", "dot"],
    "plain, cosine": [*TOWERS, "--optimizer", "sgd", "--embedding", "full"],
    "plain, dot": [*TOWERS, "--optimizer", "adagrad", "--embedding", "full", "--similarity", "dot"],
    "dlrm": ["dlrm", *SMALL, *DPQ, "--optimizer", "sgd"],
    "dlrm, plain": ["dlrm", *SMALL, "--optimizer", "rowwise-adagrad", "--embedding", "full"],
}
TEXT = ["--embedding-dim", 12, "--hidden-dim", 12, "--epochs", 2, "--learning-rate", "1e38"]
TEXTS = {
    "language-model": [*TEXT, "--batch-size", 4, "--num-steps", 4],
    "text-classification": [*TEXT, "--batch-size", 32],
}
KINDS = {kind: ["--embedding", kind, "--num-subspaces", 3, "--num-codes", 4] for kind in ("dpq-sx", "dpq-vq")}


def assert_ended(code, said, folder, tables):
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("training: ")]
    told = rf"training: epoch 1, step \d+: table '({tables})': got (NaN or infinity|a number above .*) in "
    assert re.match(told, line), line
    assert not (folder / "metrics.json").exists()
    assert not list((folder / "checkpoints").glob("epoch-*"))


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
def test_run_that_diverges_ends_with_the_step_and_the_table(arguments, tmp_path, capsys):
    code = alone(*arguments, "--out", tmp_path / "run")
    assert_ended(code, capsys.readouterr().err, tmp_path / "run", "user_id|item_id")


@pytest.mark.parametrize("kind", [*KINDS, "full"])
@pytest.mark.parametrize("recipe", TEXTS)
def test_run_over_text_that_diverges_ends_with_the_step_and_the_table(recipe, kind, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for seed, split in enumerate(("train", "valid", "test")):
        (data / f"{split}.txt").write_text(sentences(40, 0))
        pq.write_table(documents(100, seed), data / f"{split}.parquet")
    arguments = [recipe, "--data", data, *TEXTS[recipe], *KINDS.get(kind, ["--embedding", kind])]
    code = alone(*arguments, "--out", tmp_path / "run")
    assert_ended(code, capsys.readouterr().err, tmp_path / "run", "word")


def test_every_rank_ends_a_run_that_diverges(tmp_path):
    result = run(*RUNS["plain, dot"], "--out", tmp_path / "run")
    assert result.returncode
    assert_ended(2, result.stderr, tmp_path / "run", "user_id|item_id")
    assert "exitcode  : 1 " not in result.stderr
    assert "Traceback" not in result.stderr.split("training: ")[0]


class Recorded(nn.Module):
    """Stands for a run's model: one weight beside the tables."""

    def __init__(self):
        super().__init__()
        self.over = nn.Linear(1, 1)


class Unmeasured(TwoTowerTask):
    """Stands for a run's task, whose model has no tables."""

    def __init__(self):
        self.vocabularies = {}


@pytest.fixture
def started():
    """A run of one rank that has a model and no data."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run = trainer.Run.__new__(trainer.Run)
    run.model, run.tables, run.task = Recorded(), "tables.", Unmeasured()
    yield run
    dist.destroy_process_group()


def test_a_weight_beside_the_tables_that_is_not_finite_is_named(started):
    started._check_weights()
    started.model.over.bias.data.fill_(float("nan"))
    with pytest.raises(trainer.ConfigError, match=r"weight 'over.bias': got NaN or infinity in its numbers"):
        started._check_weights()


def test_a_loss_that_is_not_finite_is_said_with_its_first_step(started):
    started._check_loss(2, 40, torch.tensor(0))
    with pytest.raises(trainer.ConfigError, match="epoch 2, step 38: the loss is not finite; try a lower --learning"):
        started._check_loss(2, 40, torch.tensor(3))
