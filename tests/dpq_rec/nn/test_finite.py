"""Numbers that are not finite: training, start and freeze name them by table and row, and nothing takes them in."""

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import ConfigError
from dpq_rec.nn import (
    DPQEmbedding,
    DPQEmbeddingBag,
    DPQEmbeddingBagCollection,
    Quantizer,
    finite,
    freeze,
    replace_embeddings,
    start,
    warm_up,
)
from tests.dpq_rec.nn.modules import KINDS, NUM_IDS, batch, build, config, queries, train, vectors
from tests.dpq_rec.nn.options import OPTIONS

NAN, INF = float("nan"), float("inf")
STATEFUL = {
    "sx": {"method": "sx", "revive_after": 2},
    "sx, cosine, levels": {"method": "sx", "metric": "cosine", "num_levels": 2, "batch_norm": False},
    "vq, means, levels": {"method": "vq", "ema_decay": 0.9, "num_levels": 2, "revive_after": 2},
    "vq, means": {"method": "vq", "ema_decay": 0.9, "batch_norm": False},
    "vq, no batch norm": {"method": "vq", "batch_norm": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)
stateful = pytest.mark.parametrize("options", STATEFUL.values(), ids=STATEFUL.keys())


def made(kind, **options):
    torch.manual_seed(0)
    return build(kind, config(**options))


def table_of(module):
    return "item" if "item" in module.quantizers else "table"


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module, before):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@kinds
@stateful
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_forward_in_training_names_table_and_row_and_takes_nothing_in(kind, options, bad):
    module = made(kind, **options)
    train(module, batch(kind), steps=2)
    queries(module, table_of(module)).data[13, 5] = bad
    before = state(module)
    message = f"table '{table_of(module)}': got NaN or infinity in the query of row 13; did the training diverge?"
    with pytest.raises(ConfigError, match=message):
        module(batch(kind, [17, 13, 4]))
    assert_unchanged(module, before)


@stateful
@pytest.mark.parametrize("large", [1e19, -3e38])
def test_queries_too_large_to_be_compared_are_refused_like_infinity(options, large):
    module = made(DPQEmbeddingBag, **options)
    queries(module).data[13, 5] = large
    before = state(module)
    with pytest.raises(
        ConfigError, match=r"got a number above .*, too large to be compared in float32, in the query of"
    ):
        module(batch(DPQEmbeddingBag, [17, 13, 4]))
    assert_unchanged(module, before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_all_statistics_of_the_largest_queries_and_keys_are_finite(options):
    """What is let through does not overflow further in: neither moments nor means, codebook loss nor gradients."""
    torch.manual_seed(0)
    quantizer = Quantizer(64, config(num_subspaces=1, **options), num_embeddings=30)
    largest = finite.training_inputs(quantizer, torch.zeros(1), None, "", only_queries=True)[0].largest
    for parameter in quantizer.parameters():
        limit = min(largest, 60_000.0 if quantizer.config.values_dtype == "float16" else largest)
        parameter.data = limit * (1 - 2 * torch.rand_like(parameter)).sign()
    rows = (largest * (1 - 2 * torch.rand(30, quantizer.query_dim)).sign()).requires_grad_()
    quantized = quantizer(rows, torch.full((30,), 1000.0), torch.arange(30))
    (quantized.vectors_NE.sum() + quantized.codebook_loss).backward()
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())
    assert quantized.codebook_loss.isfinite()
    assert rows.grad.isfinite().all()


@kinds
@pytest.mark.parametrize("what", ["values", "keys"])
def test_keys_and_values_that_are_not_finite_are_refused_too(kind, what):
    module = made(kind, method="sx", key_dim=2)
    quantizer = module.quantizer(table_of(module))
    (quantizer.values_MKS if what == "values" else quantizer.own_keys_MKS).data[1, 2, 0] = NAN
    with pytest.raises(ConfigError, match=f"table '{table_of(module)}': got NaN or infinity in its {what}; did the"):
        module(batch(kind))


def test_values_beyond_half_precision_are_refused_where_they_are_rounded_to_it():
    module = made(DPQEmbedding, method="vq", values_dtype="float16")
    module.only_quantizer.values_MKS.data[0, 0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"table 'table': got a number above 6.6e\+04, .* in its values"):
        module(batch(DPQEmbedding))


@kinds
def test_a_table_in_its_warm_up_is_refused_too_and_takes_any_finite_query(kind):
    module = made(kind, method="vq")
    warm_up(nn.ModuleDict({"tables": module}))
    query = queries(module, table_of(module))
    query.data[3, 1] = 3e38
    assert any((v == 3e38).any() for v in vectors(module, batch(kind, [3])).values())
    query.data[3, 1] = INF
    with pytest.raises(ConfigError, match="got NaN or infinity in the query of row 3;"):
        module(batch(kind, [5, 3]))


def test_a_row_that_no_batch_asks_for_stops_no_training_but_the_freeze(tmp_path):
    module = made(DPQEmbeddingBag)
    queries(module).data[13] = NAN
    module(batch(DPQEmbeddingBag, [1, 2]))
    with pytest.raises(ConfigError, match="table 'bag': got NaN or infinity in the query of row 13;"):
        freeze(nn.ModuleDict({"bag": module}), tmp_path / "artifact")


def test_the_first_of_several_rows_is_named_and_infinity_before_what_is_large():
    module = made(DPQEmbedding)
    queries(module).data[[4, 6, 9], 0] = torch.tensor([1e30, NAN, INF])
    with pytest.raises(ConfigError, match="got NaN or infinity in the query of row 6;"):
        module(batch(DPQEmbedding))


