"""Models whose output layer shares their table's weight: one rank against two."""

import numpy as np
import pytest
import torch

from dpq_rec import verify
from tests.distributed.tied import NUM_STEPS, TIED


def losses(runs, world_size, case):
    return runs[world_size].report["tied"][case]["losses"]


@pytest.mark.parametrize("case", TIED)
def test_two_ranks_train_a_tied_model_with_the_losses_of_one(runs, case):
    np.testing.assert_allclose(losses(runs, 2, case), losses(runs, 1, case), rtol=0, atol=1e-5)
    assert len(set(losses(runs, 1, case))) == NUM_STEPS


@pytest.mark.parametrize("case", TIED)
def test_two_ranks_end_with_the_tied_model_of_one(runs, case):
    """Its weights, queries and statistics: the gradients of all steps were those of the whole batch."""
    one, two = (torch.load(runs[world_size].folder / f"{case}.pt") for world_size in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", TIED)
def test_every_rank_reads_the_weight_that_the_artifact_holds(runs, case):
    for world_size in (1, 2):
        verify(runs[world_size].folder / case)
        assert runs[world_size].report["tied"][case]["served"] == [True] * world_size
