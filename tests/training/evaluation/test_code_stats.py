"""Statistics of codes, held to loops over rows."""

import math
from collections import Counter

import numpy as np
import pytest

from dpq_rec import CodeLayout, IdentityVocabulary, TableContents, code_use, open_artifact, pack_codes, write_artifact
from training.evaluation.code_stats import code_stats

LAYOUTS = [
    CodeLayout(num_subspaces=3, num_codes=5),
    CodeLayout(num_subspaces=1, num_codes=2),
    CodeLayout(num_subspaces=2, num_codes=256, num_levels=2),
]


def table(path, codes_VM, layout):
    shape = (layout.codes_per_row, layout.num_codes, 2)
    contents = TableContents(
        num_embeddings=len(codes_VM),
        embedding_dim=2 * layout.num_subspaces,
        vocabulary=IdentityVocabulary(len(codes_VM)),
        chunks=iter([pack_codes(codes_VM, layout)]),
        layout=layout,
        values=np.zeros(shape, np.float32),
        features=("t",),
    )
    write_artifact(path, {"t": contents})
    return open_artifact(path).tables["t"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_codes", [7, 1000])
def test_code_stats_are_those_of_a_loop(tmp_path, monkeypatch, layout, block_codes):
    monkeypatch.setattr(code_use, "_BLOCK_CODES", block_codes)
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, layout.num_codes, (50, layout.codes_per_row)) // 2 for _ in range(2))
    got = code_stats(table(tmp_path / "b", after, layout), table(tmp_path / "a", before, layout))
    for m in range(layout.codes_per_row):
        shares = [count / 50 for count in Counter(after[:, m].tolist()).values()]
        assert got["used_codes"][m] == len(shares)
        assert got["perplexity"][m] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
        assert got["changed"][m] == sum(a != b for a, b in zip(after[:, m], before[:, m], strict=True)) / 50


def test_code_stats_of_codes_that_are_all_alike_or_all_used_alike(tmp_path):
    layout = CodeLayout(num_subspaces=2, num_codes=4)
    codes = np.stack([np.zeros(40, int), np.arange(40) % 4], 1)
    got = code_stats(table(tmp_path / "a", codes, layout))
    assert got["used_codes"] == [1, 4]
    assert got["perplexity"] == pytest.approx([1, 4])
    assert got["changed"] is None
