"""The codebook loss counts once for each forward, however many backwards and losses there are."""

import pytest
import torch

from dpq_rec.nn import DPQEmbedding, DPQEmbeddingBagCollection
from tests.dpq_rec.nn.modules import KINDS, batch, build, config, vectors

OPTIONS = {
    "drawn": {},
    "committed": {"commitment_weight": 0.5},
    "means, committed": {"ema_decay": 0.9, "commitment_weight": 0.5},
    "levels, values by the task too": {"num_levels": 3, "value_gradient": True, "commitment_weight": 0.25},
    "tiers": {"num_levels": 3, "tiers": ((0.3, 1),), "commitment_weight": 0.25},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, **options):
    torch.manual_seed(0)
    return build(kind, config(**{"method": "vq", "batch_norm": False, **options}))


def losses(module, arguments):
    """Two losses of one forward: of all outputs, and of each of their numbers in another way."""
    outputs = list(vectors(module, arguments).values())
    return sum(v.square().sum() for v in outputs), sum((3 * v).sin().sum() for v in outputs)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def of_one_backward(kind, **options):
    module = made(kind, **options)
    sum(losses(module, batch(kind))).backward()
    return gradients(module)


@kinds
@options
def test_two_backwards_of_one_forward_are_the_one_of_the_sum(kind, options):
    module = made(kind, **options)
    one, other = losses(module, batch(kind))
    one.backward(retain_graph=True)
    other.backward()
    assert_same(gradients(module), of_one_backward(kind, **options))


@options
def test_gradients_of_parts_of_the_loss_add_up_to_those_of_the_whole(options):
    """As multi-task methods ask for them, that weigh the gradient of each task."""
    module = made(DPQEmbedding, **options)
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parts = [
        torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, materialize_grads=True)
        for loss in losses(module, batch(DPQEmbedding))
    ]
    got = {name: one + other for name, one, other in zip(wanted, *parts, strict=True)}
    assert_same(got, of_one_backward(DPQEmbedding, **options))


@options
@pytest.mark.parametrize("first", ["queries", "quantizers"])
def test_gradients_of_some_parameters_leave_their_share_to_the_others(options, first):
    module = made(DPQEmbedding, **options)
    loss = sum(losses(module, batch(DPQEmbedding)))
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    got = {}
    for group in ([n for n in names if n.startswith(first)], [n for n in names if not n.startswith(first)]):
        if group:
            inputs = [module.get_parameter(name) for name in group]
            got |= zip(group, torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True), strict=True)
    assert_same({name: got[name] for name in names}, of_one_backward(DPQEmbedding, **options))


def test_a_gradient_of_the_vectors_alone_takes_nothing_from_the_backward():
    module = made(DPQEmbedding, commitment_weight=0.5)
    out = module(batch(DPQEmbedding))
    loss = out.square().sum() + (3 * out).sin().sum()
    torch.autograd.grad(loss, out, retain_graph=True)
    loss.backward()
    assert_same(gradients(module), of_one_backward(DPQEmbedding, commitment_weight=0.5))


@options
def test_accumulated_forwards_count_once_each(options):
    """Of batches that are the same, twice the gradient of one; running means have not moved the values yet."""
    once, twice = (made(DPQEmbedding, **{**options, "ema_decay": None}) for _ in range(2))
    sum(losses(once, batch(DPQEmbedding))).backward()
    for _ in range(2):
        one, other = losses(twice, batch(DPQEmbedding))
        one.backward(retain_graph=True)
        other.backward()
    assert_same(gradients(twice), {name: 2 * gradient for name, gradient in gradients(once).items()})


def test_a_table_whose_vectors_are_in_the_second_loss_alone_has_its_codebook_loss_there():
    """Each table of a collection by itself: the first backward must not take what is another's."""
    module = made(DPQEmbeddingBagCollection, commitment_weight=0.5)
    out = vectors(module, batch(DPQEmbeddingBagCollection))
    out["item"].square().sum().backward(retain_graph=True)
    out["user"].square().sum().backward()
    other = made(DPQEmbeddingBagCollection, commitment_weight=0.5)
    out = vectors(other, batch(DPQEmbeddingBagCollection))
    (out["item"].square().sum() + out["user"].square().sum()).backward()
    assert_same(gradients(module), gradients(other))


def test_the_scale_of_the_codebook_loss_counts_once_too():
    module, other = made(DPQEmbedding), made(DPQEmbedding)
    module.codebook_loss_scale = other.codebook_loss_scale = 7.0
    one, two = losses(module, batch(DPQEmbedding))
    one.backward(retain_graph=True), two.backward()
    sum(losses(other, batch(DPQEmbedding))).backward()
    assert_same(gradients(module), gradients(other))
