import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from dpq_rec import ConfigError
from training.evaluation.clicks import auc, click_metrics, normalised_entropy

BOTH = st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({clicked for _, clicked in rows}) == 2
)


def columns(rows):
    scores, clicked = zip(*rows, strict=True)
    return np.array(scores, np.float32) / 2, np.array(clicked, np.float32)


@given(rows=BOTH)
def test_auc_is_sklearns_and_the_share_of_pairs_in_order(rows):
    scores, labels = columns(rows)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(rows=BOTH)
def test_normalised_entropy_is_sklearns_log_loss_over_that_of_the_share_and_torchrecs(rows):
    logits, labels = columns(rows)
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    share = np.full(len(labels), labels.mean(dtype=np.float64))
    expected = log_loss(labels, chances) / log_loss(labels, share)
    assert normalised_entropy(logits, labels) == pytest.approx(expected, rel=1e-9)
    wide, clicks, ones = (torch.from_numpy(each).double() for each in (chances, labels, np.ones(len(labels))))
    entropy = compute_cross_entropy(clicks, wide, ones, 1e-12).sum()
    torchrec = compute_ne(entropy, ones.sum(), clicks.sum(), (1 - clicks).sum(), 1e-12)
    assert normalised_entropy(logits, labels) == pytest.approx(torchrec.item(), rel=1e-6)


def test_normalised_entropy_of_sure_predictions_does_not_overflow():
    labels = np.array([1, 0], np.float32)
    assert normalised_entropy(np.array([200, -200], np.float32), labels) == pytest.approx(0, abs=1e-80)
    assert normalised_entropy(np.array([-200, 200], np.float32), labels) == pytest.approx(200 / np.log(2))


@pytest.mark.parametrize("metric", [auc, normalised_entropy])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [1, 1], "got 2 examples, 2 of them clicks; AUC and normalised entropy want clicks and others"),
        ([1, 2], [0, 0], "got 2 examples, 0 of them clicks"),
        ([], [], "got 0 examples, 0 of them clicks"),
        ([1, 2], [1, 0.5], "labels: got 0.5, want 0 or 1"),
        ([1, np.nan], [1, 0], "scores: got numbers that are not finite"),
        ([1, np.inf], [1, 0], "scores: got numbers that are not finite"),
    ],
)
def test_metrics_refuse(metric, scores, labels, message):
    with pytest.raises(ConfigError, match=message):
        metric(np.array(scores, np.float32), np.array(labels, np.float32))


RANK = """
import json, sys
import torch, torch.distributed as dist
from training.evaluation.clicks import click_metrics
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
mine = torch.load(f"{folder}/rank-{rank}.pt")
print(json.dumps(click_metrics(mine[0], mine[1])))
dist.barrier()
dist.destroy_process_group()
"""


def test_click_metrics_of_ranks_are_those_of_one_with_all_examples(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-9, 9, (500,), generator=generator) / 4
    labels = (torch.rand(500, generator=generator) < torch.sigmoid(logits)).float()
    for rank, (start, stop) in enumerate([(0, 137), (137, 137), (137, 500)]):  # one rank has none
        torch.save(torch.stack([logits[start:stop], labels[start:stop]]), tmp_path / f"rank-{rank}.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, tmp_path, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    found = [json.loads(rank.communicate()[0]) for rank in ranks]
    assert found == [click_metrics(logits, labels)] * 3
    assert found[0]["auc"] == pytest.approx(roc_auc_score(labels, logits))
