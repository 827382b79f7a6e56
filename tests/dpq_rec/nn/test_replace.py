"""Stock models with their tables replaced: they train, freeze and load."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore
from dpq_rec.nn import (
    DPQEmbedding,
    DPQEmbeddingBag,
    DPQEmbeddingBagCollection,
    DPQEmbeddingCollection,
    freeze,
    replace_embeddings,
    start,
    warm_up,
)

ROWS, DIM, BATCH, WORDS, PAD = 30, 8, 64, 12, 0
SX, VQ = DPQConfig(num_subspaces=4, num_codes=6), DPQConfig(method="vq", num_subspaces=4, num_codes=6)
FEATURES = ["user", "item", "tags"]


def bag_tables():
    return [
        EmbeddingBagConfig(name="users", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["user"]),
        EmbeddingBagConfig(name="goods", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["item", "tags"]),
    ]


def dlrm():
    return DLRM(EmbeddingBagCollection(tables=bag_tables()), 4, [16, DIM], [16, 1])


def deepfm():
    return SimpleDeepFMNN(4, EmbeddingBagCollection(tables=bag_tables()), 16, 8)


class Translator(nn.Module):
    """A transformer encoder-decoder that reads and writes the same words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 16, padding_idx=PAD)
        self.places = nn.Embedding(8, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.over = nn.Linear(16, WORDS)

    def embed(self, words):
        return self.words(words) + self.places(torch.arange(words.shape[1]))

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.over(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


def click_loss(model):
    """Clicks that depend on the user alone, and so on what the table learns."""
    users, items, tags = torch.randint(0, ROWS, (3, BATCH))
    features = KeyedJaggedTensor(
        keys=FEATURES, values=torch.cat([users, items, tags]), lengths=torch.ones(3 * BATCH, dtype=torch.long)
    )
    out = model(torch.ones(BATCH, 4), features).squeeze(1)
    labels = (users % 2).float()
    if isinstance(model, DLRM):
        return nn.functional.binary_cross_entropy_with_logits(out, labels)
    return nn.functional.binary_cross_entropy(out, labels)


def reversal_loss(model):
    """Translation in small: the target is the source, reversed and shifted by one word."""
    source = torch.randint(2, WORDS, (BATCH, 4))
    target = torch.cat([torch.ones(BATCH, 1, dtype=torch.long), (source.flip(1) - 1) % WORDS], 1)
    logits = model(source, target[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


MODELS = {"dlrm": (dlrm, click_loss), "deepfm": (deepfm, click_loss), "transformer": (Translator, reversal_loss)}


@pytest.mark.parametrize("config", [SX, VQ], ids=["sx", "vq"])
@pytest.mark.parametrize("name", MODELS)
def test_model_trains_freezes_and_loads(name, config, tmp_path):
    make, loss_of = MODELS[name]
    torch.manual_seed(0)
    model = replace_embeddings(make(), config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])

    fresh = replace_embeddings(make(), config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = []
        for each in (model.eval(), fresh.eval()):
            torch.manual_seed(1)
            outputs.append(loss_of(each))
        assert torch.equal(*outputs)

    freeze(fresh, tmp_path / "artifact")
    store = EmbeddingStore.open(tmp_path / "artifact")
    if name == "transformer":
        want = {"words": model.words(torch.arange(WORDS)), "places": model.places(torch.arange(8))}
    else:
        ids = torch.arange(ROWS)
        features = KeyedJaggedTensor(
            keys=FEATURES, values=ids.repeat(3), lengths=torch.ones(3 * ROWS, dtype=torch.long)
        )
        pooled = model.sparse_arch.embedding_bag_collection(features)
        want = {"users": pooled["user"], "goods": pooled["item"]}
    assert set(store.tables) == set(want)
    for table, vectors in want.items():
        stored = store.lookup(table, np.arange(len(vectors))).vectors
        assert stored.tobytes() == vectors.detach().numpy().tobytes()


def every_kind():
    return nn.ModuleDict(
        {
            "bags": EmbeddingBagCollection(tables=bag_tables()),
            "deep": nn.Sequential(
                EmbeddingCollection(tables=[EmbeddingConfig(name="ec", num_embeddings=ROWS, embedding_dim=DIM)]),
                nn.Embedding(ROWS, DIM, padding_idx=3),
                nn.EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=True),
            ),
        }
    )


def test_every_table_is_replaced_by_its_counterpart():
    model = every_kind().eval()
    assert replace_embeddings(model, SX) is model
    kinds = [type(model["bags"]), *(type(child) for child in model["deep"])]
    assert kinds == [DPQEmbeddingBagCollection, DPQEmbeddingCollection, DPQEmbedding, DPQEmbeddingBag]
    assert not any(module.training for module in model.modules())
    assert model["deep"][1].padding_idx == 3
    assert (model["deep"][2].mode, model["deep"][2].include_last_offset) == ("sum", True)


def test_tables_are_chosen_by_name_and_configured_each():
    model = every_kind()
    kept = model["bags"].embedding_bags["users"].weight
    other = model["deep"][0]
    wide = DPQConfig(num_subspaces=2, num_codes=9)
    replace_embeddings(model, {"goods": wide, "deep.1": SX})
    assert model["bags"].quantizer("goods").config is wide
    assert model["deep"][1].only_quantizer.config is SX
    assert model["bags"].plain["bags"].embedding_bags["users"].weight is kept
    assert model["deep"][0] is other
    assert type(model["deep"][2]) is nn.EmbeddingBag


def test_tables_narrow_a_config_for_all():
    model = replace_embeddings(every_kind(), SX, tables=["ec"])
    assert type(model["bags"]) is EmbeddingBagCollection
    assert type(model["deep"][0]) is DPQEmbeddingCollection


def test_a_table_module_itself_is_returned_replaced():
    assert type(replace_embeddings(nn.Embedding(ROWS, DIM), SX)) is DPQEmbedding


def test_a_shared_module_is_replaced_by_one():
    shared = nn.Embedding(ROWS, DIM)
    model = replace_embeddings(nn.ModuleDict({"source": shared, "target": shared}), SX)
    assert type(model["source"]) is DPQEmbedding
    assert model["source"] is model["target"]


def test_a_frozen_table_stays_frozen():
    model = nn.Sequential(nn.Embedding(ROWS, DIM).requires_grad_(requires_grad=False), nn.Embedding(ROWS, DIM))
    replace_embeddings(model, SX)
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert all(parameter.requires_grad for parameter in model[1].parameters())


def test_device_is_kept():
    model = replace_embeddings(nn.Sequential(nn.Embedding(ROWS, DIM, device="meta")), SX)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "config",
    [
        DPQConfig(num_subspaces=4, num_codes=6, metric="euclidean"),  # the highest dot product is not the nearest
        VQ,
        DPQConfig(method="vq", num_subspaces=2, num_codes=4, num_levels=3),
    ],
    ids=["sx", "vq", "levels"],
)
def test_from_weights_gives_vectors_near_the_weights(config):
    torch.manual_seed(0)
    model = every_kind()
    centres = torch.randn(3, DIM)
    weights = {
        "goods": model["bags"].embedding_bags["goods"].weight,
        "ec": model["deep"][0].embeddings["ec"].weight,
        "deep.1": model["deep"][1].weight,
    }
    for weight in weights.values():
        weight.data = centres[torch.randint(0, 3, (ROWS,))] + 0.01 * torch.randn(ROWS, DIM)
    replace_embeddings(model, config, tables=list(weights), from_weights=True)
    modules = {"goods": model["bags"], "ec": model["deep"][0], "deep.1": model["deep"][1]}
    for name, module in modules.items():
        key = name.replace(".", "_")
        queries, quantizer = module.query_weights()[key], module.quantizer(key).eval()
        assert torch.equal(queries, weights[name])
        kept = torch.arange(ROWS) != 3 if name == "deep.1" else torch.ones(ROWS, dtype=torch.bool)
        error = (quantizer(queries).vectors_NE - queries)[kept].square().mean()
        assert error < 0.05 * queries[kept].var()


def test_start_ignores_the_padding_row_and_is_the_same_for_a_seed():
    torch.manual_seed(0)
    module = DPQEmbedding(ROWS, DIM, VQ, padding_idx=3)
    module.query_weights()["table"][3] = 1e6
    values = []
    for seed in (0, 0, 1):
        start(nn.Sequential(module), seed=seed, num_samples=20)
        values.append(module.only_quantizer.values_MKS.detach().clone())
    assert values[0].abs().max() < 10
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_start_needs_a_dpq_module():
    with pytest.raises(ConfigError, match="holds no DPQ module"):
        start(nn.Sequential(nn.Linear(2, 2)))


def tied(over):
    """A table whose weight another module uses too."""
    model = nn.ModuleDict({"words": nn.Embedding(ROWS, DIM), "over": over})
    model["over"].weight = model["words"].weight
    return model


class OwnLinear(nn.Linear):
    """Which may do something else."""


def fused():
    model = every_kind()
    _apply_optimizer_in_backward(torch.optim.SGD, model["bags"].parameters(), {"lr": 0.1})
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (every_kind, {"config": SX, "tables": ["usr"]}, "tables: got usr; the model's tables: deep.1, deep.2, ec, "),
        (every_kind, {"config": {"usr": SX}}, "got usr; the model's tables"),
        (every_kind, {"config": {"ec": SX}, "tables": ["goods"]}, "config: got none for goods"),
        (every_kind, {"config": SX, "tables": []}, "tables: got none to replace"),
        (lambda: nn.Linear(2, 2), {"config": SX}, "none that can be replaced"),
        (lambda: nn.Embedding(ROWS, DIM, max_norm=1.0), {"config": SX}, "got max_norm=1.0, which is not kept"),
        (lambda: nn.Embedding(ROWS, DIM, scale_grad_by_freq=True), {"config": SX}, "got scale_grad_by_freq=True"),
        (lambda: nn.Embedding(ROWS, DIM, sparse=True), {"config": SX}, "got sparse=True"),
        (lambda: nn.Embedding(ROWS, DIM).double(), {"config": SX}, "got weights of torch.float64"),
        (lambda: nn.Embedding(ROWS, 7), {"config": SX}, "want a divisor of embedding_dim 7"),
        (lambda: nn.Embedding(ROWS, DIM, device="meta"), {"config": SX, "from_weights": True}, "meta device"),
        (
            lambda: nn.Embedding(ROWS, DIM),
            {"config": DPQConfig(num_subspaces=4, num_codes=6, key_dim=3), "from_weights": True},
            "got key_dim 3 with from_weights",
        ),
        (lambda: tied(OwnLinear(DIM, ROWS)), {"config": SX}, "got a weight that over uses too"),
        (lambda: tied(nn.EmbeddingBag(ROWS, DIM)), {"config": SX, "tables": ["words"]}, "a weight that over uses too"),
        (lambda: tied(nn.Embedding(ROWS, DIM, padding_idx=3)), {"config": SX}, "got a weight that over uses too"),
        (fused, {"config": SX}, "apply it after replacing"),
    ],
)
def test_replace_refuses_and_leaves_the_model_as_it_was(model, arguments, message):
    model = model()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        replace_embeddings(model, **arguments)
    assert [id(module) for module in model.modules()] == before


