"""What all modules share: the meta device, state_dict, batches that leave tables out."""

import io

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import IdTypeError
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag, DPQEmbeddingBagCollection, DPQEmbeddingCollection
from tests.dpq_rec.nn.modules import KINDS, STRAIGHT, batch, build, config, keyed, queries, train, two_tables, vectors
from tests.dpq_rec.nn.options import OPTIONS

META, CPU = torch.device("meta"), torch.device("cpu")
# All that a state holds: statistics of levels, running means, counters of revival, keys apart from values.
STATES = {
    "sx": {"method": "sx", "revive_after": 2},
    "sx, wider keys": {"method": "sx", "key_dim": 5, "metric": "cosine"},
    "vq, means, levels": {"method": "vq", "ema_decay": 0.9, "num_levels": 2, "revive_after": 2},
    "vq, shared, half": {"method": "vq", "share_subspaces": True, "values_dtype": "float16", "value_gradient": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)
states = pytest.mark.parametrize("options", STATES.values(), ids=STATES.keys())


def saved(module):
    """Its state by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(module, other):
    ours, others = module.state_dict(), other.state_dict()
    assert list(ours) == list(others)
    for name in ours:
        assert torch.equal(ours[name], others[name]), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@kinds
def test_every_parameter_gets_a_gradient_from_an_empty_batch(kind, options):
    """DistributedDataParallel's static graph waits for each of them; and nothing learns from nothing."""
    torch.manual_seed(0)
    module = build(kind, config(**options))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sum(v.sum() for v in vectors(module, batch(kind, [])).values()).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_table_without_ids_gets_gradients_beside_one_with_ids(options):
    torch.manual_seed(0)
    module = DPQEmbeddingBagCollection(two_tables(EmbeddingBagConfig, 20), config(**options))
    features = keyed({"item": [[], []], "old": [[], []], "user": [[1], [2, 2]]})
    module(features).values().square().sum().backward()
    for table, learns in (("item", False), ("user", True)):
        parameters = [queries(module, table), *module.quantizer(table).parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters if p.requires_grad)
        assert queries(module, table).grad.any() == learns


def test_the_last_codebook_loss_of_every_table_is_there_to_be_logged():
    torch.manual_seed(0)
    module = build(DPQEmbeddingCollection, config(method="vq"))
    module(batch(DPQEmbeddingCollection))
    for table in ("item", "user"):
        want = module.quantizer(table)(queries(module, table), torch.ones(20)).codebook_loss
        torch.testing.assert_close(module.codebook_losses[table], want.detach())
        assert not module.codebook_losses[table].requires_grad


@kinds
def test_a_module_on_meta_takes_no_memory(kind):
    module = build(kind, config(method="vq", ema_decay=0.9, revive_after=3), num_embeddings=10**12, device=META)
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@states
@kinds
def test_a_module_from_meta_starts_as_any_other(kind, options):
    """Whatever `to_empty` finds in memory, here the worst: no number of it may be left."""
    quantized = config(num_codes=100, **options)
    torch.manual_seed(0)
    fresh = build(kind, quantized, num_embeddings=1000)
    module = build(kind, quantized, num_embeddings=1000, device=META).to_empty(device=CPU)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    module.reset_parameters()
    for (name, ours), theirs in zip(module.named_parameters(), fresh.parameters(), strict=True):
        bound = theirs.abs().max()
        assert 0.99 * bound < ours.abs().max() < 1.01 * bound, name
        torch.testing.assert_close(ours.mean(), torch.zeros(()), rtol=0, atol=(0.1 * bound).item(), msg=name)
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.1, atol=0, msg=name)
        assert ours.unique().numel() > 0.9 * ours.numel(), name
        assert ours.requires_grad == theirs.requires_grad, name
    for (name, ours), theirs in zip(module.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_statistics_of_a_module_from_meta_are_those_of_scores_as_they_are():
    quantized = config(method="vq", num_levels=2, ema_decay=0.5, revive_after=3)
    module = build(DPQEmbedding, quantized, device=META).to_empty(device=CPU)
    module.reset_parameters()
    quantizer = module.only_quantizer
    for norm in quantizer.score_norms:
        assert norm.var_K.tolist() == [1.0] * 5
        assert norm.mean_K.tolist() == [0.0] * 5
    upkeep = [*quantizer.running_means.buffers(), *quantizer.revival.buffers()]
    assert len(upkeep) == 4
    assert not any(tensor.any() for tensor in upkeep)


@kinds
def test_a_module_from_meta_trains(kind):
    torch.manual_seed(0)
    module = build(kind, config(**STRAIGHT), device=META).to_empty(device=CPU)
    module.reset_parameters()
    losses = train(module, batch(kind), steps=20, lr=1.0)
    assert losses[-1] < 0.5 * losses[0]


def test_reset_keeps_an_init_of_the_users_own():
    tables = two_tables(EmbeddingBagConfig, 20, init_fn=nn.init.ones_)
    configs = {"item": config(), "user": None}
    module = DPQEmbeddingBagCollection(tables, configs, device=META).to_empty(device=CPU)
    module.reset_parameters()
    assert (module.plain["bags"].embedding_bags["user"].weight == 1).all()
    assert queries(module, "item").abs().max() < 8**-0.5


def test_reset_starts_sharded_tables_anew(one_rank):
    model = nn.Sequential(build(DPQEmbeddingBag, config(), device=META))
    DistributedModelParallel(model, device=CPU, sharders=[EmbeddingCollectionSharder()])
    (shard,) = next(iter(model[0].query_weights().values())).local_shards()
    shard.tensor.fill_(9)
    model[0].quantizers["table"].values_MKS.data.fill_(9)
    model[0].reset_parameters()
    assert 0 < shard.tensor.abs().max() < 9
    assert 0 < model[0].quantizers["table"].values_MKS.abs().max() < 9


@states
@kinds
@pytest.mark.parametrize("to", ["fresh", "from meta", "assigned to meta"])
def test_a_state_brings_outputs_back_and_training_goes_on_as_if_not_interrupted(kind, options, to):
    torch.manual_seed(0)
    module = build(kind, config(**options))
    train(module, batch(kind))
    torch.manual_seed(1)
    other = build(kind, config(**options), device=None if to == "fresh" else META)
    if to == "from meta":
        other.to_empty(device=CPU)
    assert list(other.state_dict()) == list(module.state_dict())
    other.load_state_dict(saved(module), assign=to == "assigned to meta")
    assert_same_state(other, module)
    before, after = (vectors(m.eval(), batch(kind)) for m in (module, other))
    assert all(torch.equal(before[name], after[name]) for name in before)
    some = batch(kind, [1, 2, 2, 7])
    assert train(module, some, steps=4) == train(other, some, steps=4)
    assert_same_state(other, module)


def test_states_of_these_tests_hold_everything_that_moves():
    """Or the test above would compare nothing: upkeep and statistics are not what they were at the start."""
    torch.manual_seed(0)
    module = build(DPQEmbedding, config(**STATES["vq, means, levels"]))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    train(module, batch(DPQEmbedding))
    moved = {
        name.split(".")[-1] for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {
        "values_MKS",
        "mean_K",
        "var_K",
        "num_batches",
        "counts_MK",
        "sums_MKS",
        "idle_MK",
        "num_draws",
        "weight",
    }


def test_codebook_loss_is_scaled_as_the_loss_is():
    """What a GradScaler, or accumulation, does to the loss, the codebook loss must follow to keep its weight."""
    gradients = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        module = DPQEmbedding(20, 12, config(method="vq"))
        module.codebook_loss_scale = scale
        (module(torch.arange(20)).square().mean() * scale).backward()
        gradients.append(module.only_quantizer.values_MKS.grad / scale)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_autocast_changes_no_code():
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        module = DPQEmbedding(20, 12, config())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(module(torch.arange(20)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("ids", [torch.tensor([1.7]), torch.tensor([True])])
def test_modules_reject_ids_that_are_no_integers(ids):
    with pytest.raises(IdTypeError, match=r"want torch.int64 or torch.int32"):
        DPQEmbedding(20, 12, config())(ids)
