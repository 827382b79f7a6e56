"""Frozen tables held to the module that they came from, bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig

from dpq_rec import (
    ConfigError,
    DPQConfig,
    EmbeddingStore,
    IdentityVocabulary,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    verify,
)
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, DPQEmbeddingBagCollection, DPQEmbeddingCollection, freeze
from tests.dpq_rec.nn.modules import config, keyed, vectors

NUM_ROWS = 70_000  # more than one chunk


def tables():
    return [
        EmbeddingBagConfig(name="user_id", num_embeddings=NUM_ROWS, embedding_dim=8, feature_names=["user_id"]),
        EmbeddingBagConfig(name="item_id", num_embeddings=50, embedding_dim=16, feature_names=["item_id", "clicked"]),
    ]


def one_id_bags(num_ids):
    ids = torch.arange(num_ids)
    features = ["user_id", "item_id", "clicked"]
    values = torch.cat([ids, ids % 50, ids % 50])
    return KeyedJaggedTensor(keys=features, values=values, lengths=torch.ones(3 * num_ids, dtype=torch.long))


@pytest.fixture(params=[("sx", True), ("vq", True), ("vq", False)], ids=str)
def trained(request):
    """A model after some steps on a tenth of its rows."""
    method, batch_norm = request.param
    torch.manual_seed(0)
    config = DPQConfig(method=method, num_subspaces=4, num_codes=11, batch_norm=batch_norm)
    ebc = DPQEmbeddingBagCollection(tables(), config)
    optimizer = torch.optim.Adam(ebc.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ebc(one_id_bags(NUM_ROWS // 10)).values().square().sum().backward()
        optimizer.step()
    return ebc


def test_artifact_holds_what_eval_mode_returns_bit_for_bit(trained, tmp_path):
    freeze(trained, tmp_path / "artifact")
    pooled = trained.eval()(one_id_bags(NUM_ROWS))
    store = EmbeddingStore.open(tmp_path / "artifact")
    for name, num_rows in (("user_id", NUM_ROWS), ("item_id", 50)):
        vectors, missing = store.lookup(name, np.arange(num_rows))
        assert vectors.tobytes() == pooled[name][:num_rows].detach().numpy().tobytes()
        assert not len(missing)


def test_freeze_encodes_in_eval_mode_and_leaves_the_mode_as_it_was(trained, tmp_path):
    freeze(trained.train(), tmp_path / "training")
    assert trained.training
    freeze(trained.eval(), tmp_path / "eval")
    for name in ("user_id", "item_id"):
        stored = [
            EmbeddingStore.open(tmp_path / mode).tables[name].tensors["packed_codes"] for mode in ("training", "eval")
        ]
        assert np.array_equal(*stored)


def test_artifact_holds_zero_where_pooling_makes_zero_of_minus_zero(tmp_path):
    ebc = DPQEmbeddingBagCollection(tables(), DPQConfig(num_subspaces=4, num_codes=11))
    ebc.quantizer("item_id").values_MKS.data.fill_(-0.0)
    freeze(ebc, tmp_path / "artifact")
    pooled = ebc.eval()(one_id_bags(50))["item_id"][:50]
    vectors = EmbeddingStore.open(tmp_path / "artifact").lookup("item_id", np.arange(50)).vectors
    assert vectors.tobytes() == pooled.detach().numpy().tobytes()


def test_freeze_writes_an_artifact_that_verifies(trained, tmp_path):
    freeze(trained, tmp_path / "artifact", version="seven")
    artifact = verify(tmp_path / "artifact")
    assert artifact.version == "seven"
    assert artifact.tables["item_id"].manifest.features == ("item_id", "clicked")


def test_freeze_stores_vocabularies(trained, tmp_path):
    vocabulary = Int64Vocabulary.from_ids(np.arange(50) * 1000)
    freeze(trained, tmp_path / "artifact", vocabularies={"item_id": vocabulary})
    store = EmbeddingStore.open(tmp_path / "artifact")
    pooled = trained.eval()(one_id_bags(50))
    vectors, missing = store.lookup("item_id", [7000, 7, 49_000])
    assert missing.tolist() == [1]
    assert np.array_equal(vectors[[0, 2]], pooled["item_id"][[7, 49]].detach().numpy())


def test_freeze_stores_plain_tables_as_they_are(tmp_path):
    ebc = EmbeddingBagCollection(tables=tables())
    freeze(ebc, tmp_path / "artifact")
    store = EmbeddingStore.open(tmp_path / "artifact")
    assert store.tables["user_id"].manifest.kind == "dense"
    want = ebc.embedding_bags["user_id"].weight.detach().numpy()
    assert np.array_equal(store.lookup("user_id", np.arange(NUM_ROWS)).vectors, want)


def test_freeze_reports_rows_as_it_writes_them(trained, tmp_path):
    written = []
    freeze(trained, tmp_path / "artifact", progress=written.append)
    assert sum(written) == NUM_ROWS + 50
    assert max(written) < NUM_ROWS  # in chunks


def test_freeze_serves_zeros_and_missing_for_padding(tmp_path):
    torch.manual_seed(0)
    embedding = DPQEmbedding(20, 8, config(), padding_idx=-3, name="word")
    freeze(embedding, tmp_path / "artifact")
    ids = torch.arange(-1, 21)
    vectors_, missing = EmbeddingStore.open(tmp_path / "artifact").lookup("word", ids.numpy())
    assert missing.tolist() == [0, 18, 21]  # -1, the padding 17, 20
    assert not vectors_[[0, 18, 21]].any()
    assert vectors_[1:21].tobytes() == embedding.eval()(ids[1:21]).detach().numpy().tobytes()
    assert verify(tmp_path / "artifact").tables["word"].manifest.vocabulary["kind"] == "int64"


@pytest.mark.parametrize("padding_idx", [None, 5])
def test_freeze_stores_vocabularies_of_strings(padding_idx, tmp_path):
    torch.manual_seed(0)
    embedding = DPQEmbedding(6, 8, config(), padding_idx=padding_idx, name="word")
    words, rows = ["the", "", "ü", "-ing", "7"], [0, 1, 2, 3, 4]
    vocabulary = StringVocabulary.from_pairs(words, rows)
    freeze(embedding, tmp_path / "artifact", vocabularies={"word": vocabulary})
    store = EmbeddingStore.open(tmp_path / "artifact")
    stored = store.lookup("word", ["7", "<pad>", "the", "ü"])
    assert stored.missing.tolist() == [1]
    assert torch.equal(torch.from_numpy(stored.vectors[[0, 2, 3]]), embedding.eval()(torch.tensor([4, 0, 2])))
    assert verify(tmp_path / "artifact").tables["word"].manifest.vocabulary["kind"] == "string"


@pytest.mark.parametrize(
    ("vocabulary", "named"),
    [
        (IdentityVocabulary(6), "id 2 lives"),
        (ModuloVocabulary(6), "id 2 lives"),
        (Int64Vocabulary.from_pairs([70, 80], [1, 2]), "id 80 lives"),
        (StringVocabulary.from_ids(["a", "b", "<pad>", "c", "d", "e"]), "id <pad> lives"),
    ],
    ids=lambda v: getattr(v, "kind", ""),
)
def test_freeze_rejects_a_vocabulary_that_names_the_padding_row(vocabulary, named, tmp_path):
    embedding = DPQEmbedding(6, 8, config(), padding_idx=2, name="word")
    with pytest.raises(ConfigError, match=f"table 'word' in which {named} in row 2, the padding row"):
        freeze(embedding, tmp_path / "artifact", vocabularies={"word": vocabulary})
    assert not list(tmp_path.iterdir())


class Translator(nn.Module):
    """Tables of every kind, one of them used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Module()
        self.encoder.words = DPQEmbedding(6, 8, config())
        self.decoder = nn.Module()
        self.decoder.words = self.encoder.words
        self.bag = DPQEmbeddingBag(6, 8, config(), name="named.by.hand")
        self.decoder.position = nn.Embedding(9, 4, padding_idx=0)
        self.topics = nn.EmbeddingBag(3, 4)
        self.ids = DPQEmbeddingCollection(
            [
                EmbeddingConfig(name="user", num_embeddings=5, embedding_dim=8, feature_names=["u", "v"]),
                EmbeddingConfig(name="plain", num_embeddings=5, embedding_dim=4, feature_names=["u"]),
            ],
            {"user": config(), "plain": None},
        )
        half = EmbeddingConfig(
            name="fp16", num_embeddings=5, embedding_dim=4, feature_names=["h"], data_type=DataType.FP16
        )
        self.stock = nn.ModuleList([EmbeddingCollection([half])])


