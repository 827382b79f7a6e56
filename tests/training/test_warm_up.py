"""The warm-up under the trainer's sharding and optimizers, and whole runs that have one."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from dpq_rec import DPQConfig, verify
from dpq_rec.nn import Quantizer, warm_up
from training.__main__ import main
from training.config import EmbeddingOptions
from training.distributed import shard
from training.models.interactions import make_tables
from training.models.two_tower import TwoTowerTask
from training.recipes import RECIPES
from training.recipes.interactions import TableOptimisation
from training.schedule import begin_epoch, reset_quantizer_state, to_unit_length

CPU = torch.device("cpu")
ROWS = {"user_id": 12, "item_id": 7}
DPQ = DPQConfig(method="vq", num_subspaces=2, num_codes=4, value_gradient=True)
SIZES = ["--num-users", "400", "--num-items", "60", "--num-interactions", "6000", "--data", "synthetic"]
SMALL = [*SIZES, "--embedding-dim", "8", "--batch-size", "128", "--num-negatives", "32", "--epochs", "4"]
PHASED = [*SMALL, "--full-epochs", "2", "--num-subspaces", "4", "--num-codes", "8", "--value-gradient"]


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Compared(nn.Module):
    """How far cosines of users and items are from their wishes."""

    def __init__(self, dpq):
        super().__init__()
        kind = "full" if dpq is None else "dpq-vq"
        options = EmbeddingOptions(kind=kind, embedding_dim=8, dpq=dpq)
        self.tables = make_tables({name: [name] for name in ROWS}, ROWS, options)

    def forward(self, features, wanted_B):
        pooled = self.tables(features)
        return (functional.cosine_similarity(pooled["user_id"], pooled["item_id"]) - wanted_B).square().mean()


def sharded(dpq, optimizer="rowwise-adagrad"):
    """A model with its optimizer, and table -> its rows; two of the same kind begin alike."""
    model, optimizer = shard(Compared(dpq), TableOptimisation(optimizer=optimizer, learning_rate=0.2), CPU)
    weights = {name.split(".")[-2]: w for name, w in model.state_dict().items() if name.endswith("_id.weight")}
    rows = {name: weight.local_shards()[0].tensor for name, weight in weights.items()}
    for number, rows_VE in enumerate(rows[name] for name in ROWS):
        rows_VE.copy_(torch.randn(rows_VE.shape, generator=torch.Generator().manual_seed(number)))
    return model, optimizer, rows


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    ids = [torch.randint(num_rows, (16,), generator=generator) for num_rows in ROWS.values()]
    features = KeyedJaggedTensor(keys=list(ROWS), values=torch.cat(ids), lengths=torch.ones(32, dtype=torch.long))
    optimizer.zero_grad()
    loss = model(features, torch.rand(16, generator=generator))
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("optimizer", ["rowwise-adagrad", "adagrad", "sgd"])
def test_warm_up_learns_step_by_step_what_plain_tables_do(one_rank, optimizer):
    (model, own, rows), (plain, others, wanted) = (sharded(dpq, optimizer) for dpq in (DPQ, None))
    warm_up(model)
    for number in range(5):
        assert step(model, own, number) == pytest.approx(step(plain, others, number), rel=1e-5)
    for name in ROWS:
        torch.testing.assert_close(rows[name], wanted[name])


@pytest.mark.parametrize("optimizer", ["rowwise-adagrad", "adagrad"])
def test_rows_cut_to_length_one_take_the_steps_that_they_would_have_taken(one_rank, optimizer):
    """Their direction after one more step is that of rows that stayed as long, but for this step's own square."""
    (cut, own, rows), (whole, others, wanted) = (sharded(DPQ, optimizer) for _ in range(2))
    for model, each in ((cut, own), (whole, others)):
        warm_up(model)
        for number in range(60):
            step(model, each, number)
    to_unit_length(cut, own)
    before = {name: functional.normalize(rows_VE.clone()) for name, rows_VE in rows.items()}
    for name in ROWS:
        torch.testing.assert_close(rows[name].norm(dim=1), torch.ones(ROWS[name]))
        torch.testing.assert_close(before[name], functional.normalize(wanted[name]))
    assert step(cut, own, 60) == pytest.approx(step(whole, others, 60), rel=1e-4)
    for name in ROWS:
        moved_VE = functional.normalize(wanted[name]) - before[name]
        assert moved_VE.norm() > 0
        assert (functional.normalize(rows[name]) - before[name] - moved_VE).norm() < 0.1 * moved_VE.norm()


def test_row_of_zeros_has_no_length_to_be_cut_to(one_rank):
    model, optimizer, rows = sharded(DPQ)
    rows["item_id"][2] = 0
    to_unit_length(model, optimizer)
    assert not rows["item_id"][2].any()
    assert rows["item_id"].isfinite().all()


def test_quantized_phase_begins_without_adams_memory_of_zeros(one_rank):
    """One step of Adam moves by its rate at most; with the steps of the warm-up counted it would be three times."""
    model, optimizer, _ = sharded(DPQ)
    warm_up(model)
    for number in range(30):
        step(model, optimizer, number)
    warm_up(model, enabled=False)
    reset_quantizer_state(model, optimizer)
    placed = [weight for module in model.modules() if isinstance(module, Quantizer) for weight in module.parameters()]
    before = [weight.detach().clone() for weight in placed]
    step(model, optimizer, 30)
    moves = [(weight.detach() - was).abs().max().item() for weight, was in zip(placed, before, strict=True)]
    assert len(moves) == 2
    assert moves == pytest.approx([0.003, 0.003], rel=1e-2)


