"""K-means of groups. In: groups_NDS. Out: centroids_DKS, of each subspace by itself or of all together. Needs faiss."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dpq_rec.errors import MissingDependencyError
from dpq_rec.nn.finite import Numbers, check_finite

_ITERATIONS = 20
_MAX_ROWS_PER_CENTROID = 256  # more change centroids by less than the noise of the sample
_JITTER = 1e-3  # of the spread: sets the copies of a row apart where there are fewer rows than centroids


def centroids(groups_NDS: torch.Tensor, num_codes: int, *, shared: bool, spherical: bool, seed: int) -> torch.Tensor:
    """Centroids [D, K, S], or [1, K, S] where the subspaces share them; the same for the same input.

    Args:
        groups_NDS: what to cluster, one row at least.
        num_codes: K.
        shared: one clustering of the groups of all subspaces.
        spherical: of directions, by cosine; the centroids have length one.
        seed: of the start.

    Raises:
        ConfigError: a group that is not finite.
    """
    check_finite([Numbers("k-means", "group", groups_NDS, 0)])
    rows_DNS = groups_NDS.detach().float().transpose(0, 1).cpu().numpy()
    if shared:
        rows_DNS = rows_DNS.reshape(1, -1, rows_DNS.shape[2])
    found = [_cluster(rows_NS, num_codes, spherical, seed + d) for d, rows_NS in enumerate(rows_DNS)]
    return torch.from_numpy(np.stack(found)).to(groups_NDS)


def check_faiss() -> None:
    """Raises MissingDependencyError where faiss is not installed."""
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError("faiss, which places keys and values by k-means,", "train") from error


def _cluster(rows_NS: NDArray[np.float32], num_codes: int, spherical: bool, seed: int) -> NDArray[np.float32]:
    import faiss

    # A power of two leaves the fractions as they are; squares of large numbers overflow, and faiss ends the process.
    scale = np.float32(np.exp2(np.floor(np.log2(np.abs(rows_NS).max(initial=0.0) or 1.0))))
    rows_NS = np.ascontiguousarray(rows_NS) / scale
    if len(rows_NS) <= num_codes:
        again = np.resize(np.arange(len(rows_NS)), num_codes)
        noise = np.random.default_rng(seed).standard_normal((num_codes, rows_NS.shape[1])).astype(np.float32)
        noise[: len(rows_NS)] = 0
        return (rows_NS[again] + noise * np.float32(_JITTER * (rows_NS.std() or 1.0))) * scale
    settings = {"niter": _ITERATIONS, "seed": seed, "spherical": spherical}
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": _MAX_ROWS_PER_CENTROID}
    kmeans = faiss.Kmeans(rows_NS.shape[1], num_codes, **settings, **limits)
    kmeans.train(rows_NS)
    assert kmeans.centroids is not None, "it was trained"
    return kmeans.centroids if spherical else kmeans.centroids * scale