def test_queries_from_weights_outlive_sharding(one_rank):
    weights = torch.randn(100, 16)
    stock = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="a", num_embeddings=100, embedding_dim=16, feature_names=["a"])]
    )
    stock.embedding_bags["a"].weight.data.copy_(weights)
    model = nn.Sequential(replace_embeddings(stock, DPQConfig(method="vq", num_subspaces=4), from_weights=True))
    values = model[0].quantizer("a").values_MKS.detach().clone()
    DistributedModelParallel(model, device=torch.device("cpu"))
    (shard,) = model[0].query_weights()["a"].local_shards()
    assert torch.equal(shard.tensor, weights)
    assert torch.equal(model[0].quantizer("a").values_MKS, values)
    wrapped = DistributedModelParallel(nn.Linear(2, 2), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="distributed already"):
        replace_embeddings(nn.ModuleDict({"model": wrapped}), DPQConfig())


def test_a_frozen_weight_refuses_what_moves_by_use():
    embedding = nn.Embedding(20, 16).requires_grad_(False)
    with pytest.raises(ConfigError, match="with a frozen weight, which they would move"):
        replace_embeddings(embedding, DPQConfig(method="vq", num_subspaces=4, num_codes=6, ema_decay=0.9))


def from_pretrained(padding_idx, num_rows=ROWS):
    """nn.Embedding with a padding row that is not zeros, as BERT's, replaced; and the weights."""
    torch.manual_seed(0)
    weights = torch.randn(num_rows, DIM)
    stock = nn.Embedding.from_pretrained(weights.clone(), freeze=False, padding_idx=padding_idx)
    return nn.ModuleDict({"words": stock}), weights


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
@pytest.mark.parametrize(
    "config",
    [
        DPQConfig(method="vq", num_subspaces=4, num_codes=6, num_levels=2, commitment_weight=1.0),
        DPQConfig(method="vq", num_subspaces=4, num_codes=6, ema_decay=0.5, revive_after=1),
        DPQConfig(num_subspaces=4, num_codes=6),
        DPQConfig(method="vq", num_subspaces=4, num_codes=6, num_levels=3, tiers=((0.5, 1),), batch_norm=False),
    ],
    ids=["vq", "means", "sx", "tiers"],
)
def test_a_padding_row_that_is_not_zeros_keeps_its_vector_and_trains_nothing(config, padding_idx, tmp_path):
    model, weights = from_pretrained(padding_idx)
    replace_embeddings(model, config, from_weights=True)
    words, row = model["words"], padding_idx % ROWS
    bare = replace_embeddings(from_pretrained(None)[0], config, from_weights=True)["words"]  # is never asked for it
    assert words.padding_idx == row
    assert (words.eval()(torch.tensor([row])) - weights[row]).norm() < 0.9 * weights[row].norm()
    for module, ids in ((words, [row, 5, 7, row, 7]), (bare, [5, 7, 7])):
        out = module.train()(torch.tensor(ids))
        out.square().sum().backward()
    want = dict(bare.named_buffers())
    assert all(torch.equal(tensor, want[name]) for name, tensor in words.named_buffers() if "padding" not in name)
    assert torch.equal(words.only_quantizer.values_MKS, bare.only_quantizer.values_MKS)
    assert not next(words.queries.parameters()).grad[row].any()
    for ours, theirs in zip(words.parameters(), bare.parameters(), strict=True):
        assert not theirs.requires_grad or torch.equal(ours.grad, theirs.grad)
    freeze(model, tmp_path / "artifact")
    served = EmbeddingStore.open(tmp_path / "artifact").lookup("words", np.arange(ROWS))
    assert not len(served.missing)
    assert served.vectors.tobytes() == words.eval()(torch.arange(ROWS)).detach().numpy().tobytes()


