"""Rows put together from shards, in one process: a plain weight, and one that is cut by rows and columns."""

import pytest
import torch
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import Shard

from dpq_rec import ConfigError
from dpq_rec.nn.shards import check_cuts, rows_of, shards_of
from tests.dpq_rec.nn.modules import config

WEIGHT = torch.arange(60.0).view(5, 12)


def cut(rows, columns):
    """WEIGHT in blocks that begin at these rows and columns, handed over in no order."""
    blocks = []
    for row, next_row in zip(rows, [*rows[1:], 5], strict=True):
        for column, next_column in zip(columns, [*columns[1:], 12], strict=True):
            block = WEIGHT[row:next_row, column:next_column].clone()
            blocks.append(Shard.from_tensor_and_offsets(block, [row, column], rank=0))
    return sharded_tensor.init_from_local_shards(blocks[::-1], 5, 12)


CUTS = {"whole": ([0], [0]), "rows": ([0, 2, 3], [0]), "columns": ([0], [0, 4]), "both": ([0, 3], [0, 4, 8])}
ROWS = {"none": [], "one": [4], "any order, twice": [4, 0, 2, 3, 0], "all": [0, 1, 2, 3, 4]}
rows_asked = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


def test_a_plain_weight_is_one_shard_of_rank_0():
    ((owner, *at, tensor),) = shards_of(WEIGHT)
    assert (owner, at) == (0, [0, 5, 0, 12])
    assert tensor is WEIGHT


@rows_asked
def test_rows_of_a_plain_weight(rows):
    assert torch.equal(rows_of(WEIGHT, torch.tensor(rows, dtype=torch.int64)), WEIGHT[rows])


def test_rows_of_a_weight_in_half_precision_are_float32():
    assert rows_of(WEIGHT.half(), torch.tensor([3])).dtype == torch.float32


def test_rows_know_no_gradients():
    assert not rows_of(WEIGHT.clone().requires_grad_(), torch.tensor([3])).requires_grad


@rows_asked
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_rows_of_a_sharded_weight_are_put_together(cuts, rows, one_rank):
    assert torch.equal(rows_of(cut(*cuts), torch.tensor(rows, dtype=torch.int64)), WEIGHT[rows])


def test_shards_come_in_the_order_of_rows_then_columns(one_rank):
    shards = shards_of(cut(*CUTS["both"]))
    assert [(s.first_row, s.first_column) for s in shards] == [(0, 0), (0, 4), (0, 8), (3, 0), (3, 4), (3, 8)]
    for s in shards:
        block = WEIGHT[s.first_row : s.first_row + s.num_rows, s.first_column : s.first_column + s.num_columns]
        assert torch.equal(s.tensor, block)


@pytest.mark.parametrize("num_subspaces", [1, 2, 3, 12])
def test_a_weight_that_is_not_cut_by_columns_is_fine(num_subspaces, one_rank):
    for weight in (WEIGHT, cut(*CUTS["rows"])):
        check_cuts("item", weight, config(num_subspaces=num_subspaces))


@pytest.mark.parametrize("num_subspaces", [3, 6, 12])
def test_cuts_between_subspaces_are_fine(num_subspaces, one_rank):
    check_cuts("item", cut(*CUTS["both"]), config(num_subspaces=num_subspaces))


@pytest.mark.parametrize(
    ("columns", "num_subspaces", "message"),
    [
        ([0, 4], 2, "got a shard of columns 0 to 3, want cuts at multiples of 6, between subspaces"),
        ([0, 4, 8], 4, "got a shard of columns 0 to 3, want cuts at multiples of 3"),
        ([0, 8], 1, "table 'item': .* want cuts at multiples of 12, .* dpq_rec.nn.subspace_constraints"),
        ([0, 4, 9], 3, "got a shard of columns 4 to 8, want cuts at multiples of 4"),
    ],
)
def test_cuts_through_a_subspace_are_refused(columns, num_subspaces, message, one_rank):
    with pytest.raises(ConfigError, match=message):
        check_cuts("item", cut([0, 3], columns), config(num_subspaces=num_subspaces))
