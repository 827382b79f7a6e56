"""Checks that numbers are finite. In: queries, keys, values, statistics. Out: nothing, or an error with table and row.

A NaN is as near to every key as to none: its row would get some code, a finite vector, and running statistics would
carry it to all rows. Numbers too large to be squared in fp32 end the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from dpq_rec.errors import ConfigError
from dpq_rec.nn.collectives import sum_over_ranks, world_size

if TYPE_CHECKING:
    from dpq_rec.nn.quantizer import Quantizer

# The largest number in a query or key, times the root of its width and the levels: fp32 holds the squares of such
# numbers, and fourth powers, which the variances of batch norm in training are made of, of the smaller ones.
_LARGEST, _LARGEST_OF_BATCH_NORM = 1e16, 1e9
_LARGEST_HALF = 65_504.0
QUERY_DTYPES = (torch.float32, torch.bfloat16)
_CHUNK = 1 << 24  # numbers of a table that are looked at together
_NO_ROW = torch.iinfo(torch.int64).max
_HINT = "did the training diverge? Lower the learning rate or the loss scale, and go on from weights that are finite"


class Numbers(NamedTuple):
    """Numbers that have to be finite.

    Attributes:
        whose: begins the message: "table 'item_id'".
        what: what they are: "query", "values".
        numbers_NX: of any dtype and shape; none on a rank that does not hold them.
        rows: the table's row of each of the N, or of the first one; None where they are no rows.
        largest: the largest that they may be.
        leave_out: a row that may hold anything.
    """

    whose: str
    what: str
    numbers_NX: torch.Tensor
    rows: torch.Tensor | int | None = None
    largest: float = math.inf
    leave_out: int | None = None


@torch.no_grad()
def check_finite(parts: Sequence[Numbers]) -> None:
    """Refuse what is not finite, or too large; every rank calls it, with parts of the same names in the same order.

    One pass over the numbers, and one sum over ranks; the row is looked for where something is wrong.

    Raises:
        ConfigError: on every rank, of the first such part and its first row on any rank.
    """
    if not parts:
        return
    device = max((part.numbers_NX.device for part in parts), key=lambda device: device.type == "cuda")  # as NCCL wants
    squares_P = torch.stack([_sum_of_squares(part.numbers_NX).to(device) for part in parts])
    found = zip(squares_P.tolist(), parts, strict=True)
    num_wrong = sum(not square < part.largest**2 for square, part in found)  # NaN is below nothing
    if world_size() > 1:
        num_wrong = int(sum_over_ranks(squares_P.new_tensor(num_wrong)))
    if not num_wrong:
        return
    first_P2 = torch.tensor([_first_rows(part) for part in parts], device=squares_P.device)
    if world_size() > 1:
        dist.all_reduce(first_P2, dist.ReduceOp.MIN)
    for part, (not_finite, too_large) in zip(parts, first_P2.tolist(), strict=True):
        if min(not_finite, too_large) < _NO_ROW:
            raise ConfigError(_message(part, not_finite, too_large))


def training_inputs(
    quantizer: Quantizer,
    queries_NQ: torch.Tensor,
    rows_N: torch.Tensor | None,
    whose: str,
    *,
    only_queries: bool = False,
) -> list[Numbers]:
    """What a forward in training reads: queries, keys and values; queries alone, as large as they like, in a warm-up.

    Without rows, a message tells queries by their position.
    """
    largest = largest_query(quantizer, in_training=True)
    queries = Numbers(whose, "query", queries_NQ, 0 if rows_N is None else rows_N, largest)
    if only_queries:
        return [queries]
    if quantizer.is_warming_up:
        return [queries._replace(largest=math.inf)]
    values, *keys = _keys_and_values(quantizer, largest, whose)
    if quantizer.config.values_dtype == "float16":
        values = values._replace(largest=min(values.largest, _LARGEST_HALF))
    return [queries, values, *keys]


def frozen_inputs(quantizer: Quantizer, whose: str) -> list[Numbers]:
    """What an artifact is made of beside queries: keys and values, and the statistics that eval mode chooses by."""
    statistics = [(name, buffer) for name, buffer in quantizer.named_buffers() if buffer.is_floating_point()]
    return [
        *_keys_and_values(quantizer, largest_query(quantizer, in_training=False), whose),
        *(Numbers(whose, f"running statistics ({name})", buffer) for name, buffer in statistics),
    ]


def largest_query(quantizer: Quantizer, *, in_training: bool) -> float:
    """The largest number in a query or key whose scores fp32 holds, and in training their statistics."""
    largest = _LARGEST_OF_BATCH_NORM if in_training and quantizer.config.batch_norm else _LARGEST
    return largest / ((1 + quantizer.config.num_levels) * math.sqrt(quantizer.query_dim))


def check_dtype(whose: str, what: str, dtype: torch.dtype, *allowed: torch.dtype) -> None:
    """Refuse weights whose dtype is none of those allowed: of queries, if not given.

    Raises:
        ConfigError: in those a table is the same in training and when frozen.
    """
    allowed = allowed or QUERY_DTYPES
    if dtype not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ConfigError(f"{whose}: got {what} of {dtype}, want {wanted}: call .float() on the model")


def _keys_and_values(quantizer: Quantizer, largest: float, whose: str) -> list[Numbers]:
    """The values first; they may be any finite number where no query is compared with them, or lessened by them."""
    config, own_keys_MKS = quantizer.config, quantizer.own_keys_MKS
    are_compared = config.keys_are_values or config.num_levels > 1
    values = Numbers(whose, "values", quantizer.values_MKS, largest=largest if are_compared else math.inf)
    return [values] if own_keys_MKS is None else [values, Numbers(whose, "keys", own_keys_MKS, largest=largest)]


def _sum_of_squares(numbers_NX: torch.Tensor) -> torch.Tensor:
    """In fp32: infinite or NaN where a number is, or where its square overflows."""
    flat = numbers_NX.reshape(-1)
    if len(flat) <= _CHUNK:
        flat = flat.float()
        return torch.dot(flat, flat)
    return torch.stack([_sum_of_squares(chunk) for chunk in flat.split(_CHUNK)]).sum()


def _first_rows(part: Numbers) -> tuple[int, int]:
    """The first row that is not finite, and the first one that is too large; _NO_ROW where there is none."""
    firsts = [_NO_ROW, _NO_ROW]
    if not part.numbers_NX.numel():
        return _NO_ROW, _NO_ROW
    numbers_NX = part.numbers_NX.reshape(len(part.numbers_NX) if part.numbers_NX.dim() else 1, -1)
    for begin in range(0, len(numbers_NX), rows := max(1, _CHUNK // max(1, numbers_NX.shape[1]))):
        highest_N = numbers_NX[begin : begin + rows].float().abs().amax(1)
        is_finite_N = highest_N.isfinite()
        for kind, wrong_N in enumerate((~is_finite_N, is_finite_N & (highest_N > part.largest))):
            at_P = wrong_N.nonzero()[:, 0] + begin
            rows_P = part.rows[at_P] if isinstance(part.rows, torch.Tensor) else at_P + (part.rows or 0)
            if part.leave_out is not None:
                rows_P = rows_P[rows_P != part.leave_out]
            if len(rows_P):
                firsts[kind] = min(firsts[kind], int(rows_P[0]))
    return firsts[0], firsts[1]


def _message(part: Numbers, not_finite: int, too_large: int) -> str:
    got, row = "NaN or infinity", not_finite
    if not_finite == _NO_ROW:
        got, row = f"a number above {part.largest:.2g}, too large to be compared in float32,", too_large
    where = f"its {part.what}" if part.rows is None else f"the {part.what} of row {row}"
    return f"{part.whose}: got {got} in {where}; {_HINT}"