def test_a_kept_padding_has_its_vector_in_training_as_in_eval_mode():
    model, _ = from_pretrained(3)
    words = replace_embeddings(model, VQ, from_weights=True)["words"]
    for ids in ([3], [1, 3, 9], [3, 3], [29, 3]):
        out = words.train()(torch.tensor(ids))
        at = ids.index(3)
        assert torch.equal(out[at], words.eval()(torch.tensor([3]))[0])
    assert words.train()(torch.tensor([], dtype=torch.int64)).shape == (0, DIM)
    assert torch.equal(words(torch.tensor([1, 9])), words(torch.tensor([1, 3, 9]))[[0, 2]])


def test_a_table_in_its_warm_up_hands_out_the_padding_row_itself():
    model, weights = from_pretrained(3)
    words = warm_up_of(replace_embeddings(model, VQ, from_weights=True))["words"]
    out = words(torch.tensor([3, 4]))
    assert torch.equal(out, weights[[3, 4]])
    out.sum().backward()
    grad = next(words.queries.parameters()).grad
    assert not grad[3].any()
    assert grad[4].all()


def warm_up_of(model):
    warm_up(model)
    return model


def test_a_state_of_a_kept_padding_loads_where_it_is_kept_and_is_refused_where_it_would_be_zeros():
    words = replace_embeddings(from_pretrained(3)[0], VQ, from_weights=True)["words"]
    zeros = DPQEmbedding(ROWS, DIM, VQ, padding_idx=3, name="words")
    with pytest.raises(RuntimeError, match="padding_is_kept"):
        zeros.load_state_dict(words.state_dict())
    zeros.keep_padding()
    zeros.load_state_dict(words.state_dict())
    assert torch.equal(zeros.eval()(torch.tensor([3])), words.eval()(torch.tensor([3])))
    with pytest.raises(ConfigError, match="keep_padding: got no padding_idx"):
        DPQEmbedding(ROWS, DIM, VQ).keep_padding()


