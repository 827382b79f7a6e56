"""The drop-ins for TorchRec's collections held to them, over dense tables of the decoded vectors."""

from functools import partial

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from dpq_rec import ConfigError, DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection, DPQEmbeddingCollection
from tests.dpq_rec.nn.modules import STRAIGHT, config, decoded, keyed, queries

MEAN = {"pooling": PoolingType.MEAN}
FEATURES = {"f": [[1, 2, 2], [], [19]], "g": [[0], [5, 5], []], "h": [[], [], []], "unknown": [[99], [], [-1]]}
# Name, features, quantized or not, and what else its config says.
TABLES = {
    "three": [("a", "f", True, {}), ("b", "g", True, {}), ("c", "h", True, {})],
    "several features a table": [("a", "fg", True, {}), ("b", "h", True, {})],
    "a feature of two tables": [("a", "fg", True, {}), ("b", "f", True, {})],
    "no feature named": [("f", "", True, {}), ("g", "", True, {})],
    "some plain": [("p", "f", False, {}), ("a", "g", True, {}), ("q", "h", False, {}), ("b", "h", True, {})],
    "a feature of a plain one too": [("a", "f", True, {}), ("p", "gf", False, {})],
    "two dimensions": [("a", "f", True, {}), ("b", "gf", True, {"embedding_dim": 16})],
    "two dimensions, some plain": [
        ("p", "h", False, {"embedding_dim": 16}),
        ("a", "f", True, {}),
        ("b", "g", True, {"embedding_dim": 16}),
        ("q", "gf", False, {}),
    ],
}
MIXED_POOLING = {
    "means": [("a", "f", True, MEAN), ("b", "gh", True, MEAN)],
    "mean and sum": [("a", "f", True, MEAN), ("b", "gh", True, {}), ("p", "f", False, MEAN)],
}
OPTIONS = {
    "sx": {"method": "sx"},
    "vq": {"method": "vq"},
    "wider queries": {"method": "sx", "key_dim": 5},
    "narrower queries": {"method": "sx", "key_dim": 1},
    "levels": {"method": "vq", "num_levels": 2},
    "shared": {"method": "vq", "share_subspaces": True},
    "cosine": {"method": "sx", "metric": "cosine", "values_dtype": "float16"},
}


def table(name, num_embeddings=20, embedding_dim=8, feature_names=None, kind=EmbeddingBagConfig, **more):
    if kind is EmbeddingBagConfig:
        more = {"pooling": PoolingType.SUM, **more}
    return kind(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        feature_names=[name] if feature_names is None else feature_names,
        **more,
    )


def make(tables, method="sx", **options):
    torch.manual_seed(0)
    return DPQEmbeddingBagCollection(tables, config(method=method, **options))


def build(ours, kind, described, options, **more):
    """Our collection of tables as TABLES describes them."""
    torch.manual_seed(0)
    configs = {name: config(**options) if quantized else None for name, _, quantized, _ in described}
    return ours(configs_of(kind, described), configs, **more)


def configs_of(kind, described):
    return [table(name, feature_names=list(features), kind=kind, **rest) for name, features, _, rest in described]


def plain_parameter(module, name):
    return next(p for at, p in module.plain.named_parameters() if at.endswith(f".{name}.weight"))


def fill(stock, ours, described):
    """Give tables of the stock collection the vectors that ours stands for; the parameters of both, by pairs."""
    parameters = {name.split(".")[-2]: p for name, p in stock.named_parameters()}
    pairs = []
    for name, _, quantized, _ in described:
        if name in parameters:
            parameters[name].data = (decoded(ours, name) if quantized else plain_parameter(ours, name)).detach().clone()
            pairs.append((queries(ours, name) if quantized else plain_parameter(ours, name), parameters[name]))
    return pairs


def assert_same_gradients(pairs, got, want):
    """Of a loss that weighs every number differently."""
    for ours, theirs in zip(got, want, strict=True):
        weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
        (ours * weights).sum().backward(retain_graph=True)
        (theirs * weights).sum().backward(retain_graph=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad)


def pooled_pair(described, options, features, *, is_weighted=False):
    ours = build(DPQEmbeddingBagCollection, EmbeddingBagConfig, described, options, is_weighted=is_weighted)
    ours(features)  # moves the running statistics
    stock = EmbeddingBagCollection(tables=configs_of(EmbeddingBagConfig, described), is_weighted=is_weighted)
    return ours, stock, fill(stock, ours, described)


def assert_same_pooled(got, want):
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    torch.testing.assert_close(got.values(), want.values())


