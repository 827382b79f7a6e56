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
from training.config import OptimisationOptions
from training.parallel import shard
from training.rates import Rates, Schedule

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


def moves(schedule, rate=None):
    """By how much each step moves a number of a row, and a dense one."""
    options = OptimisationOptions(optimizer="sgd", learning_rate=0.5, dense_learning_rate=0.01)
    model, optimizer = shard(Summed(), options, CPU)
    rates = Rates(optimizer, schedule)
    features = KeyedJaggedTensor(keys=["t"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    (weight,) = (w for name, w in model.state_dict().items() if name.endswith("t.weight"))
    table_VE, dense_F = weight.local_shards()[0].tensor, model.state_dict()["dense"]
    of_row, of_dense = [], []
    for step in range(STEPS):
        before = table_VE[1, 0].item(), dense_F[0].item()
        rates.set(step, rate)
        optimizer.zero_grad()
        model(features).backward()
        optimizer.step()
        of_row.append(before[0] - table_VE[1, 0].item())
        of_dense.append(before[1] - dense_F[0].item())
    return of_row, of_dense


def shares(schedule, rate=None):
    """Of what each step would move them by if rates stayed; Adam's moves are in proportion to its rate too."""
    pairs = zip(moves(schedule, rate), moves(Schedule()), strict=True)
    return [[fallen / whole for fallen, whole in zip(*pair, strict=True)] for pair in pairs]


def test_rates_of_tables_and_of_dense_weights_fall_linearly():
    of_row, of_dense = shares(Schedule(falls=range(STEPS)))
    assert of_row == pytest.approx([1, 0.75, 0.5, 0.25], rel=1e-4)
    assert of_dense == pytest.approx([1, 0.75, 0.5, 0.25], rel=1e-4)


def test_rates_stay_until_the_steps_in_which_they_fall():
    of_row, of_dense = shares(Schedule(falls=range(2, STEPS)))
    assert of_row == pytest.approx([1, 1, 1, 0.5], rel=1e-4)
    assert of_dense == pytest.approx([1, 1, 1, 0.5], rel=1e-4)


def test_rates_are_multiplied_after_the_full_steps():
    of_row, of_dense = shares(Schedule(falls=range(2, STEPS), full_steps=1, quantized_rate=0.4))
    assert of_row == pytest.approx([1, 0.4, 0.4, 0.2], rel=1e-4)
    assert of_dense == pytest.approx([1, 0.4, 0.4, 0.2], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("two-tower --epochs 6 --embedding full", Schedule(falls=range(40, 60))),
        ("two-tower --epochs 6 --embedding full --rate-decay linear", Schedule(falls=range(60))),
        ("two-tower --epochs 6", Schedule(falls=range(40, 60), full_steps=40, quantized_rate=0.5)),
        (
            "two-tower --epochs 6 --full-epochs 1 --quantized-rate 0.1",
            Schedule(falls=range(40, 60), full_steps=10, quantized_rate=0.1),
        ),
        ("two-tower --epochs 6 --full-epochs 0 --rate-decay none", Schedule()),
        ("dlrm --epochs 6", Schedule()),
        ("language-model --epochs 6 --rate-decay 0.5", Schedule()),
    ],
)
def test_schedule_is_what_the_flags_say(flags, expected):
    found = Schedule.of(parsed(flags), 10)
    assert [found.factor(step) for step in range(60)] == [expected.factor(step) for step in range(60)]


def test_rates_that_do_not_fall_are_those_of_the_options():
    """SGD moves by its rate, the gradient being 1."""
    assert moves(Schedule())[0] == pytest.approx([0.5] * STEPS, rel=1e-4)


def test_the_rate_of_an_epoch_takes_the_place_of_first_rates():
    of_row, of_dense = shares(Schedule(falls=range(2 * STEPS)), rate=0.2)
    assert of_row == pytest.approx([0.4, 0.35, 0.3, 0.25], rel=1e-4)
    assert of_dense == pytest.approx([20, 17.5, 15, 12.5], rel=1e-4)


def test_rates_fall_from_the_first_ones_whatever_the_groups_hold_since():
    """As after a checkpoint, which brings the rate of its last step."""
    optimizer = shard(Summed(), OptimisationOptions(learning_rate=0.5), CPU)[1]
    rates = Rates(optimizer, Schedule(falls=range(10)))
    rates.set(9)
    rates.set(5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.0015, 0.25])


def test_keys_and_values_move_at_a_rate_of_their_own():
    """Adam's first step is as long as its rate, wherever the gradient is not zero."""
    tables = DPQEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=4, feature_names=["t"])],
        DPQConfig(method="vq", num_subspaces=1, num_codes=2, value_gradient=True, penalty_weight=0.0),
    )
    summed = Summed(tables)
    options = OptimisationOptions(dense_learning_rate=0.02, value_rate=0.1)
    model, optimizer = shard(summed, options, CPU)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith(("values_MKS", "dense"))}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    features = KeyedJaggedTensor(keys=["t"], values=torch.tensor([1]), lengths=torch.tensor([1]))
    optimizer.zero_grad()
    model(features).backward()
    optimizer.step()
    longest = {name.rsplit(".")[-1]: (weight - before[name]).abs().max().item() for name, weight in weights.items()}
    assert longest == pytest.approx({"dense": 0.02, "values_MKS": 0.002}, rel=1e-4)
