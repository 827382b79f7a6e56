"""Rates that fall step by step, in the fused optimizer of the tables and in the dense one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection
from tests.training.command_line import parsed
from training.distributed import shard
from training.recipes.interactions import TableOptimisation
from training.schedule import set_rates

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Summed(nn.Module):
    """Sum of one row and of a dense weight: every gradient is 1."""

    def __init__(self, tables=None):
        super().__init__()
        config = EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=4, feature_names=["t"])
        self.tables = tables or EmbeddingBagCollection(tables=[config])
        self.dense = nn.Parameter(torch.zeros(2))

    def forward(self, features):
        return self.tables(features).values().sum() + self.dense.sum()


def moves(full_epochs=0, **changes):
    """By how much each step of one epoch, or of epochs of one step, moves a number of a row, and a dense one."""
    steps_per_epoch = STEPS // changes.get("epochs", 1)
    changes = {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.5, "dense_learning_rate": 0.01, **changes}
    options = TableOptimisation(**changes)
    model, optimizer = shard(Summed(), options, CPU)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    features = KeyedJaggedTensor(keys=["t"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    (weight,) = (w for name, w in model.state_dict().items() if name.endswith("t.weight"))
    table_VE, dense_F = weight.local_shards()[0].tensor, model.state_dict()["dense"]
    of_row, of_dense = [], []
    for step in range(STEPS):
        before = table_VE[1, 0].item(), dense_F[0].item()
        set_rates(optimizer, first_rates, options.rate_factor(step, steps_per_epoch, full_epochs))
        optimizer.zero_grad()
        model(features).backward()
        optimizer.step()
        of_row.append(before[0] - table_VE[1, 0].item())
        of_dense.append(before[1] - dense_F[0].item())
    return of_row, of_dense


def shares(**changes):
    """Of what each step would move them by if rates stayed; Adam's moves are in proportion to its rate too."""
    pairs = zip(moves(**changes), moves(), strict=True)
    return [[fallen / whole for fallen, whole in zip(*pair, strict=True)] for pair in pairs]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rate_decay": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"rate_decay": "late"}, [1, 1, 1, 0.5]),
        ({"epochs": 4, "full_epochs": 1, "rate_decay": "late", "quantized_rate": 0.4}, [1, 0.4, 0.4, 0.2]),
    ],
)
def test_rates_of_tables_and_of_dense_weights_fall_alike(changes, expected):
    of_row, of_dense = shares(**changes)
    assert of_row == pytest.approx(expected, rel=1e-4)
    assert of_dense == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "falls", "full_steps", "quantized_rate"),
    [
        ("two-tower --epochs 6 --embedding full", range(40, 60), 0, 1),
        ("two-tower --epochs 6 --embedding full --rate-decay linear", range(60), 0, 1),
        ("two-tower --epochs 6", range(40, 60), 40, 0.5),
        ("two-tower --epochs 6 --full-epochs 1 --quantized-rate 0.1", range(40, 60), 10, 0.1),
        ("two-tower --epochs 6 --full-epochs 0 --rate-decay none", range(0), 0, 1),
        ("dlrm --epochs 6", range(0), 0, 1),
        ("text-classification --epochs 6", range(0), 0, 1),
    ],
)
def test_rates_are_what_the_flags_say(flags, falls, full_steps, quantized_rate):
    config = parsed(flags)
    for step in range(60):
        expected = (60 - step) / len(falls) if step in falls else 1
        if step >= full_steps:
            expected *= quantized_rate
        assert config.optimisation.rate_factor(step, 10, config.full_epochs) == expected


def test_rates_that_do_not_fall_are_those_of_the_options():
    """SGD moves by its rate, the gradient being 1."""
    assert moves()[0] == pytest.approx([0.5] * STEPS, rel=1e-4)


def test_rates_fall_from_the_first_ones_whatever_the_groups_hold_since():
    """As after a checkpoint, which brings the rate of its last step."""
    optimizer = shard(Summed(), TableOptimisation(learning_rate=0.5), CPU)[1]
    first_rates = [group["lr"] for group in optimizer.param_groups]
    set_rates(optimizer, first_rates, 0.1)
    set_rates(optimizer, first_rates, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.0015, 0.25])


def test_keys_and_values_move_at_a_rate_of_their_own():
    """Adam's first step is as long as its rate, wherever the gradient is not zero."""
    tables = DPQEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=4, feature_names=["t"])],
        DPQConfig(method="vq", num_subspaces=1, num_codes=2, value_gradient=True, penalty_weight=0.0),
    )
    summed = Summed(tables)
    options = TableOptimisation(dense_learning_rate=0.02, value_rate=0.1)
    model, optimizer = shard(summed, options, CPU)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith(("values_MKS", "dense"))}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    features = KeyedJaggedTensor(keys=["t"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    optimizer.zero_grad()
    model(features).backward()
    optimizer.step()
    longest = {name.rsplit(".")[-1]: (weight - before[name]).abs().max().item() for name, weight in weights.items()}
    assert longest == pytest.approx({"dense": 0.02, "values_MKS": 0.002}, rel=1e-4)
