"""The sampled softmax held to torch's log_softmax over scores written out, its gradients to finite differences."""

import pytest
import torch

from training.models import two_tower as module
from training.models.two_tower import sampled_softmax


def inputs(num_examples, num_candidates, *, with_log_q=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_examples * 1000 + num_candidates)
    numbers = [
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((num_examples, 3), (num_candidates, 3), (num_examples,), (num_candidates,))
    ]
    items, rows = (
        torch.randint(5, (count,), generator=generator) for count in (num_examples, num_candidates)
    )  # of five items: candidates are one's own item often, some several times
    return *(each.requires_grad_() for each in numbers[:3]), items, rows, numbers[3] if with_log_q else None


def written_out(examples, candidates, own, items, rows, log_q):
    losses = []
    for example, score, item in zip(examples, own, items, strict=True):
        others = rows != item
        scores = candidates[others] @ example - (0 if log_q is None else log_q[others])
        losses.append(-torch.cat([score[None], scores]).log_softmax(0)[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("with_log_q", [True, False])
@pytest.mark.parametrize("num_candidates", [0, 1, 7, 40])
@pytest.mark.parametrize("rows_at_a_time", [1, 2, 1000])
def test_is_the_softmax_among_other_items(rows_at_a_time, num_candidates, with_log_q, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SCORES", rows_at_a_time * max(1, num_candidates))
    given = inputs(5, num_candidates, with_log_q=with_log_q)
    got, want = sampled_softmax(*given), written_out(*given)
    torch.testing.assert_close(got, want)
    for mine, wanted in zip(
        torch.autograd.grad(3 * got, given[:3]), torch.autograd.grad(3 * want, given[:3]), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_gradients_are_finite_differences():
    *vectors, items, rows, log_q = inputs(4, 9)
    assert torch.autograd.gradcheck(lambda *each: sampled_softmax(*each, items, rows, log_q), vectors)


def test_large_scores_neither_overflow_nor_vanish():
    examples, candidates, own, items, rows, _ = inputs(4, 9, dtype=torch.float32)
    for factor in (1e3, -1e3):
        own_scores = (own * factor).detach().requires_grad_()
        got = sampled_softmax(examples, candidates, own_scores, items, rows)
        torch.testing.assert_close(got, written_out(examples, candidates, own_scores, items, rows, None))
        (to_own,) = torch.autograd.grad(got, own_scores)
        assert torch.isfinite(to_own).all()