ALL_TABLES = TABLES | MIXED_POOLING


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("described", ALL_TABLES.values(), ids=ALL_TABLES.keys())
def test_bag_collection_returns_what_torchrec_returns_and_has_its_gradients(described, dtype):
    features = keyed(FEATURES, dtype=dtype)
    ours, stock, pairs = pooled_pair(described, STRAIGHT, features)
    got, want = ours(features), stock(features)
    assert_same_pooled(got, want)
    assert_same_gradients(pairs, [got.values()], [want.values()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bag_collection_in_eval_mode_returns_what_torchrec_returns(options):
    ours, stock, _ = pooled_pair(TABLES["two dimensions, some plain"], options, keyed(FEATURES))
    assert_same_pooled(ours.eval()(keyed(FEATURES)), stock(keyed(FEATURES)))


@pytest.mark.parametrize("described", TABLES.values(), ids=TABLES.keys())
def test_bag_collection_weights_samples_as_torchrec_does(described):
    weights = [torch.linspace(-1, 2, 9).requires_grad_() for _ in range(2)]
    ours_in, stock_in = (keyed(FEATURES, weights=w) for w in weights)
    ours, stock, pairs = pooled_pair(described, STRAIGHT, ours_in, is_weighted=True)
    got, want = ours(ours_in), stock(stock_in)
    assert ours.is_weighted()
    assert_same_pooled(got, want)
    assert_same_gradients(pairs, [got.values()], [want.values()])
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def unpooled_pair(described, options, **more):
    """Upstream holds tables of one dimension: one collection for each."""
    ours = build(DPQEmbeddingCollection, EmbeddingConfig, described, options, **more)
    ours(keyed(FEATURES))
    groups = {}
    for t in configs_of(EmbeddingConfig, described):
        groups.setdefault(t.embedding_dim, []).append(t)
    stocks = [EmbeddingCollection(tables=group, **more) for group in groups.values()]
    return ours, stocks, [pair for stock in stocks for pair in fill(stock, ours, described)]


def upstream_output(stocks, features, described):
    """Output of several stock collections, named as one of them would: by upstream's own function."""
    by_table = {}
    for stock in stocks:
        out = stock(features)
        for t, names in zip(stock.embedding_configs(), stock.embedding_names_by_table(), strict=True):
            by_table[t.name] = [out[name] for name in names]
    tables = configs_of(EmbeddingConfig, described)
    for t in tables:
        t.feature_names = t.feature_names or [t.name]  # as upstream's constructor does
    names_by_table = get_embedding_names_by_table(tables)
    return {
        name: jagged
        for t, names in zip(tables, names_by_table, strict=True)
        for name, jagged in zip(names, by_table[t.name], strict=True)
    }


def assert_same_jagged(got, want):
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name].values(), want[name].values())
        assert torch.equal(got[name].lengths(), want[name].lengths())
        assert torch.equal(got[name].offsets(), want[name].offsets())


