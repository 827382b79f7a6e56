"""The drop-ins for torch's modules held to them, over a dense table of the decoded vectors."""

import pytest
import torch
from torch import nn

from dpq_rec import ConfigError
from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBag
from tests.dpq_rec.nn.modules import STRAIGHT, config, decoded, queries

V, E = 20, 8
OPTIONS = {
    "sx": {"method": "sx"},
    "vq": {"method": "vq"},
    "wider queries": {"method": "sx", "key_dim": 3},
    "narrower queries": {"method": "sx", "key_dim": 1},
    "levels": {"method": "vq", "num_levels": 3},
    "shared, half": {"method": "sx", "share_subspaces": True, "values_dtype": "float16"},
    "cosine": {"method": "sx", "metric": "cosine"},
}
IDS = {
    "none": torch.tensor([], dtype=torch.int64),
    "0-d": torch.tensor(3),
    "1-d, repeated": torch.tensor([5, 19, 5, 0, 5]),
    "3-d": torch.tensor([[[1, 2, 2], [0, 19, 7]], [[3, 3, 3], [4, 0, 1]]]),
    "int32": torch.tensor([[5, 19], [0, 5]], dtype=torch.int32),
    "nothing but 0": torch.tensor([0, 0]),
    "2-d of no ids": torch.zeros((3, 0), dtype=torch.int64),
}
OFFSETS = torch.tensor([0, 0, 3, 4, 4, 6])  # empty bags first, in between and last
BAGS = {
    "offsets": ({}, (torch.tensor([5, 19, 5, 0, 2, 5]), OFFSETS)),
    "int32": ({}, (torch.tensor([5, 19, 5, 0, 2, 5], dtype=torch.int32), OFFSETS.int())),
    "last offset": ({"include_last_offset": True}, (torch.tensor([5, 19, 5, 0, 2, 5]), OFFSETS)),
    "2-d": ({}, (torch.tensor([[5, 19, 5], [2, 0, 1], [2, 2, 2]]), None)),
    "bags of no ids": ({}, (torch.tensor([], dtype=torch.int64), torch.tensor([0, 0]))),
}


def pair(ours, stock, options=STRAIGHT, **more):
    """Our module after a batch, and torch's over the table that ours stands for."""
    torch.manual_seed(0)
    module = ours(V, E, config(**options), **more)
    if ours is DPQEmbedding:
        module(torch.arange(V))  # moves the running statistics
    dense = stock(V, E, **more)
    dense.weight.data = decoded(module)
    return module, dense


def assert_same_gradients(module, dense, got, want):
    """Of a loss that weighs every number differently; and every parameter has one, as static graphs want it."""
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(queries(module).grad, dense.weight.grad)
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_embedding_returns_what_torch_does(ids, options):
    module, dense = pair(DPQEmbedding, nn.Embedding, options)
    got, want = module.eval()(ids), dense(ids)
    assert got.shape == want.shape
    assert torch.equal(got, want)


@pytest.mark.parametrize("padding_idx", [None, 0, -1, 3])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_embedding_gives_queries_the_gradients_of_torchs_table(ids, padding_idx):
    module, dense = pair(DPQEmbedding, nn.Embedding, padding_idx=padding_idx)
    got, want = module(ids), dense(ids)
    assert torch.equal(got, want)
    assert_same_gradients(module, dense, got, want)


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_padding_is_zeros_and_trains_nothing(padding_idx):
    """Neither its query nor, by codebook loss and statistics, keys and values."""
    torch.manual_seed(0)
    module = DPQEmbedding(V, E, config(method="vq"), padding_idx=padding_idx)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    out = module(torch.full((2, 3), padding_idx % V))
    assert torch.equal(out, torch.zeros(2, 3, E))
    out.sum().backward()
    assert all((p.grad == 0).all() for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_padding_leaves_no_trace_in_statistics_and_codebook_loss():
    torch.manual_seed(0)
    module = DPQEmbedding(V, E, config(method="vq"), padding_idx=0)
    bare = DPQEmbedding(V, E, config(method="vq"))
    bare.load_state_dict(module.state_dict())
    module(torch.tensor([0, 5, 0, 7, 7])), bare(torch.tensor([5, 7, 7]))
    assert torch.equal(module.codebook_losses["table"], bare.codebook_losses["table"])
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), bare.buffers(), strict=True))


