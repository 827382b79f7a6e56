"""Click metrics over all ranks. In: each rank's logits and labels. Out: AUC and normalised entropy, on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from training.distributed import on_rank_0


def click_metrics(logits_N: torch.Tensor, labels_N: torch.Tensor) -> dict[str, float]:
    """`auc` and `normalised_entropy` of all ranks' examples together; every rank calls it, also with no examples.

    Exact, and the same on every rank. Rank 0 computes them: its memory grows with the examples of all ranks, by some
    80 bytes each; that of another rank with its own examples, by 24 bytes each.

    Args:
        logits_N: of the probability of a click, on any device; each rank brings its own N.
        labels_N: 0 or 1.

    Raises:
        ConfigError: as `auc`.
    """
    own_2N = torch.stack([logits_N.detach().float(), labels_N.float()]).cpu()
    if not dist.is_initialized():
        return _metrics(own_2N)
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own_2N, parts)
    return on_rank_0(lambda: _metrics(torch.cat(parts or [], 1)))


def _metrics(columns_2N: torch.Tensor) -> dict[str, float]:
    logits, labels = columns_2N.numpy()
    return {"auc": auc(logits, labels), "normalised_entropy": normalised_entropy(logits, labels)}


def auc(scores_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """The chance that a click scores above a non-click, ties counting half: Mann and Whitney's U over its maximum.

    Raises:
        ConfigError: labels other than 0 and 1, only one of them, or a score that is not finite.
    """
    clicked_N = _checked_clicks(scores_N, labels_N)
    _, at_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    mean_ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[at_N]  # from 1; equal scores share theirs
    num_clicks = int(clicked_N.sum())
    largest = num_clicks * (len(clicked_N) - num_clicks)
    return float((mean_ranks_N[clicked_N].sum() - num_clicks * (num_clicks + 1) / 2) / largest)


def normalised_entropy(logits_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """Log loss over the entropy of the share of clicks (He et al. 2014, eq. 1): 1 is as good as knowing that share.

    Raises:
        ConfigError: as `auc`.
    """
    clicked_N = _checked_clicks(logits_N, labels_N)
    wide_N = logits_N.astype(np.float64)
    log_loss = (np.logaddexp(0, wide_N) - wide_N * clicked_N).mean()
    share = clicked_N.mean()
    return float(log_loss / -(share * np.log(share) + (1 - share) * np.log1p(-share)))


def _checked_clicks(scores_N: NDArray[Any], labels_N: NDArray[Any]) -> NDArray[np.bool_]:
    wrong = labels_N[(labels_N != 0) & (labels_N != 1)]
    if len(wrong):
        raise ConfigError(f"labels: got {wrong[0]}, want 0 or 1")
    if not np.isfinite(scores_N).all():
        raise ConfigError("scores: got numbers that are not finite: the model diverged; try a lower --learning-rate")
    clicked_N = labels_N == 1
    if clicked_N.all() or not clicked_N.any():
        got = f"{len(labels_N)} examples, {int(clicked_N.sum())} of them clicks"
        raise ConfigError(
            f"labels: got {got}; AUC and normalised entropy want clicks and others: evaluate on more rows"
        )
    return clicked_N
