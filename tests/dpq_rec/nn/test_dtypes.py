"""Models in other precisions: queries in bfloat16 train and freeze to the same bits, the rest is refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from dpq_rec import ConfigError, EmbeddingStore
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBagCollection, Quantizer, freeze, start, warm_up
from tests.dpq_rec.nn.modules import KINDS, NUM_IDS, batch, build, config, queries, train, vectors

METHODS = {
    "sx": {"method": "sx"},
    "sx, cosine, levels": {"method": "sx", "metric": "cosine", "num_levels": 3},
    "vq, levels": {"method": "vq", "num_levels": 3, "commitment_weight": 0.25},
    "vq, means, half values": {"method": "vq", "ema_decay": 0.9, "revive_after": 2, "values_dtype": "float16"},
}
TO_BFLOAT16 = {
    "model": lambda module: module.bfloat16(),
    "to": lambda module: module.to(dtype=torch.bfloat16),
    "queries alone": lambda module: module.queries.bfloat16(),
}
pytestmark = pytest.mark.filterwarnings("ignore:moved to torch")
kinds = pytest.mark.parametrize("kind", KINDS)
methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
others = pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def made(kind, **options):
    torch.manual_seed(0)
    return build(kind, config(**options))


def assert_frozen_bits(module, kind, folder):
    """Of the rows, in every table's first feature; a padding row is served as zeros."""
    name = "words" if len(module.quantizers) == 1 else "item"
    freeze(nn.ModuleDict({"words": module}), folder / "artifact")
    got = EmbeddingStore.open(folder / "artifact").lookup(name, np.arange(NUM_IDS)).vectors
    want = vectors(module.eval(), batch(kind))["table" if name == "words" else "item"].detach()
    assert want.dtype == torch.float32
    assert got.tobytes() == want.numpy().tobytes()


@kinds
@methods
@pytest.mark.parametrize("convert", TO_BFLOAT16.values(), ids=TO_BFLOAT16.keys())
def test_queries_in_bfloat16_train_and_freeze_to_the_bits_of_eval_mode(kind, options, convert, tmp_path):
    module = made(kind, **options)
    convert(module)
    losses = train(module, batch(kind), steps=5, lr=0.2)
    assert losses[-1] < losses[0]
    assert all(weight.dtype == torch.bfloat16 for weight in module.queries.parameters())
    assert_frozen_bits(module, kind, tmp_path)


def test_keys_values_and_statistics_keep_their_bits_when_a_model_is_moved_to_bfloat16():
    module = made(DPQEmbedding, method="vq", ema_decay=0.9)
    module(batch(DPQEmbedding))
    before = {name: tensor.clone() for name, tensor in module.quantizers.state_dict().items()}
    nn.Sequential(module).bfloat16()
    for name, tensor in module.quantizers.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype, name


def test_a_model_moved_to_another_dtype_says_that_vectors_stay_in_fp32(recwarn):
    """The next layer, in bfloat16, would say no more than that two types differ."""
    model = nn.Sequential(made(DPQEmbedding), nn.Linear(12, 2))
    model.float().to("cpu")
    assert not len(recwarn)
    with pytest.warns(UserWarning, match=r"moved to torch\.bfloat16: .* vectors of DPQ tables stay in torch\.float32"):
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(batch(DPQEmbedding)).dtype == torch.bfloat16


@methods
def test_bfloat16_has_the_vectors_and_gradients_of_fp32_at_the_rounded_queries(options):
    module, whole = made(DPQEmbedding, **options), made(DPQEmbedding, **options)
    module.bfloat16()
    queries(whole).data.copy_(queries(module).data)
    got, want = module(batch(DPQEmbedding)), whole(batch(DPQEmbedding))
    assert torch.equal(got, want)
    got.sin().sum().backward(), want.sin().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad.to(ours.dtype), msg=name)