def test_tables_are_named_by_config_by_hand_or_by_path(tmp_path):
    freeze(Translator(), tmp_path / "artifact")
    tables = EmbeddingStore.open(tmp_path / "artifact").tables
    assert list(tables) == ["encoder.words", "named.by.hand", "user", "plain", "fp16"]
    assert [t.manifest.kind for t in tables.values()] == ["dpq", "dpq", "dpq", "dense", "dense"]
    assert tables["user"].manifest.features == ("u", "v")
    verify(tmp_path / "artifact")


def test_freeze_stores_the_tables_that_are_named(tmp_path):
    model = Translator()
    freeze(model, tmp_path / "artifact", tables=["topics", "user", "decoder.position"])
    store = EmbeddingStore.open(tmp_path / "artifact")
    assert set(store.tables) == {"user", "decoder.position", "topics"}
    for name, module, ids in (
        ("decoder.position", model.decoder.position, torch.arange(9)),
        ("topics", model.topics, torch.arange(3)[:, None]),
    ):
        stored = store.lookup(name, np.arange(len(ids)))
        assert not len(stored.missing)
        assert stored.vectors.tobytes() == module(ids).detach().numpy().tobytes()


def test_freeze_stores_plain_tables_of_a_collection_bit_for_bit(tmp_path):
    model = Translator()
    freeze(model, tmp_path / "artifact", tables=("plain", "fp16"))
    store, ids = EmbeddingStore.open(tmp_path / "artifact"), [[i] for i in range(5)]
    out = vectors(model.ids, keyed({"u": ids, "v": ids}))
    assert store.lookup("plain", np.arange(5)).vectors.tobytes() == out["u@plain"].detach().numpy().tobytes()
    half = model.stock[0](keyed({"h": ids}))["h"].values()
    assert store.lookup("fp16", np.arange(5)).vectors.tobytes() == half.detach().numpy().tobytes()


