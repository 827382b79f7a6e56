"""Layouts chosen for a ratio: they reach it, by the bytes of real artifacts, and waste little of it."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dpq_rec import DPQConfig, EmbeddingStore
from dpq_rec.codes import pack_codes
from dpq_rec.errors import ConfigError
from dpq_rec.nn import DPQEmbedding, freeze
from dpq_rec.sizing import choose_layout
from dpq_rec.table import sizes

TABLES = {
    "num_embeddings": st.integers(1, 3_000_000),
    "embedding_dim": st.integers(1, 512),
    "shared": st.booleans(),
}


def ratio_of(num_embeddings, embedding_dim, shared, changes):
    """By a row of codes as it is packed, and an array of values as it is made."""
    config = DPQConfig(method="sx", share_subspaces=shared, **changes)
    row_bytes = pack_codes(np.zeros((1, config.layout.codes_per_row), np.uint16), config.layout).nbytes
    groups = config.num_levels * (1 if shared else config.num_subspaces)
    width = config.subspace_dim(embedding_dim)
    values_bytes = np.zeros((groups, config.num_codes, width), config.values_dtype).nbytes
    return 4 * num_embeddings * embedding_dim / (num_embeddings * row_bytes + values_bytes)


@given(**TABLES, ratio=st.floats(0.5, 300))
def test_layout_reaches_the_ratio_or_says_the_largest_that_one_can_reach(num_embeddings, embedding_dim, shared, ratio):
    try:
        changes = choose_layout(num_embeddings, embedding_dim, ratio, share_subspaces=shared)
    except ConfigError as error:
        largest = float(re.search(r"want at most ([\d.e+]+):", str(error))[1])
        assert largest < ratio
        assume(largest > 0)
        changes = choose_layout(num_embeddings, embedding_dim, largest, share_subspaces=shared)
        assert ratio_of(num_embeddings, embedding_dim, shared, changes) >= largest
        # Two codes, one byte a row: no table is smaller, but where its values are shared by subspaces.
        assert shared or 4 * num_embeddings * embedding_dim < ratio * (num_embeddings + 4 * embedding_dim)
    else:
        assert ratio_of(num_embeddings, embedding_dim, shared, changes) >= ratio


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("num_embeddings", "ratio"), [(60, 4), (943, 20), (5000, 33.3), (20_000, 90)])
def test_artifact_of_the_chosen_layout_has_the_ratio(tmp_path, num_embeddings, ratio, shared):
    changes = choose_layout(num_embeddings, 24, ratio, share_subspaces=shared)
    config = DPQConfig(method="vq", share_subspaces=shared, **changes)
    freeze(torch.nn.ModuleDict({"t": DPQEmbedding(num_embeddings, 24, config)}), tmp_path / "artifact")
    found = sizes(EmbeddingStore.open(tmp_path / "artifact").tables.values())["compression_ratio"]
    assert ratio <= found == ratio_of(num_embeddings, 24, shared, changes)


@pytest.mark.parametrize(
    ("num_embeddings", "embedding_dim", "ratio", "layout"),
    [
        (1_000_000, 64, 20, (4, 256, 3)),
        (1_000_000, 64, 40, (2, 256, 3)),
        (40_979, 64, 20, (16, 64, 1)),
        (29_858, 64, 40, (8, 64, 1)),
        (3_416, 64, 20, (32, 8, 1)),
        (3_416, 64, 40, (16, 8, 1)),
        (17_379, 96, 26, (16, 64, 1)),  # (8, 4, 7) if all bits told as much, (12, 8, 3) if only the most would do
    ],
)
def test_layout_tells_about_the_most_in_the_fewest_codes(num_embeddings, embedding_dim, ratio, layout):
    changes = choose_layout(num_embeddings, embedding_dim, ratio)
    assert (changes["num_subspaces"], changes["num_codes"], changes["num_levels"]) == layout


@given(
    num_embeddings=st.integers(2000, 3_000_000), embedding_dim=st.sampled_from([32, 64, 128]), ratio=st.floats(8, 24)
)
def test_layout_leaves_little_of_the_ratio_unused(num_embeddings, embedding_dim, ratio):
    changes = choose_layout(num_embeddings, embedding_dim, ratio)
    assert ratio_of(num_embeddings, embedding_dim, False, changes) < 1.7 * ratio


@example(num_embeddings=100, embedding_dim=64, shared=False, ratio=20.0)
@given(**TABLES, ratio=st.floats(0.5, 300))
def test_subspaces_are_wider_than_one_number_where_rows_are(num_embeddings, embedding_dim, shared, ratio):
    """A key of one number has two directions only: cosines could not tell it from others."""
    try:
        changes = choose_layout(num_embeddings, embedding_dim, ratio, share_subspaces=shared)
    except ConfigError:
        assume(False)
    assert embedding_dim == 1 or changes["num_subspaces"] < embedding_dim