@pytest.mark.parametrize("described", TABLES.values(), ids=TABLES.keys())
def test_collection_returns_what_torchrec_returns_and_has_its_gradients(described):
    features = keyed(FEATURES)
    ours, stocks, pairs = unpooled_pair(described, STRAIGHT)
    got, want = ours(features), upstream_output(stocks, features, described)
    if len(stocks) == 1:
        assert list(want) == list(stocks[0](features))
    assert_same_jagged(got, want)
    assert [n for names in ours.embedding_names_by_table() for n in names] == list(want)
    assert_same_gradients(pairs, [j.values() for j in got.values()], [j.values() for j in want.values()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_collection_in_eval_mode_returns_what_torchrec_returns(options):
    described = TABLES["two dimensions, some plain"]
    ours, stocks, _ = unpooled_pair(described, options)
    assert_same_jagged(ours.eval()(keyed(FEATURES)), upstream_output(stocks, keyed(FEATURES), described))


@pytest.mark.parametrize("need_indices", [False, True])
def test_collection_hands_ids_out_where_asked(need_indices):
    described = TABLES["a feature of a plain one too"]
    ours, (stock,), _ = unpooled_pair(described, STRAIGHT, need_indices=need_indices)
    got, want = ours(keyed(FEATURES)), stock(keyed(FEATURES))
    assert ours.need_indices() == need_indices
    for name in want:
        ids, wanted = got[name].weights_or_none(), want[name].weights_or_none()
        assert (ids is None) == (wanted is None) == (not need_indices)
        assert ids is None or torch.equal(ids, wanted)


def test_collections_tell_what_torchrecs_tell():
    ones = {"init_fn": torch.nn.init.ones_}
    described = [("a", "f", True, ones), ("p", "gf", False, ones)]
    ours, (stock,), _ = unpooled_pair(described, STRAIGHT)
    assert ours.embedding_configs() == stock.embedding_configs()
    assert (ours.embedding_dim(), ours.device) == (stock.embedding_dim(), stock.device)
    ours, stock, _ = pooled_pair(described, STRAIGHT, keyed(FEATURES))
    assert ours.embedding_bag_configs() == stock.embedding_bag_configs()


def test_collection_has_no_one_dimension_where_tables_differ():
    ours, _, _ = unpooled_pair(TABLES["two dimensions"], STRAIGHT)
    with pytest.raises(ConfigError, match=r"embedding_dim: the tables have \[8, 16\]; ask embedding_configs\(\)"):
        ours.embedding_dim()


def test_collection_leaves_the_users_configs_as_they_were():
    described = TABLES["no feature named"]
    tables = configs_of(EmbeddingBagConfig, described)
    DPQEmbeddingBagCollection(tables, config())
    assert [t.feature_names for t in tables] == [[], []]


def test_training_output_has_the_same_bits_as_the_values():
    ebc = make([table("a", feature_names=["f"])])
    features = keyed({"f": [[i] for i in range(20)]})
    out = ebc(features)["f"]
    values = {v.item() for v in ebc.quantizer("a").values_MKS.flatten()}
    assert all(v.item() in values for v in out.flatten())


def test_queries_get_the_gradient_of_every_occurrence():
    ebc = make([table("a", feature_names=["f"])], "vq")
    ebc(keyed({"f": [[3], [3, 3], [4]]})).values().sum().backward()
    gradient = ebc.queries["8"].embeddings["a"].weight.grad
    assert gradient[3].tolist() == [3.0] * 8
    assert gradient[4].tolist() == [1.0] * 8
    assert gradient[[0, 1, 2, *range(5, 20)]].abs().sum() == 0


def test_codebook_loss_reaches_the_values_without_a_line_in_the_training_loop():
    ebc = make([table("a", feature_names=["f"])], "vq")
    features = keyed({"f": [[3], [3, 3], [4]]})
    (ebc(features).values() * 0).sum().backward()
    quantizer = ebc.quantizer("a")
    queries = ebc.queries["8"].embeddings["a"].weight[[3, 4]].detach()
    again = quantizer(queries, torch.tensor([3.0, 1.0]))
    (want,) = torch.autograd.grad(again.codebook_loss, [quantizer.values_MKS])
    torch.testing.assert_close(quantizer.values_MKS.grad, want)
    torch.testing.assert_close(ebc.codebook_losses["a"], again.codebook_loss.detach())


@pytest.mark.parametrize("init_fn", [torch.nn.init.ones_, partial(torch.nn.init.uniform_, a=1.0, b=2.0)])
def test_collection_keeps_an_init_of_the_users_own(init_fn):
    ebc = make([table("a", feature_names=["f"], init_fn=init_fn)])
    assert (ebc.queries["8"].embeddings["a"].weight >= 1).all()


@pytest.mark.parametrize(
    ("is_weighted", "got"), [(False, "got per-sample weights"), (True, "got no per-sample weights")]
)
def test_collection_takes_weights_where_it_was_built_for_them_only(is_weighted, got):
    features = keyed({"a": [[0], [1, 2]]}, weights=None if is_weighted else torch.ones(3))
    ebc = DPQEmbeddingBagCollection([table("a")], config(), is_weighted=is_weighted)
    with pytest.raises(ConfigError, match=f"features: {got}, with is_weighted {is_weighted}: build the collection"):
        ebc(features)


@pytest.mark.parametrize("ours", [DPQEmbeddingBagCollection, DPQEmbeddingCollection])
def test_collection_rejects_a_batch_size_per_feature(ours):
    kind = EmbeddingBagConfig if ours is DPQEmbeddingBagCollection else EmbeddingConfig
    features = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.arange(5), lengths=torch.ones(5).long(), stride_per_key_per_rank=[[2], [3]]
    )
    with pytest.raises(ConfigError, match="got a batch size per feature, want one batch size for all"):
        ours([table("a", kind=kind), table("b", kind=kind)], config())(features)


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
        make([table("a")])(keyed({"a": [[2], [20]]}))


def test_collection_rejects_a_missing_feature():
    with pytest.raises(KeyError, match="want b too"):
        make([table("a"), table("b")])(keyed({"a": [[2]]}))


def test_collection_rejects_lengths_that_do_not_fit_the_ids():
    features = KeyedJaggedTensor(keys=["a"], values=torch.arange(5), lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="lengths of 3 ids in all, but 5 ids"):
        make([table("a")])(features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_weighted": True, "tables": [table("a", pooling=PoolingType.MEAN)]}, "with is_weighted, want SUM"),
        ({"tables": [table("a"), table("a")]}, "two are named 'a'"),
        ({"tables": [table("a", pooling=PoolingType.NONE)]}, "want SUM or MEAN"),
        ({"tables": [table("a", data_type=DataType.FP16)]}, "want FP32"),
        ({"config": {"b": DPQConfig(num_subspaces=4)}}, "config: got b; the tables: a"),
        ({"config": {}}, "got none for table 'a', want one, or None for a table that stays as it is"),
        ({"config": {"a": None}}, "got no table to quantize"),
    ],
)
def test_collection_rejects_what_it_cannot_do(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DPQEmbeddingBagCollection(**{"tables": [table("a")], "config": config(), **arguments})


def test_collection_rejects_negative_lengths():
    features = KeyedJaggedTensor(keys=["a"], values=torch.arange(2), lengths=torch.tensor([3, -1]))
    ebc = DPQEmbeddingBagCollection(
        [EmbeddingBagConfig(name="a", num_embeddings=20, embedding_dim=8, feature_names=["a"])],
        DPQConfig(num_subspaces=4),
    )
    with pytest.raises(ValueError, match="got a length of -1, want 0 or more"):
        ebc(features)
