"""One rank against two, on gloo, with stock planner and sharders; and what no two ranks may see differently."""

import numpy as np
import pytest
import torch

from dpq_rec import verify
from tests.distributed.cases import CASES, NUM_STEPS
from tests.distributed.checks import frozen_vectors

STARTED = [name for name, case in CASES.items() if case.start]
WARM_UP = ("warm-up", "freeze")  # which refuses it for that
REVIVED = [name for name, case in CASES.items() if case.config.revive_after]


def losses(runs, world_size, case):
    return np.array(runs[world_size].report["cases"][case]["losses"])


def saved(runs, world_size, case):
    return torch.load(runs[world_size].folder / f"{case}.pt")


def assert_same(one, two, atol):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_hold_queries(runs, case):
    owners = runs[2].report["cases"][case]["owners"]
    assert {rank for ranks in owners.values() for rank in ranks} == ({0} if CASES[case].plain_items else {0, 1})
    if CASES[case].sharding != "table_wise":
        assert all(ranks == [0, 1] for ranks in owners.values())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_losses_and_codebook_losses_of_one(runs, case):
    atol = CASES[case].atol
    np.testing.assert_allclose(losses(runs, 2, case), losses(runs, 1, case), rtol=0, atol=atol)
    assert losses(runs, 1, case).shape == (NUM_STEPS, 1 + len(CASES[case].quantized))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.full_steps])
def test_two_ranks_warm_up_with_the_losses_of_one(runs, case):
    one, two = (runs[size].report["cases"][case]["losses of full steps"] for size in (1, 2))
    np.testing.assert_allclose(two, one, rtol=0, atol=CASES[case].atol)
    assert np.shape(one) == (CASES[case].full_steps, 1 + len(CASES[case].quantized))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_the_weights_and_statistics_of_one(runs, case):
    for part in ("last", "queries"):
        assert_same(saved(runs, 1, case)[part], saved(runs, 2, case)[part], CASES[case].atol)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_freeze_the_artifact_of_one(runs, case):
    verify(runs[2].folder / case)
    for name in CASES[case].sizes:
        one, two = (frozen_vectors(runs[world_size].folder / case, name) for world_size in (1, 2))
        # Losses agree to rounding, so now and then a row lies so near between two codes that it falls to the other.
        assert (np.isclose(one, two, rtol=0, atol=CASES[case].atol).all(axis=1)).mean() > 0.98


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_served_the_bits_of_its_eval_mode(runs, case):
    assert runs[2].report["cases"][case]["served otherwise"] == [[], []]


@pytest.mark.parametrize("case", CASES)
def test_no_weight_or_statistic_of_a_quantizer_drifts_apart(runs, case):
    """DDP averages gradients and sends no buffers: what is kept beside gradients is added up over ranks by us."""
    assert runs[2].report["cases"][case]["differing"] == []


@pytest.mark.parametrize("case", STARTED)
def test_start_gives_all_ranks_the_same_bits(runs, case):
    assert runs[2].report["cases"][case]["differing after start"] == []


@pytest.mark.parametrize("case", STARTED)
def test_start_on_two_ranks_is_that_on_one(runs, case):
    one, two = (saved(runs, world_size, case)["first"] for world_size in (1, 2))
    assert_same(one, two, CASES[case].atol)
    assert all(tensor.any() for name, tensor in one.items() if name.endswith(("values_MKS", "mean_K")))


@pytest.mark.parametrize("case", REVIVED)
def test_codes_are_revived_in_the_cases_that_say_so(runs, case):
    draws = [tensor for name, tensor in saved(runs, 2, case)["last"].items() if name.endswith("num_draws")]
    assert len(draws) == 2
    assert all(draw > 0 for draw in draws)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses_to_freeze_into_a_folder_that_only_rank_0_looks_at(runs, case):
    said = runs[2].report["cases"][case]["freeze into the same folder"]
    assert len(said) == 2
    assert all(text.startswith("FileExistsError") for text in said)


@pytest.mark.parametrize("entry", ["forward", "start", "freeze"])
def test_every_rank_refuses_cuts_through_a_subspace(runs, entry):
    said = [rank[entry] for rank in runs[2].report["cuts"]]
    assert len(said) == 2
    for text in said:
        assert text.startswith("ConfigError: table 'user': got a shard of columns 0 to 3, want cuts at multiples of 8")
        assert "subspace_constraints" in text


@pytest.mark.parametrize(
    ("case", "entry"),
    [
        (c, e)
        for c in ("vq", "sx-no_batch_norm", "warm-up")
        for e in ("forward", "start", "freeze")
        if (c, e) != WARM_UP
    ],
)
def test_every_rank_names_the_row_that_is_not_finite_whichever_asks_for_it(runs, case, entry):
    said = [rank[entry] for rank in runs[2].report["not finite"][case]]
    assert len(said) == 2
    for text in said:
        assert text.startswith("ConfigError: table 'user': got NaN or infinity in the query of row 70;")


@pytest.mark.parametrize("case", ["vq", "sx-no_batch_norm", "warm-up"])
def test_ranks_train_on_together_when_the_row_is_mended(runs, case):
    assert [rank["mended"] for rank in runs[2].report["not finite"][case]] == ["none", "none"]