@pytest.mark.parametrize(
    ("make", "bags"),
    [
        (lambda: nn.Embedding(3, 4), False),
        (lambda: nn.EmbeddingBag(3, 4, mode="sum"), True),
        (lambda: nn.EmbeddingBag(3, 4, mode="mean"), True),
        (lambda: nn.EmbeddingBag(3, 4, mode="max"), True),
        (lambda: DPQEmbedding(3, 4, config()), False),
        (lambda: DPQEmbeddingBag(3, 4, config(), mode="sum"), True),
        (lambda: DPQEmbeddingBag(3, 4, config(), mode="max"), True),
    ],
    ids=["embedding", "sum", "mean", "max", "dpq", "dpq sum", "dpq max"],
)
def test_artifact_holds_minus_zero_where_the_model_returns_it(make, bags, tmp_path):
    module, ids = make(), torch.arange(3)
    for parameter in module.parameters():
        parameter.data.fill_(-0.0)
    freeze(module.eval(), tmp_path / "artifact", tables=["table"])
    want = module(ids[:, None] if bags else ids)
    assert EmbeddingStore.open(tmp_path / "artifact").lookup("table", [0, 1, 2]).vectors.tobytes() == (
        want.detach().numpy().tobytes()
    )


def test_freeze_rejects_two_tables_of_a_name_wherever_they_stand(tmp_path):
    model = Translator()
    model.other = DPQEmbedding(6, 8, config(), name="decoder.position")
    with pytest.raises(
        ConfigError, match=r"two tables of the model are named decoder\.position; give each a name of its own"
    ):
        freeze(model, tmp_path / "artifact", tables=["encoder.words"])


