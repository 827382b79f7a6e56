"""Every module held to the stock one over a dense table of the decoded vectors, and frozen bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore, Int64Vocabulary
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, DPQEmbeddingBagCollection, DPQEmbeddingCollection, freeze

ROWS, DIM = 40, 12
SMALL = {"num_subspaces": 3, "num_codes": 5}
CONFIGS = {
    "sx": {"method": "sx"},
    "sx tied, euclidean": {"method": "sx", "tie_keys": True, "metric": "euclidean"},
    "sx narrow keys": {"method": "sx", "key_dim": 2, "temperature": 0.5},
    "sx wide keys, cosine": {"method": "sx", "key_dim": 8, "metric": "cosine"},
    "sx shared, fp16": {"method": "sx", "share_subspaces": True, "values_dtype": "float16"},
    "sx levels": {"method": "sx", "num_levels": 2, "batch_norm": False},
    "vq": {"method": "vq"},
    "vq levels, fp16": {"method": "vq", "num_levels": 3, "values_dtype": "float16", "commitment_weight": 0.2},
    "vq ema, revival": {"method": "vq", "ema_decay": 0.9, "revive_after": 2},
    "vq shared levels": {"method": "vq", "num_levels": 2, "share_subspaces": True, "value_gradient": True},
}


def bag_table(name, features=None, dim=DIM):
    return EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=dim, feature_names=features or [name])


def id_table(name, features=None, dim=DIM):
    return EmbeddingConfig(name=name, num_embeddings=ROWS, embedding_dim=dim, feature_names=features or [name])


def keyed(lists_by_feature, weights=None):
    lengths = torch.tensor([len(bag) for lists in lists_by_feature.values() for bag in lists])
    ids = torch.tensor([i for lists in lists_by_feature.values() for bag in lists for i in bag], dtype=torch.long)
    return KeyedJaggedTensor(keys=list(lists_by_feature), values=ids, lengths=lengths, weights=weights)


def singles(*features):
    return keyed({feature: [[i] for i in range(ROWS)] for feature in features})


def decoded(module, name):
    quantizer = module.quantizer(name)
    return quantizer.decode(quantizer.encode(module.query_weights()[name])).detach()


def a_few_steps(module, forward):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        forward().square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_artifact_equals_eval_output_bit_for_bit_in_every_module(settings, tmp_path):
    torch.manual_seed(0)
    config, ids = DPQConfig(**SMALL, **settings), torch.arange(ROWS)
    modules = {
        "bags": (DPQEmbeddingBagCollection([bag_table("bags")], config), lambda m: m(singles("bags")).values()),
        "ids": (DPQEmbeddingCollection([id_table("ids")], config), lambda m: m(singles("ids"))["ids"].values()),
        "one": (DPQEmbedding(ROWS, DIM, config), lambda m: m(ids)),
        "bag": (DPQEmbeddingBag(ROWS, DIM, config), lambda m: m(ids[:, None])),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in modules.items()})
    for module, forward in modules.values():
        a_few_steps(module, lambda module=module, forward=forward: forward(module))
        for name in module.quantizers:
            module.quantizer(name).values_MKS.data[:, 0] = -0.0
    freeze(model, tmp_path / "artifact")
    store = EmbeddingStore.open(tmp_path / "artifact")
    assert set(store.tables) == set(modules)
    for name, (module, forward) in modules.items():
        want = forward(module.eval()).detach().numpy()
        assert store.lookup(name, np.arange(ROWS)).vectors.tobytes() == want.tobytes(), name


def test_embedding_returns_what_torch_returns_and_zeros_for_the_padding():
    module = DPQEmbedding(ROWS, DIM, DPQConfig(**SMALL), padding_idx=-1).eval()
    ids = torch.tensor([[3, 39, 3], [0, 39, 38]], dtype=torch.int32)
    dense = decoded(module, "table")
    dense[-1] = 0
    assert torch.equal(module(ids), nn.functional.embedding(ids, dense))


def test_padding_trains_nothing():
    module = DPQEmbedding(ROWS, DIM, DPQConfig(method="vq", **SMALL), padding_idx=3)
    module(torch.tensor([3, 3, 7])).sum().backward()
    with_padding = module.only_quantizer.values_MKS.grad.clone(), module.only_quantizer.score_norms[0].mean_K.clone()
    gradient = module.query_weights()["table"]
    assert module.queries[str(DIM)].embeddings["table"].weight.grad[3].abs().sum() == 0
    again = DPQEmbedding(ROWS, DIM, DPQConfig(method="vq", **SMALL))
    again.query_weights()["table"].copy_(gradient)
    again.only_quantizer.values_MKS.data.copy_(module.only_quantizer.values_MKS.data)
    again(torch.tensor([7])).sum().backward()
    torch.testing.assert_close(again.only_quantizer.values_MKS.grad, with_padding[0])
    torch.testing.assert_close(again.only_quantizer.score_norms[0].mean_K, with_padding[1])


@pytest.mark.parametrize("padding_idx", [-41, 40])
def test_embedding_rejects_a_padding_outside_the_table(padding_idx):
    with pytest.raises(ConfigError, match=f"padding_idx: got {padding_idx}, want -40 to 39"):
        DPQEmbedding(ROWS, DIM, DPQConfig(**SMALL), padding_idx=padding_idx)


def test_penalties_of_several_calls_add_up():
    torch.manual_seed(0)
    module = DPQEmbedding(ROWS, DIM, DPQConfig(method="vq", batch_norm=False, **SMALL))
    values_MKS = module.only_quantizer.values_MKS

    def gradient(*batches):
        values_MKS.grad = None
        sum((module(batch) * 0).sum() for batch in batches).backward()
        return values_MKS.grad.clone()

    first, second = torch.tensor([1, 2, 2]), torch.tensor([[5], [30]])
    torch.testing.assert_close(gradient(first, second), gradient(first) + gradient(second))
    assert gradient(first).abs().sum() > 0


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_bag_returns_what_torch_returns_over_the_decoded_table(mode, padding_idx):
    module = DPQEmbeddingBag(ROWS, DIM, DPQConfig(**SMALL), mode=mode, padding_idx=padding_idx).eval()
    dense = nn.EmbeddingBag.from_pretrained(decoded(module, "table"), mode=mode, padding_idx=padding_idx)
    flat, offsets = torch.tensor([1, 2, 2, 39, 2]), torch.tensor([0, 2, 2, 4])
    torch.testing.assert_close(module(flat, offsets), dense(flat, offsets))
    square = torch.tensor([[1, 2], [2, 2], [5, 1]])
    torch.testing.assert_close(module(square), dense(square))
    module.include_last_offset = dense.include_last_offset = True
    ends = torch.tensor([0, 2, 5])
    torch.testing.assert_close(module(flat, ends), dense(flat, ends))


def test_embedding_bag_weights_its_ids_and_gives_the_weights_gradients():
    module = DPQEmbeddingBag(ROWS, DIM, DPQConfig(**SMALL), mode="sum").eval()
    dense = nn.EmbeddingBag.from_pretrained(decoded(module, "table"), mode="sum")
    ids = torch.tensor([[1, 2], [2, 39]])
    weights, same = (torch.tensor([[0.5, 2.0], [-1.0, 3.0]], requires_grad=True) for _ in range(2))
    got, want = module(ids, per_sample_weights=weights), dense(ids, per_sample_weights=same)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(weights.grad, same.grad)


FEATURES = {"f": [[1, 2, 2], [], [19]], "g": [[0], [5, 5], []], "h": [[], [], []]}


def test_weighted_bags_equal_torchrecs_and_give_the_weights_gradients():
    tables = [bag_table("a", ["f", "h"]), bag_table("b", ["g"])]
    module = DPQEmbeddingBagCollection(tables, {"a": DPQConfig(**SMALL), "b": None}, is_weighted=True).eval()
    plain = EmbeddingBagCollection(tables=tables, is_weighted=True)
    plain.embedding_bags["a"].weight.data = decoded(module, "a")
    plain.embedding_bags["b"].weight.data = module.plain["bags"].embedding_bags["b"].weight.data
    weights, same = (torch.linspace(-1, 2, 7).requires_grad_() for _ in range(2))
    got, want = module(keyed(FEATURES, weights)), plain(keyed(FEATURES, same))
    assert got.keys() == want.keys()
    torch.testing.assert_close(got.values(), want.values())
    got.values().square().sum().backward()
    want.values().square().sum().backward()
    torch.testing.assert_close(weights.grad, same.grad)


def test_weighted_bags_need_weights():
    module = DPQEmbeddingBagCollection([bag_table("a", ["f"])], DPQConfig(**SMALL), is_weighted=True)
    with pytest.raises(ConfigError, match="got no per-sample weights, with is_weighted True"):
        module(keyed(FEATURES))


def test_bag_collection_keeps_the_order_and_names_of_upstream_beside_plain_tables():
    tables = [bag_table("a", ["f"]), bag_table("b", ["f", "g"], dim=6), bag_table("c", ["h"])]
    module = DPQEmbeddingBagCollection(tables, {"a": None, "b": DPQConfig(**SMALL), "c": None}).eval()
    plain = EmbeddingBagCollection(tables=tables)
    plain.embedding_bags["b"].weight.data = decoded(module, "b")
    for name in "ac":
        plain.embedding_bags[name].weight.data = module.plain["bags"].embedding_bags[name].weight.data
    got, want = module(keyed(FEATURES)), plain(keyed(FEATURES))
    assert got.keys() == want.keys() == ["f@a", "f@b", "g", "h"]
    torch.testing.assert_close(got.values(), want.values())


@pytest.mark.parametrize("need_indices", [False, True])
def test_collection_returns_what_torchrec_returns_over_the_decoded_tables(need_indices):
    tables = [id_table("a", ["f"]), id_table("b", ["f", "g"]), id_table("c", ["h", "g"])]
    config = DPQConfig(**SMALL)
    module = DPQEmbeddingCollection(tables, {"a": config, "b": None, "c": config}, need_indices=need_indices).eval()
    plain = EmbeddingCollection(tables=tables, need_indices=need_indices)
    for name in "ac":
        plain.embeddings[name].weight.data = decoded(module, name)
    plain.embeddings["b"].weight.data = module.plain[str(DIM)].embeddings["b"].weight.data
    got, want = module(keyed(FEATURES)), plain(keyed(FEATURES))
    assert list(got) == list(want) == ["f@a", "f@b", "g@b", "h", "g@c"]
    for name in want:
        assert torch.equal(got[name].values(), want[name].values())
        assert torch.equal(got[name].lengths(), want[name].lengths())
        weights = [jagged[name].weights_or_none() for jagged in (got, want)]
        assert torch.equal(*weights) if need_indices else weights == [None, None]


def test_collection_holds_tables_of_different_dimensions():
    tables = [id_table("a", ["f"]), id_table("b", ["g"], dim=6)]
    module = DPQEmbeddingCollection(tables, {"a": DPQConfig(key_dim=2, **SMALL), "b": None})
    out = module(keyed(FEATURES))
    assert [out[name].values().shape[1] for name in "fg"] == [DIM, 6]
    with pytest.raises(ConfigError, match=r"the tables have \[6, 12\]"):
        module.embedding_dim()


@pytest.mark.parametrize("kind", ["bags", "ids"])
def test_a_table_without_ids_takes_part_in_the_backward_pass(kind):
    config = DPQConfig(method="vq", commitment_weight=0.1, **SMALL)
    if kind == "bags":
        module = DPQEmbeddingBagCollection([bag_table("a", ["f"]), bag_table("h")], config)
        module(keyed(FEATURES)).values().sum().backward()
    else:
        module = DPQEmbeddingCollection([id_table("a", ["f"]), id_table("h")], config)
        sum(jagged.values().sum() for jagged in module(keyed(FEATURES)).values()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


def build(kind, device):
    config = DPQConfig(method="vq", ema_decay=0.9, revive_after=3, **SMALL)
    if kind == "bags":
        return DPQEmbeddingBagCollection([bag_table("a"), bag_table("b")], {"a": config, "b": None}, device=device)
    if kind == "ids":
        return DPQEmbeddingCollection([id_table("a"), id_table("b")], {"a": config, "b": None}, device=device)
    return (DPQEmbedding if kind == "one" else DPQEmbeddingBag)(ROWS, DIM, config, name="a", device=device)


@pytest.mark.parametrize("kind", ["bags", "ids", "one", "bag"])
def test_module_built_on_meta_starts_as_one_built_on_cpu(kind):
    torch.manual_seed(0)
    meta = build(kind, torch.device("meta"))
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    meta = meta.to_empty(device="cpu")
    for tensor in (*meta.parameters(), *meta.buffers()):
        tensor.data.fill_(77)
    meta.reset_parameters()
    plain = build(kind, torch.device("cpu"))
    assert meta.state_dict().keys() == plain.state_dict().keys()
    for (name, buffer), other in zip(meta.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for (name, parameter), other in zip(meta.named_parameters(), plain.parameters(), strict=True):
        assert 0.5 < parameter.abs().max() / other.abs().max() < 2, name


@pytest.mark.parametrize("kind", ["bags", "ids", "one", "bag"])
def test_state_dict_makes_a_fresh_module_the_same(kind):
    def forward(module):
        if kind == "bags":
            return module(singles("a", "b")).values()
        if kind == "ids":
            return module(singles("a", "b"))["a"].values()
        return module(torch.arange(ROWS)[:, None])

    module, fresh = build(kind, torch.device("cpu")), build(kind, torch.device("cpu"))
    a_few_steps(module, lambda: forward(module))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(forward(fresh.eval()), forward(module.eval()))


def test_freeze_serves_zeros_for_the_padding_as_for_a_missing_id(tmp_path):
    module = DPQEmbedding(ROWS, DIM, DPQConfig(**SMALL), padding_idx=2, name="word")
    freeze(nn.Sequential(module), tmp_path / "artifact")
    found = EmbeddingStore.open(tmp_path / "artifact").lookup("word", np.arange(ROWS))
    assert found.missing.tolist() == [2]
    assert found.vectors.tobytes() == module.eval()(torch.arange(ROWS)).detach().numpy().tobytes()


def test_freeze_refuses_a_vocabulary_with_an_id_for_the_padding(tmp_path):
    model = nn.Sequential(DPQEmbedding(ROWS, DIM, DPQConfig(**SMALL), padding_idx=2))
    with pytest.raises(ConfigError, match="id 1002 lives in row 2, the padding row"):
        freeze(model, tmp_path / "a", vocabularies={"0": Int64Vocabulary.from_ids(np.arange(ROWS) + 1000)})
    assert not (tmp_path / "a").exists()


def test_freeze_takes_torchs_own_tables_where_they_are_named(tmp_path):
    model = nn.ModuleDict(
        {
            "dpq": DPQEmbedding(ROWS, DIM, DPQConfig(**SMALL)),
            "plain": nn.Embedding(ROWS, 4),
            "ids": EmbeddingCollection(tables=[id_table("ec")]),
        }
    )
    model["plain"].weight.data[0] = -0.0
    freeze(model, tmp_path / "default")
    assert set(EmbeddingStore.open(tmp_path / "default").tables) == {"dpq", "ec"}
    freeze(model, tmp_path / "named", tables=["plain", "ec"])
    store = EmbeddingStore.open(tmp_path / "named")
    assert set(store.tables) == {"plain", "ec"}
    want = model["plain"](torch.arange(ROWS)).detach().numpy()
    assert store.lookup("plain", np.arange(ROWS)).vectors.tobytes() == want.tobytes()
    with pytest.raises(ConfigError, match="got nobody; the model's tables: dpq, ec, plain"):
        freeze(model, tmp_path / "other", tables=["nobody"])