def test_keys_and_values_are_placed_before_the_first_quantized_epoch_alone(one_rank):
    model, optimizer, rows = sharded(DPQ)
    config = RECIPES["two-tower"](".", "run")
    options = EmbeddingOptions(embedding_dim=8, dpq=DPQ, full_epochs=2)
    object.__setattr__(config, "embedding", options)
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    seen = []
    for epoch in range(1, 5):
        before = [quantizer.values_MKS.detach().clone() for quantizer in quantizers]
        begin_epoch(model, optimizer, config, epoch)
        placed = not any(torch.equal(q.values_MKS, was) for q, was in zip(quantizers, before, strict=True))
        seen.append((quantizers[0].is_warming_up, placed, bool((rows["user_id"].norm(dim=1) - 1).abs().max() < 1e-5)))
    assert seen == [(True, False, False), (True, False, False), (False, True, True), (False, False, True)]


def run(folder, *arguments):
    return main(["two-tower", *arguments, "--out", str(folder)])


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def phased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phased") / "run"
    assert run(folder, *PHASED) == 0
    return folder


def test_run_measures_quantized_epochs_alone_and_leaves_the_best_of_them(phased):
    metrics = metrics_of(phased)
    assert [sorted(epoch) == ["codes", "epoch", "loss"] for epoch in metrics["history"]] == [True, True, False, False]
    quantized = metrics["history"][2:]
    assert metrics["best_epoch"] == 3 + max(range(2), key=lambda at: quantized[at]["ndcg@10"])
    assert [epoch["codes"]["item_id"]["changed"] is None for epoch in quantized] == [True, False]
    assert {table.manifest.kind for table in verify(phased / "artifact").tables.values()} == {"dpq"}


@pytest.mark.parametrize("disturbed", [2, 3, 4])
def test_run_that_goes_on_in_either_phase_ends_as_an_undisturbed_one(phased, tmp_path, break_off, disturbed):
    break_off(TwoTowerTask, disturbed, lambda: run(tmp_path / "run", *PHASED))
    assert run(tmp_path / "run", *PHASED) == 0
    one, other = metrics_of(phased), metrics_of(tmp_path / "run")
    assert [one[name] == other[name] for name in ("metrics", "history", "best_epoch")] == [True] * 3


def test_codes_stand_still_where_the_quantized_rate_is_next_to_nothing(tmp_path):
    """The rates of a run are those of its schedule."""
    arguments = [*PHASED, "--epochs", "3", "--full-epochs", "1", "--rate-decay", "none"]
    changed = {}
    for rate in ("1e-9", "1"):
        assert run(tmp_path / rate, *arguments, "--quantized-rate", rate) == 0
        changed[rate] = max(metrics_of(tmp_path / rate)["history"][2]["codes"]["item_id"]["changed"])
    assert changed["1e-9"] == 0 < changed["1"]


def test_target_ratio_is_reached_by_each_table_with_a_layout_of_its_own(tmp_path):
    assert run(tmp_path / "run", *SMALL, "--epochs", "2", "--full-epochs", "1", "--target-ratio", "8") == 0
    tables, stored = metrics_of(tmp_path / "run")["tables"], verify(tmp_path / "run" / "artifact").tables
    assert all(table["compression_ratio"] >= 8 for table in tables.values())
    layouts = {name: table["layout"] for name, table in tables.items()}
    assert layouts["user_id"] != layouts["item_id"]
    for name, table in stored.items():
        assert layouts[name] == {
            "num_subspaces": table.manifest.num_subspaces,
            "num_codes": table.manifest.num_codes,
            "num_levels": table.manifest.num_levels,
            "values_dtype": "float16",
        }


TOO_SMALL = "target_ratio: got 25 for a table of 60 rows of 8 numbers, want at most 20.86: it is too small for more"


def test_table_too_small_for_the_target_ratio_stays_plain_beside_one_that_is_not(tmp_path, caplog):
    assert run(tmp_path / "run", *SMALL, "--epochs", "3", "--full-epochs", "1", "--target-ratio", "25") == 0
    assert caplog.text.count(f"table 'item_id' stays plain: {TOO_SMALL}; --quantize-small quantizes it") == 1
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["tables"]["item_id"]["layout"], metrics["tables"]["item_id"]["artifact_bytes"]) == (None, 60 * 32)
    assert metrics["tables"]["user_id"]["compression_ratio"] >= 25
    full, stored = (sum(t[name] for t in metrics["tables"].values()) for name in ("full_bytes", "artifact_bytes"))
    assert metrics["total"]["artifact_bytes"] == stored
    assert metrics["total"]["compression_ratio"] == full / stored > 1
    assert [list(epoch["codes"]) for epoch in metrics["history"]] == [[], ["user_id"], ["user_id"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-ratio", "25", "--quantize-small"], f"table 'item_id': {TOO_SMALL}"),
        (["--target-ratio", "99"], "table 'user_id': target_ratio: got 99 for a table of 400 rows of 8"),
    ],
    ids=["chosen", "all tables"],
)
def test_run_that_no_target_ratio_can_serve_is_refused_before_training(tmp_path, capsys, more, message):
    assert run(tmp_path / "run", *SMALL, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_patience_counts_quantized_epochs_alone(tmp_path):
    assert run(tmp_path / "run", *PHASED, "--patience", "1") == 0
    assert len(metrics_of(tmp_path / "run")["history"]) >= 3
