"""The drop-in held to TorchRec's own EmbeddingBagCollection over a dense table of the decoded vectors."""

from functools import partial

import pytest
import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection


def table(name, num_embeddings=20, embedding_dim=8, feature_names=None, pooling=PoolingType.SUM, **more):
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        feature_names=feature_names or [name],
        pooling=pooling,
        **more,
    )


def bags(lists_by_feature):
    lengths = [len(bag) for lists in lists_by_feature.values() for bag in lists]
    ids = [i for lists in lists_by_feature.values() for bag in lists for i in bag]
    return KeyedJaggedTensor(
        keys=list(lists_by_feature), values=torch.tensor(ids, dtype=torch.long), lengths=torch.tensor(lengths)
    )


FEATURES = {"f": [[1, 2, 2], [], [19]], "g": [[0], [5, 5], []], "h": [[], [], []]}
TABLES = {
    "sum": [table("a", feature_names=["f"]), table("b", feature_names=["g"]), table("c", feature_names=["h"])],
    "mean": [table("a", feature_names=["f"], pooling=PoolingType.MEAN), table("b", feature_names=["g", "h"])],
    "a feature of two tables": [table("a", feature_names=["f", "g"]), table("b", feature_names=["f"])],
    "two dimensions": [table("a", feature_names=["f"]), table("b", embedding_dim=16, feature_names=["g"])],
}


def make(tables, method="sx", **config):
    torch.manual_seed(0)
    return DPQEmbeddingBagCollection(tables, DPQConfig(method=method, num_subspaces=4, num_codes=5, **config))


def decoded(ebc, name):
    """The dense table that the module stands for in eval mode."""
    dim = next(str(t.embedding_dim) for t in ebc.embedding_bag_configs() if t.name == name)
    quantizer = ebc.quantizer(name)
    return quantizer.decode(quantizer.encode(ebc.queries[dim].embeddings[name].weight))


@pytest.mark.parametrize("method", ["sx", "vq"])
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES.keys())
def test_collection_returns_what_torchrec_returns_over_the_decoded_table(tables, method):
    ebc = make(tables, method)
    features = bags(FEATURES)
    ebc(features)  # moves the running statistics
    ebc.eval()
    plain = EmbeddingBagCollection(tables=tables)
    for t in tables:
        plain.embedding_bags[t.name].weight.data = decoded(ebc, t.name).detach()
    got, want = ebc(features), plain(features)
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    torch.testing.assert_close(got.values(), want.values())


def test_training_output_has_the_same_bits_as_the_values():
    ebc = make([table("a", feature_names=["f"])])
    features = bags({"f": [[i] for i in range(20)]})
    out = ebc(features)["f"]
    values = {v.item() for v in ebc.quantizer("a").values_MKS.flatten()}
    assert all(v.item() in values for v in out.flatten())


def test_queries_get_the_gradient_of_every_occurrence():
    ebc = make([table("a", feature_names=["f"])], "vq")
    ebc(bags({"f": [[3], [3, 3], [4]]})).values().sum().backward()
    gradient = ebc.queries["8"].embeddings["a"].weight.grad
    assert gradient[3].tolist() == [3.0] * 8
    assert gradient[4].tolist() == [1.0] * 8
    assert gradient[[0, 1, 2, *range(5, 20)]].abs().sum() == 0


def test_penalty_reaches_the_values_without_a_line_in_the_training_loop():
    ebc = make([table("a", feature_names=["f"])], "vq")
    features = bags({"f": [[3], [3, 3], [4]]})
    (ebc(features).values() * 0).sum().backward()
    quantizer = ebc.quantizer("a")
    queries = ebc.queries["8"].embeddings["a"].weight[[3, 4]].detach()
    again = quantizer(queries, torch.tensor([3.0, 1.0]))
    (want,) = torch.autograd.grad(again.penalty, [quantizer.values_MKS])
    torch.testing.assert_close(quantizer.values_MKS.grad, want)
    torch.testing.assert_close(ebc.penalties["a"], again.penalty.detach())


@pytest.mark.parametrize("init_fn", [torch.nn.init.ones_, partial(torch.nn.init.uniform_, a=1.0, b=2.0)])
def test_collection_keeps_an_init_of_the_users_own(init_fn):
    ebc = make([table("a", feature_names=["f"], init_fn=init_fn)])
    assert (ebc.queries["8"].embeddings["a"].weight >= 1).all()


def test_collection_rejects_bags_with_weights():
    features = KeyedJaggedTensor(
        keys=["a"], values=torch.arange(3), lengths=torch.tensor([1, 2]), weights=torch.ones(3)
    )
    with pytest.raises(ConfigError, match="got per-sample weights"):
        make([table("a")])(features)


def test_collection_starts_queries_on_the_scale_of_the_keys():
    ebc = make([table("a", num_embeddings=100_000)])
    weight = ebc.queries["8"].embeddings["a"].weight
    assert weight.abs().max() <= 8**-0.5
    assert weight.abs().max() > 0.99 * 8**-0.5


def test_collection_takes_a_config_for_each_table():
    tables = [table("a"), table("b")]
    configs = {"a": DPQConfig(num_subspaces=2, num_codes=3), "b": DPQConfig(num_subspaces=8, num_codes=7)}
    ebc = DPQEmbeddingBagCollection(tables, configs)
    assert [tuple(ebc.quantizer(t).values_MKS.shape) for t in "ab"] == [(2, 3, 4), (8, 7, 1)]


def test_collection_rejects_an_id_outside_its_table():
    with pytest.raises(IndexError, match="table 'a': got ids from 2 to 20, want 0 to 19"):
        make([table("a")])(bags({"a": [[2], [20]]}))


def test_collection_rejects_a_missing_feature():
    with pytest.raises(KeyError, match="want b too"):
        make([table("a"), table("b")])(bags({"a": [[2]]}))


def test_collection_rejects_lengths_that_do_not_fit_the_ids():
    features = KeyedJaggedTensor(keys=["a"], values=torch.arange(5), lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="lengths of 3 ids in all, but 5 ids"):
        make([table("a")])(features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tables": [table("a", pooling=PoolingType.MEAN)], "is_weighted": True}, "with is_weighted, want SUM"),
        ({"tables": [table("a"), table("a")]}, "two are named 'a'"),
        ({"tables": [table("a", pooling=PoolingType.NONE)]}, "want SUM or MEAN"),
        ({"tables": [table("a", data_type=DataType.FP16)]}, "want FP32"),
        ({"config": {}}, "got none for table 'a'"),
        ({"config": {"a": DPQConfig(num_subspaces=4), "b": None}}, "config: got b; the tables: a"),
        ({"config": {"a": None}}, "got no table to quantize"),
    ],
)
def test_collection_rejects_what_it_cannot_do(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DPQEmbeddingBagCollection(**{"tables": [table("a")], "config": DPQConfig(num_subspaces=4), **arguments})