def test_freeze_rejects_tables_that_are_not_there(tmp_path):
    message = "tables: got bagg, words; the model's tables: encoder.words, named.by.hand, .*, decoder.position, topics"
    with pytest.raises(ConfigError, match=message):
        freeze(Translator(), tmp_path / "artifact", tables=["words", "user", "bagg"])


def test_freeze_rejects_a_vocabulary_of_a_table_that_is_not_frozen(tmp_path):
    with pytest.raises(ConfigError, match=r"vocabularies: got decoder\.position; the model's tables: user"):
        freeze(Translator(), tmp_path / "a", tables=["user"], vocabularies={"decoder.position": IdentityVocabulary(9)})


def test_freeze_rejects_a_vocabulary_of_another_size_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="table 'user': the identity vocabulary is one of 4 rows, the table has 5"):
        freeze(Translator(), tmp_path / "a", tables=["user"], vocabularies={"user": IdentityVocabulary(4)})
    assert not list(tmp_path.iterdir())


def test_freeze_names_the_plain_tables_that_could_be_named(tmp_path):
    with pytest.raises(ConfigError, match="plain tables that can be named: 0, 2"):
        freeze(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.Embedding(3, 4)), tmp_path / "artifact")


@pytest.mark.parametrize(
    ("model", "vocabularies", "message"),
    [
        (nn.Linear(2, 2), {}, "holds no DPQ module"),
        (EmbeddingBagCollection(tables=tables()), {"usr": None}, "got usr; the model's tables: user_id, item_id"),
        (
            nn.ModuleList([EmbeddingBagCollection(tables=tables()), EmbeddingBagCollection(tables=tables())]),
            {},
            "two tables of the model are named user_id",
        ),
    ],
)
def test_freeze_rejects(model, vocabularies, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        freeze(model, tmp_path / "artifact", vocabularies=vocabularies)


def test_freeze_leaves_an_existing_folder_alone(trained, tmp_path):
    (tmp_path / "artifact").mkdir()
    with pytest.raises(FileExistsError):
        freeze(trained, tmp_path / "artifact")


def test_freeze_refuses_values_that_are_no_numbers_in_their_dtype(tmp_path):
    module = DPQEmbedding(10, 8, DPQConfig(num_subspaces=4, values_dtype="float16"))
    module.only_quantizer.values_MKS.data[0, 0] = 1e5  # more than half precision holds
    with pytest.raises(ConfigError, match="no finite numbers in float16; did the training diverge"):
        freeze(module, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_an_error_of_the_callers_progress_leaves_nothing_behind(tmp_path):
    def progress(num_rows):
        raise ValueError("a bar that broke")

    with pytest.raises(ValueError, match="a bar that broke"):
        freeze(DPQEmbedding(10, 8, DPQConfig(num_subspaces=4)), tmp_path / "artifact", progress=progress)
    assert not list(tmp_path.iterdir())


def test_a_plain_bag_s_padding_has_no_vector(tmp_path):
    bag = nn.EmbeddingBag(6, 4, padding_idx=2, mode="sum")
    nn.init.ones_(bag.weight)
    freeze(nn.ModuleDict({"bag": bag}), tmp_path / "artifact", tables=["bag"])
    vectors, missing = EmbeddingStore.open(tmp_path / "artifact").lookup("bag", [1, 2])
    assert missing.tolist() == [1]
    assert np.array_equal(vectors, bag(torch.tensor([[1], [2]])).detach().numpy())