def test_a_table_is_named_by_its_path_in_the_model():
    model = replace_embeddings(nn.ModuleDict({"deep": nn.Sequential(nn.Embedding(9, 12))}), config())
    queries(model["deep"][0], "deep_0").data[4] = NAN
    with pytest.raises(ConfigError, match=r"table 'deep\.0': got NaN or infinity in the query of row 4;"):
        model["deep"][0](torch.tensor([4]))


def test_a_padding_row_may_hold_anything(tmp_path):
    module = made(DPQEmbedding, method="vq")  # row 0 is padding
    queries(module).data[0] = NAN
    start(nn.ModuleDict({"words": module}))
    assert module(torch.tensor([0, 1])).isfinite().all()
    freeze(nn.ModuleDict({"words": module}), tmp_path / "artifact")


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 5, 8])])
def test_a_quantizer_by_itself_refuses_too(rows):
    quantizer = Quantizer(8, config(method="vq", ema_decay=0.9))
    bad, before = torch.ones(3, 8), state(quantizer)
    bad[1, 0] = INF
    row = 1 if rows is None else 5
    with pytest.raises(ConfigError, match=f"quantizer: got NaN or infinity in the query of row {row};"):
        quantizer(bad, rows_N=rows)
    with pytest.raises(ConfigError, match=f"quantizer: got NaN or infinity in the query of row {row};"):
        quantizer.start(bad, rows)
    assert_unchanged(quantizer, before)


def test_a_gradient_that_overflows_into_a_fused_optimizer_is_named_by_the_next_forward(one_rank):
    """A GradScaler holds back the steps of others, but these are made in backward already."""
    model = nn.Sequential(made(DPQEmbeddingBagCollection, **STATEFUL["vq, means, levels"]))
    _apply_optimizer_in_backward(torch.optim.SGD, model[0].queries.parameters(), {"lr": 0.1})
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"), init_data_parallel=False)
    statistics = {name: t.clone() for name, t in model.state_dict().items() if ".queries." not in name}
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    features = batch(DPQEmbeddingBagCollection, [2, 5])
    scaler.scale(wrapped(features).values().sum() * 1e3).backward()
    after = {name: t.clone() for name, t in model.state_dict().items() if ".queries." not in name}
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert statistics.keys() == after.keys()
    with pytest.raises(ConfigError, match="table 'item': got NaN or infinity in the query of row 2;"):
        wrapped(features)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in after.items())


@kinds
@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("values_MKS", "values"),
        ("own_keys_MKS", "keys"),
        ("score_norms.0.mean_K", r"running statistics \(score_norms.0.mean_K\)"),
        ("score_norms.0.var_K", r"running statistics \(score_norms.0.var_K\)"),
    ],
)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_freeze_refuses_what_a_quantizer_keeps(kind, part, what, bad, tmp_path):
    module = made(kind, method="sx", key_dim=2)
    name = table_of(module)
    module.quantizer(name).state_dict()[part].view(-1)[1] = bad
    table = name if name == "item" else "tables"
    with pytest.raises(ConfigError, match=f"table '{table}': got NaN or infinity in its {what};"):
        freeze(nn.ModuleDict({"tables": module}), tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


def test_freeze_refuses_queries_whose_scores_would_overflow(tmp_path):
    module = made(DPQEmbeddingBag, method="vq", batch_norm=False)
    queries(module).data[7, 0] = 1e20
    with pytest.raises(ConfigError, match=r"table 'bag': got a number above .* in the query of row 7;"):
        freeze(nn.ModuleDict({"bag": module}), tmp_path / "artifact")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", ["collection", "embedding"])
def test_freeze_refuses_plain_tables_too(kind, bad, tmp_path):
    if kind == "collection":
        tables = [EmbeddingBagConfig(name="item", num_embeddings=9, embedding_dim=4, feature_names=["item"])]
        model = nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables)})
        model["tables"].embedding_bags["item"].weight.data[8, 3] = bad
    else:
        model = nn.ModuleDict({"item": nn.Embedding(9, 4)})
        model["item"].weight.data[8, 3] = bad
    with pytest.raises(ConfigError, match="table 'item': got NaN or infinity in the vector of row 8;"):
        freeze(model, tmp_path / "artifact", tables=["item"])
    assert not list(tmp_path.iterdir())


def test_a_row_in_a_later_chunk_is_named_by_its_place_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK", 50)
    module = made(DPQEmbeddingBag)
    queries(module).data[NUM_IDS - 1, 11] = INF
    with pytest.raises(ConfigError, match=f"the query of row {NUM_IDS - 1};"):
        freeze(nn.ModuleDict({"bag": module}), tmp_path / "artifact")


@kinds
@pytest.mark.parametrize("bad", [NAN, INF, 1e19, 3e38])
@pytest.mark.parametrize("num_samples", [5, 1 << 16])
def test_start_names_table_and_row_sampled_or_not_and_leaves_all_as_it_was(kind, bad, num_samples):
    module = made(kind, method="vq", batch_norm=False)
    queries(module, table_of(module)).data[13, 5] = bad
    before = state(module)
    table = "item" if table_of(module) == "item" else "tables"
    with pytest.raises(ConfigError, match=f"table '{table}': got .* in the query of row 13;"):
        start(nn.ModuleDict({"tables": module}), num_samples=num_samples)
    assert_unchanged(module, before)


def test_start_mends_keys_and_values_that_are_not_finite():
    module = made(DPQEmbeddingBag, method="vq")
    for tensor in module.only_quantizer.state_dict().values():
        tensor.fill_(NAN)
    start(nn.ModuleDict({"bag": module}))
    assert all(tensor.isfinite().all() for tensor in module.only_quantizer.state_dict().values())
    module(batch(DPQEmbeddingBag))