@kinds
@methods
def test_autocast_leaves_codes_vectors_and_frozen_bits_as_they_are(kind, options, tmp_path):
    module, other = made(kind, **options), made(kind, **options)
    for each, enabled in ((module, True), (other, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = vectors(each, batch(kind)).values()
        sum(v.sin().sum() for v in outputs).backward()
    for (name, ours), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
        assert not theirs.requires_grad or torch.equal(ours.grad, theirs.grad), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_frozen_bits(module, kind, tmp_path)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_default_dtype_changes_nothing(kind, dtype, default_dtype, tmp_path):
    options = {"method": "vq", "num_levels": 3, "ema_decay": 0.9, "revive_after": 2}
    other = made(kind, **options)
    start(nn.Sequential(other), seed=1)
    train(other, batch(kind))
    default_dtype(dtype)
    torch.manual_seed(0)
    module = build(kind, config(**options))
    module.load_state_dict(made(kind, **options).state_dict())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in module.state_dict().values())
    start(nn.Sequential(module), seed=1)
    train(module, batch(kind))
    assert_frozen_bits(module, kind, tmp_path)


@kinds
@others
@pytest.mark.parametrize("is_training", [True, False])
def test_other_dtypes_are_refused_by_the_first_forward(kind, dtype, is_training):
    module = made(kind).to(dtype).train(is_training)
    message = rf"got queries of {dtype}, want torch.float32 or torch.bfloat16: call \.float\(\) on the model"
    with pytest.raises(ConfigError, match=message):
        module(batch(kind))
    module.float()(batch(kind))


@others
@pytest.mark.parametrize("use", [freeze, start], ids=["freeze", "start"])
def test_other_dtypes_are_refused_by_freeze_and_start(dtype, use, tmp_path):
    model = nn.ModuleDict({"words": made(DPQEmbedding).to(dtype)})
    arguments = (tmp_path / "artifact",) if use is freeze else ()
    with pytest.raises(ConfigError, match=f"table 'words': got queries of {dtype}, want torch.float32 or"):
        use(model, *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_tables_in_their_warm_up_are_refused_too(dtype):
    module = made(DPQEmbedding, method="vq").to(dtype)
    warm_up(nn.Sequential(module))
    with pytest.raises(ConfigError, match=f"got queries of {dtype}"):
        module(batch(DPQEmbedding))


def test_values_that_were_given_another_dtype_are_refused_with_what_mends_them():
    module = made(DPQEmbedding)
    state = {name: t.bfloat16() if "quantizers" in name else t for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    with pytest.raises(ConfigError, match=r"table 'table': got keys and values of torch\.bfloat16, want torch.float32"):
        module(batch(DPQEmbedding))
    module.float()(batch(DPQEmbedding))


def test_a_quantizer_by_itself_refuses_half_precision_of_its_own():
    quantizer = Quantizer(8, config()).half()
    with pytest.raises(ConfigError, match=r"quantizer: got keys and values of torch.float16, want torch.float32"):
        quantizer(torch.randn(3, 8).half())


def test_freeze_refuses_a_plain_table_that_fp32_does_not_hold(tmp_path):
    model = nn.ModuleDict({"words": nn.Embedding(5, 4).double()})
    with pytest.raises(ConfigError, match=r"table 'words': got vectors of torch.float64, want torch.float32 or"):
        freeze(model, tmp_path / "artifact", tables=["words"])
    for dtype in (torch.float16, torch.bfloat16):
        freeze(model.to(dtype), tmp_path / str(dtype), tables=["words"])
        got = EmbeddingStore.open(tmp_path / str(dtype)).lookup("words", [0, 4]).vectors
        assert np.array_equal(got, model["words"].weight[[0, 4]].detach().float().numpy())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sharded_model_in_bfloat16_trains_and_freezes_to_the_bits_of_eval_mode(when, one_rank, tmp_path):
    model = nn.Sequential(made(DPQEmbeddingBagCollection, method="vq", num_levels=3))
    if when == "before":
        model.bfloat16()
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    if when == "after":
        wrapped.bfloat16()
    features = batch(DPQEmbeddingBagCollection)
    wrapped(features).values().sum().backward()
    freeze(wrapped, tmp_path / "artifact")
    want = wrapped.eval()(features)["item"].detach()
    got = EmbeddingStore.open(tmp_path / "artifact").lookup("item", np.arange(NUM_IDS)).vectors
    assert got.tobytes() == want.numpy().tobytes()
