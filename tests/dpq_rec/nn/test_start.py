"""A model's keys and values from samples of its queries."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig

from dpq_rec import ConfigError
from dpq_rec.nn import DPQEmbedding, start
from tests.dpq_rec.nn.modules import KINDS, batch, build, config, queries, train
from tests.dpq_rec.nn.options import OPTIONS

V = 300
kinds = pytest.mark.parametrize("kind", KINDS)


def clustered(kind, **options):
    """A module whose queries lie around few points, as those of a trained model do."""
    torch.manual_seed(0)
    module = build(kind, config(**{"method": "vq", "batch_norm": False, "num_codes": 8, **options}), num_embeddings=V)
    for parameter in module.queries.parameters():
        centres = torch.randn(5, parameter.shape[1])
        parameter.data = centres[torch.randint(5, (V,))] + 0.1 * torch.randn_like(parameter)
    return module


def error(module, table):
    """Mean square of what quantizing takes from the queries."""
    quantizer, weight = module.quantizer(table), queries(module, table).detach()
    return (quantizer.decode(quantizer.encode(weight)) - weight).square().mean().item()


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@kinds
@pytest.mark.parametrize("batch_norm", [False, True])
def test_start_lowers_the_error_of_every_table(kind, batch_norm):
    model = nn.Sequential(clustered(kind, batch_norm=batch_norm))
    before = {table: error(model[0], table) for table in model[0].quantizers}
    start(model)
    for table, was in before.items():
        assert error(model[0], table) < (0.3 if batch_norm else 0.1) * was


@pytest.mark.parametrize("num_samples", [50, V])  # of all rows the clustering alone has a seed
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_start_depends_on_the_seed_alone(options, num_samples):
    states = []
    for seed in (3, 3, 4):
        module = clustered(DPQEmbedding, **options)
        torch.manual_seed(len(states))
        start(module, num_samples=num_samples, seed=seed)
        states.append(state(module))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    placed = "own_keys_MKS" if "key_dim" in options else "values_MKS"
    assert not torch.equal(*(states[i][f"quantizers.table.{placed}"] for i in (0, 2)))


def test_start_leaves_values_of_a_width_of_their_own_as_they_were():
    module = clustered(DPQEmbedding, method="sx", key_dim=2)
    before = module.only_quantizer.values_MKS.detach().clone()
    start(module)
    assert torch.equal(module.only_quantizer.values_MKS, before)


def test_start_leaves_queries_and_mode_as_they_were():
    module = clustered(DPQEmbedding).eval()
    before = queries(module).clone()
    start(module)
    assert torch.equal(queries(module), before)
    assert not module.training


def test_start_forgets_what_statistics_saw_before():
    module, other = (clustered(DPQEmbedding, batch_norm=True, ema_decay=0.9, revive_after=3) for _ in range(2))
    for _ in range(3):
        module(batch(DPQEmbedding))
    start(module), start(other)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_training_goes_on_from_the_start():
    module = clustered(DPQEmbedding, batch_norm=True)
    start(module)
    losses = train(module, torch.arange(V), steps=10, lr=1.0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("padding_idx", [0, 2, V - 1])
@pytest.mark.parametrize("num_samples", [V - 1, 1 << 16])
def test_start_never_samples_the_padding_row(padding_idx, num_samples):
    """All other rows are sampled, so that its query alone can change nothing."""
    started = []
    for query in (0.0, 1e6):
        torch.manual_seed(0)
        module = DPQEmbedding(V, 12, config(method="vq"), padding_idx=padding_idx)
        queries(module).data[padding_idx] = query
        start(module, num_samples=num_samples)
        started.append(state(module.only_quantizer))
    assert all(torch.equal(started[0][name], started[1][name]) for name in started[0])


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_start_samples_distinct_rows_up_to_all_of_them(padding_idx):
    """As many codes as rows: each row but the padding gets a key of its own, and none is left over."""
    torch.manual_seed(0)
    num_rows = 8 if padding_idx is None else 7
    module = DPQEmbedding(8, 12, config(method="vq", num_subspaces=1, num_codes=num_rows), padding_idx=padding_idx)
    start(module)
    rows = [row for row in range(8) if row != padding_idx]
    values = module.only_quantizer.values_MKS[0]
    distances = torch.cdist(queries(module)[rows], values)
    assert distances.min(1).indices.sort().values.tolist() == list(range(num_rows))
    assert distances.min(1).values.max() < 1e-6


def test_start_takes_no_more_rows_than_asked_for():
    """Of one row every key is near; those of the others are far."""
    torch.manual_seed(0)
    module = DPQEmbedding(V, 12, config(method="vq", num_subspaces=1))
    start(module, num_samples=1)
    nearest = torch.cdist(queries(module), module.only_quantizer.values_MKS[0]).amax(1)
    assert (nearest < 0.01).sum() == 1


def test_start_has_nothing_to_do_where_there_is_but_padding():
    module = DPQEmbedding(1, 12, config(), padding_idx=0)
    before = state(module)
    start(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


PLAIN = EmbeddingCollection([EmbeddingConfig(name="a", num_embeddings=4, embedding_dim=8, feature_names=["a"])])


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (PLAIN, {}, "start: the model holds no DPQ module; replace_embeddings makes some"),
        (nn.Embedding(4, 8), {}, "the model holds no DPQ module and no collection of TorchRec"),
        (PLAIN, {"num_samples": 0}, "num_samples: got 0, want 1 or more"),
    ],
)
def test_start_rejects(model, more, message):
    with pytest.raises(ConfigError, match=message):
        start(model, **more)
