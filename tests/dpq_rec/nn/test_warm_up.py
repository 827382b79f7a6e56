"""Tables that hand out their queries: what a plain table does, and what quantizing goes on from."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from dpq_rec import DPQConfig
from dpq_rec.errors import ConfigError
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBagCollection, DPQEmbeddingCollection, freeze, start, warm_up
from tests.dpq_rec.nn.modules import KINDS, batch, build, config, keyed, queries, train, two_tables, vectors
from tests.dpq_rec.nn.options import OPTIONS

NUM_ROWS = 20
BAGS = {"item": [[1, 2], [3]], "old": [[2], []], "user": [[0, 0, 5], [7]]}  # ids occur twice, in a bag and between
WIDE = {name: options for name, options in OPTIONS.items() if "key_dim" not in options}


def quantizer_states(model):
    return {name: tensor.clone() for name, tensor in model.quantizers.state_dict().items()}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE.keys())
def test_a_collection_in_its_warm_up_trains_step_by_step_as_torchrecs_own(options, optimizer):
    tables = two_tables(EmbeddingBagConfig, NUM_ROWS)
    model, plain = DPQEmbeddingBagCollection(tables, config(**options)), EmbeddingBagCollection(tables)
    for name in ("item", "user"):
        plain.embedding_bags[name].weight.data.copy_(queries(model, name).data)
    before = quantizer_states(model)
    warm_up(model)
    optimizers = [optimizer(module.parameters(), lr=0.1) for module in (model, plain)]
    for _ in range(3):
        losses = []
        for module, each in zip((model, plain), optimizers, strict=True):
            loss = (module.train()(keyed(BAGS)).values() - 1).square().mean()
            each.zero_grad()
            loss.backward()
            each.step()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    for name in ("item", "user"):
        torch.testing.assert_close(queries(model, name), plain.embedding_bags[name].weight)
    after = quantizer_states(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(model.eval()(keyed(BAGS)).values(), plain(keyed(BAGS)).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_every_kind_returns_its_queries_in_its_warm_up(kind):
    model = build(kind, config(method="vq"))
    warm_up(model)
    found = vectors(model, batch(kind))
    for name, vectors_NE in found.items():
        wanted = queries(model, {"old": "item"}.get(name, name)).detach().clone()
        if kind is DPQEmbedding:
            wanted[0] = 0  # the padding row
        assert torch.equal(vectors_NE, wanted)


@pytest.mark.parametrize("method", ["sx", "vq"])
def test_a_table_in_its_warm_up_gives_every_parameter_a_gradient(method):
    """Of zeros where it is no query: DistributedDataParallel waits for all."""
    model = build(DPQEmbedding, config(method=method))
    warm_up(model)
    model(batch(DPQEmbedding)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(weight.grad.any() for weight in model.only_quantizer.parameters())
    assert queries(model).grad.any()


@pytest.mark.parametrize("levels", [1, 3])
def test_quantizing_after_a_warm_up_takes_the_nearest_centroids(levels):
    """faiss's, of the queries as they are by then: placed in a table without a warm-up, they are the same."""
    torch.manual_seed(0)
    model = build(DPQEmbedding, config(method="vq", num_levels=levels, batch_norm=False))
    warm_up(model)
    train(model, batch(DPQEmbedding), lr=1.0)
    warm_up(model, enabled=False)
    start(model, seed=5)
    fresh = build(DPQEmbedding, config(method="vq", num_levels=levels, batch_norm=False))
    queries(fresh).data.copy_(queries(model).data)
    start(fresh, seed=5)
    residual_NDS = queries(model).detach().view(NUM_ROWS, 4, 3)[1:]
    vectors_NDS = torch.zeros_like(residual_NDS)
    for centroids_DKS in fresh.only_quantizer.values_MKS.detach().split(4):
        nearest_ND = torch.cdist(residual_NDS.transpose(0, 1), centroids_DKS).argmin(2).T
        chosen_NDS = torch.stack([centroids_DKS[d, nearest_ND[:, d]] for d in range(4)], 1)
        vectors_NDS, residual_NDS = vectors_NDS + chosen_NDS, residual_NDS - chosen_NDS
    torch.testing.assert_close(model.eval()(batch(DPQEmbedding))[1:], vectors_NDS.flatten(1))


def test_a_model_in_its_warm_up_cannot_be_frozen_until_it_quantizes_again(tmp_path):
    model = build(DPQEmbedding, config())
    warm_up(model)
    with pytest.raises(ConfigError, match=r"table 'table': got a table in its warm-up; call warm_up\(model"):
        freeze(model, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    warm_up(model, enabled=False)
    freeze(model, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            DPQEmbedding(4, 8, DPQConfig(num_subspaces=4, key_dim=1, num_codes=2), name="t"),
            "table 't': got queries of width 4 and vectors of 8",
        ),
        (
            EmbeddingCollection([EmbeddingConfig(name="a", num_embeddings=4, embedding_dim=8, feature_names=["a"])]),
            "warm_up: the model holds no DPQ module",
        ),
    ],
)
def test_warm_up_refuses_what_has_no_queries_to_hand_out(model, message):
    with pytest.raises(ConfigError, match=message):
        warm_up(model)


def test_warm_up_changes_no_table_where_it_refuses_one():
    tables = two_tables(EmbeddingConfig, NUM_ROWS)
    narrow = {"item": config(), "user": config(key_dim=1)}
    model = nn.Sequential(DPQEmbeddingCollection(tables, narrow))
    with pytest.raises(ConfigError, match="table 'user'"):
        warm_up(model)
    assert not any(model[0].quantizer(name).is_warming_up for name in narrow)