@pytest.mark.parametrize("stock", ["embedding", "bag"])
def test_padding_that_torch_returns_as_zeros_stays_missing(stock, tmp_path):
    """A row of zeros, and a bag's, which leaves it out whatever it holds."""
    model, _ = from_pretrained(3)
    if stock == "bag":
        model["words"] = nn.EmbeddingBag(ROWS, DIM, padding_idx=3, mode="sum")
        model["words"].weight.data.normal_()
    else:
        model["words"].weight.data[3] = 0
    replace_embeddings(model, VQ, from_weights=True)
    assert not model["words"](torch.tensor([[3]])).any()
    freeze(model, tmp_path / "artifact")
    assert EmbeddingStore.open(tmp_path / "artifact").lookup("words", [3, 4]).missing.tolist() == [0]


def test_a_kept_padding_outlives_sharding(one_rank, tmp_path):
    model, weights = from_pretrained(3)
    replace_embeddings(model, VQ, from_weights=True)
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    model["words"](torch.tensor([3, 5])).sum().backward()
    assert torch.equal(model["words"].query_weights()["words"].local_shards()[0].tensor[3], weights[3])
    freeze(wrapped, tmp_path / "artifact")
    want = model["words"].eval()(torch.arange(ROWS)).detach().numpy()
    assert np.array_equal(EmbeddingStore.open(tmp_path / "artifact").lookup("words", np.arange(ROWS)).vectors, want)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e19, 3e38])
@pytest.mark.parametrize("name", ["goods", "ec", "deep.1", "deep.2"])
def test_from_weights_names_the_row_that_is_not_finite_and_leaves_the_model_as_it_was(name, bad):
    model = every_kind()
    modules = {"goods": model["bags"].embedding_bags["goods"], "ec": model["deep"][0].embeddings["ec"]}
    (modules.get(name) or model.get_submodule(name)).weight.data[7, 2] = bad
    before = [id(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=f"table '{name}': got .* in the query of row 7;"):
        replace_embeddings(model, VQ, from_weights=True)
    assert [id(module) for module in model.modules()] == before