@pytest.mark.parametrize("unused", [False, True])
def test_codebook_losses_of_all_calls_of_a_forward_count(unused):
    """Encoder and decoder ask the same table; a call whose vectors take no part in the loss has no codebook loss."""
    module, _ = pair(DPQEmbedding, nn.Embedding)
    encoder_ids, decoder_ids = torch.tensor([1, 2, 2]), torch.tensor([2, 9])
    encoded, decoded_ = module(encoder_ids), module(decoder_ids)
    (encoded * 0 + (0 if unused else decoded_.sum() * 0)).sum().backward()
    rows = queries(module).detach()
    codebook_loss = module.only_quantizer(rows[[1, 2]], torch.tensor([1.0, 2.0])).codebook_loss
    if not unused:
        codebook_loss = codebook_loss + module.only_quantizer(rows[[2, 9]], torch.tensor([1.0, 1.0])).codebook_loss
    (want,) = torch.autograd.grad(codebook_loss, [module.only_quantizer.values_MKS])
    torch.testing.assert_close(module.only_quantizer.values_MKS.grad, want)


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize(("ids", "got"), [([3, 20], "from 3 to 20"), ([-1, 4], "from -1 to 4")])
def test_embedding_rejects_ids_outside_the_table(ids, got, padding_idx):
    module, _ = pair(DPQEmbedding, nn.Embedding, padding_idx=padding_idx)
    with pytest.raises(IndexError, match=f"table 'table': got ids {got}, want 0 to 19"):
        module(torch.tensor(ids))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize(("more", "arguments"), BAGS.values(), ids=BAGS.keys())
def test_bag_returns_what_torch_does_and_has_its_gradients(more, arguments, padding_idx, mode):
    module, dense = pair(DPQEmbeddingBag, nn.EmbeddingBag, mode=mode, padding_idx=padding_idx, **more)
    got, want = module(*arguments), dense(*arguments)
    torch.testing.assert_close(got, want)
    assert_same_gradients(module, dense, got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bag_in_eval_mode_returns_what_torch_does(options):
    module, dense = pair(DPQEmbeddingBag, nn.EmbeddingBag, options, mode="sum")
    module(torch.arange(V)[:, None])  # moves the running statistics
    dense.weight.data = decoded(module.eval())
    torch.testing.assert_close(module(*BAGS["offsets"][1]), dense(*BAGS["offsets"][1]))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("form", ["offsets", "2-d"])
def test_bag_weights_samples_as_torch_does(form, padding_idx):
    module, dense = pair(DPQEmbeddingBag, nn.EmbeddingBag, mode="sum", padding_idx=padding_idx)
    ids, offsets = BAGS[form][1]
    ours, torchs = (torch.linspace(-1, 2, ids.numel()).view(ids.shape).requires_grad_() for _ in range(2))
    got, want = module(ids, offsets, per_sample_weights=ours), dense(ids, offsets, per_sample_weights=torchs)
    torch.testing.assert_close(got, want)
    assert_same_gradients(module, dense, got, want)
    torch.testing.assert_close(ours.grad, torchs.grad)


def test_bag_rejects_ids_outside_the_table():
    module, _ = pair(DPQEmbeddingBag, nn.EmbeddingBag)
    with pytest.raises(IndexError, match="table 'table': got ids from 3 to 20, want 0 to 19"):
        module(torch.tensor([[3, 20]]))


@pytest.mark.parametrize(
    ("ours", "stock", "more"),
    [
        (DPQEmbedding, nn.Embedding, {}),
        (DPQEmbedding, nn.Embedding, {"padding_idx": -1}),
        (DPQEmbeddingBag, nn.EmbeddingBag, {"mode": "max"}),
        (DPQEmbeddingBag, nn.EmbeddingBag, {"padding_idx": 3}),
    ],
)
def test_modules_describe_themselves_as_torchs_do(ours, stock, more):
    module, dense = pair(ours, stock, **more)
    assert module.extra_repr() == dense.extra_repr()
    assert f"{ours.__name__}(\n  {dense.extra_repr()}\n" in repr(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPQEmbedding(V, E, config(), padding_idx=20), "padding_idx: got 20, want -20 to 19"),
        (lambda: DPQEmbeddingBag(V, E, config(), padding_idx=-21), "padding_idx: got -21, want -20 to 19"),
        (lambda: DPQEmbeddingBag(V, E, config(), mode="median"), "mode: got 'median', want one of sum, mean, max"),
        (
            lambda: DPQEmbedding(V, E, config(), name="items"),
            "table 'items': want a name without dots that torch does not use",
        ),
    ],
)
def test_modules_reject(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
