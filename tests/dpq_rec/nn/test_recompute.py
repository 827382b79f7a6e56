"""Activation checkpointing: a second run of a forward has the first one's codes and gradients, and moves nothing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dpq_rec.errors import ConfigError
from dpq_rec.nn import DPQEmbedding
from tests.dpq_rec.nn.modules import KINDS, batch, build, config, vectors

MOVED = {
    "norm sx": {"method": "sx"},
    "norm vq": {"method": "vq", "commitment_weight": 0.3},
    "ema": {"method": "vq", "ema_decay": 0.5},
    "ema, levels": {"method": "vq", "ema_decay": 0.5, "num_levels": 2, "commitment_weight": 0.3},
    "ema, tiers": {"method": "vq", "ema_decay": 0.5, "num_levels": 2, "tiers": ((0.5, 1),)},
    "revival sx": {"method": "sx", "revive_after": 1},
    "revival, shared, fp16": {"method": "sx", "revive_after": 1, "share_subspaces": True, "values_dtype": "float16"},
    "revival and ema": {"method": "vq", "ema_decay": 0.5, "revive_after": 1},
}
WAYS = {
    "plain": lambda run, arguments: run(arguments),
    "reentrant": lambda run, arguments: checkpoint(run, arguments, use_reentrant=True),
    "not reentrant": lambda run, arguments: checkpoint(run, arguments, use_reentrant=False),
}
IDS = ([1, 2, 3, 3, 7], [4, 5, 6, 1, 1, 9], [8, 9, 2, 11, 12, 13])


def run_of(module, over):
    """Vectors, and a layer over them, which an optimizer must find a gradient for."""
    return lambda arguments: over(torch.cat([v.flatten() for v in vectors(module, arguments).values()]).sum()[None])


def trained(way, kind, options, *, num_forwards=1):
    """Losses, weights and statistics after three steps of a module, whose forwards run by checkpointing or not."""
    torch.manual_seed(0)
    module, over = build(kind, config(**options)).train(), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*module.parameters(), *over.parameters()], lr=0.1)
    losses = []
    for ids in IDS:
        halves = [ids, list(reversed(ids))[1:], ids][:num_forwards]
        # Reentrant checkpointing wants an input with a gradient; ids have none.
        anchor = torch.zeros((), requires_grad=True)
        outputs = [
            WAYS[way](lambda a, half=half: run_of(module, over)(batch(kind, half)) + a, anchor) for half in halves
        ]
        loss = sum((output - 1).square().sum() for output in outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module.state_dict()


def assert_same_training(way, kind, options, **more):
    losses, state = trained("plain", kind, options, **more)
    got_losses, got_state = trained(way, kind, options, **more)
    assert got_losses == losses
    for name, tensor in state.items():
        assert torch.equal(got_state[name], tensor), name


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_checkpointed_training_is_bit_for_bit_the_plain_one(way, name):
    assert_same_training(way, DPQEmbedding, MOVED[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_every_module_can_be_checkpointed(way, kind):
    assert_same_training(way, kind, MOVED["revival and ema"])


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_several_checkpointed_forwards_before_a_backward(way):
    assert_same_training(way, DPQEmbedding, MOVED["revival and ema"], num_forwards=3)


def test_more_forwards_than_are_kept_for_their_backward_are_refused():
    module, anchor = build(DPQEmbedding, config(**MOVED["ema"])), torch.zeros((), requires_grad=True)
    outputs = [
        checkpoint(lambda a, i=i: module(torch.tensor([i % 19 + 1, i // 19])) + a, anchor, use_reentrant=False)
        for i in range(40)
    ]
    with pytest.raises(ConfigError, match="call backward more often"):
        sum(output.sum() for output in outputs).backward()


def test_forwards_in_training_mode_without_gradients_leave_checkpointing_as_it_is():
    def gradients(way):
        torch.manual_seed(0)
        module = build(DPQEmbedding, config(**MOVED["revival and ema"]))
        with torch.no_grad():
            for i in range(40):
                module(torch.tensor([i % 19 + 1]))
        anchor = torch.zeros((), requires_grad=True)
        WAYS[way](lambda a: module(torch.tensor(IDS[0])) + a, anchor).square().sum().backward()
        return [parameter.grad for parameter in module.queries.parameters()]

    assert all(map(torch.equal, gradients("plain"), gradients("reentrant")))


def trained_with_padding(way, options):
    """Gradients and state after steps of a tied model whose padding row has a vector."""
    torch.manual_seed(0)
    module = DPQEmbedding(14, 12, config(**options), padding_idx=3)
    module.keep_padding()

    def squares(anchor, ids):
        return module(ids).square() + module.weight.square().sum() + anchor

    for ids in IDS:
        arguments, anchor = torch.tensor([*ids, 3]), torch.zeros((), requires_grad=True)
        WAYS[way](lambda a, ids=arguments: squares(a, ids), anchor).square().sum().backward()
    return [parameter.grad for parameter in module.parameters()], module.state_dict()


@pytest.mark.parametrize("name", ["norm sx", "ema, levels", "revival and ema"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_a_kept_padding_row_is_the_same_in_a_second_run(way, name):
    """Its vector is no part of what is trained, and is chosen by what has moved meanwhile."""
    want, want_state = trained_with_padding("plain", MOVED[name])
    got, got_state = trained_with_padding(way, MOVED[name])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert all(torch.equal(got_state[key], tensor) for key, tensor in want_state.items())
