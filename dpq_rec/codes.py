"""Codes to bytes and back. In: codes_NM. Out: packed_NW (uint8).

A row's M = L*D codes are one string of bits: code m is bits m*b to m*b+b-1, least significant bit first, bit 0 being
the least significant bit of byte 0; the last byte is filled up with zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError

MAX_NUM_CODES = 65_536
MAX_TIERS = 256  # a tier's number travels in a byte


@dataclass(frozen=True, kw_only=True)
class CodeLayout:
    """How many codes a row has, and how many bits each takes.

    Four codes of up to 8 choices take 3 bits each, 12 in all, and so two bytes; code 0 is in the lowest bits:

    >>> layout = CodeLayout(num_subspaces=4, num_codes=8)
    >>> (layout.codes_per_row, layout.code_bits, layout.row_bytes)
    (4, 3, 2)
    >>> packed_NW = pack_codes(np.array([[1, 2, 3, 7]]), layout)
    >>> [f"{byte:08b}" for byte in packed_NW[0]]
    ['11010001', '00001110']
    >>> unpack_codes(packed_NW, layout).tolist()
    [[1, 2, 3, 7]]

    A table of 1,000,000 vectors of 64 numbers takes 256 MB in fp32; with these codes, and values in fp16:

    >>> layout.table_bytes((1_000_000, 64), value_bytes=2)
    2001024

    Attributes:
        num_subspaces: D, groups a vector is split into.
        num_codes: K, choices per group, 2 to 65,536.
        num_levels: L, residual levels; 1 is plain DPQ.
    """

    num_subspaces: int
    num_codes: int
    num_levels: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.num_codes <= MAX_NUM_CODES:
            raise ConfigError(f"num_codes: got {self.num_codes}, want an integer from 2 to {MAX_NUM_CODES}")
        if self.num_subspaces < 1:
            raise ConfigError(f"num_subspaces: got {self.num_subspaces}, want 1 or more")
        if self.num_levels < 1:
            raise ConfigError(f"num_levels: got {self.num_levels}, want 1 or more")

    @property
    def code_bits(self) -> int:
        """Bits of one code: b = max(1, ceil(log2 K))."""
        return max(1, (self.num_codes - 1).bit_length())

    @property
    def codes_per_row(self) -> int:
        """Codes of one row: M = L * D."""
        return self.num_levels * self.num_subspaces

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's packed codes: W = ceil(M * b / 8)."""
        return -(-self.codes_per_row * self.code_bits // 8)

    def table_bytes(self, shape: tuple[int, int], value_bytes: int, *, share_subspaces: bool = False) -> int:
        """Packed codes and values of a table as an artifact holds them.

        Args:
            shape: V and E.
            value_bytes: of one number: 4 in fp32, 2 in fp16.
            share_subspaces: whether the subspaces share their values.
        """
        num_embeddings, embedding_dim = shape
        width = embedding_dim // self.num_subspaces if share_subspaces else embedding_dim
        return num_embeddings * self.row_bytes + value_bytes * self.num_levels * self.num_codes * width


class Tier(NamedTuple):
    """Rows, next to each other in a table sorted by importance, that have a code layout of their own.

    Later tiers have fewer levels. As values are stored level by level, the values of a tier are the first ones of all.

    Attributes:
        first_row: where they begin.
        num_rows: how many there are, possibly none.
        layout: of their codes.
    """

    first_row: int
    num_rows: int
    layout: CodeLayout


def cut_into_tiers(
    layout: CodeLayout, num_embeddings: int, shares: Sequence[tuple[float, int]] = ()
) -> tuple[Tier, ...]:
    """The tiers of a table, in the order of rows; one of all rows where no share is given.

    >>> tiers = cut_into_tiers(CodeLayout(num_subspaces=8, num_codes=256, num_levels=4), 1_000, [(0.1, 2), (0.5, 1)])
    >>> [(tier.first_row, tier.num_rows, tier.layout.row_bytes) for tier in tiers]
    [(0, 100, 32), (100, 400, 16), (500, 500, 8)]

    Args:
        layout: of the first tier.
        num_embeddings: V.
        shares: share and levels, by rising share: rows from round(share * V) on have only so many levels.
    """
    starts = [0, *(round(share * num_embeddings) for share, _ in shares), num_embeddings]
    layouts = [layout, *(replace(layout, num_levels=num_levels) for _, num_levels in shares)]
    ranges = zip(itertools.pairwise(starts), layouts, strict=True)
    return tuple(Tier(first, stop - first, of_tier) for (first, stop), of_tier in ranges)


def pack_codes(codes_NM: NDArray[np.integer], layout: CodeLayout) -> NDArray[np.uint8]:
    """Packed codes [N, W] of codes [N, M] (any integer dtype).

    Raises:
        ValueError: the shape is not [N, M], or a code lies outside [0, K).
    """
    if codes_NM.ndim != 2 or codes_NM.shape[1] != layout.codes_per_row:
        raise ValueError(f"codes: got shape {codes_NM.shape}, want [N, {layout.codes_per_row}]")
    if codes_NM.size and not (int(codes_NM.min()) >= 0 and int(codes_NM.max()) < layout.num_codes):
        raise ValueError(
            f"codes: got values from {codes_NM.min()} to {codes_NM.max()}, want 0 to {layout.num_codes - 1}"
        )
    bits = layout.code_bits
    if bits == 8:
        return codes_NM.astype(np.uint8)
    shifts = np.arange(bits, dtype=np.uint16)
    bits_NMb = (codes_NM.astype(np.uint16)[:, :, None] >> shifts & 1).astype(np.uint8)
    return np.packbits(bits_NMb.reshape(len(codes_NM), layout.codes_per_row * bits), axis=1, bitorder="little")


def unpack_codes(packed_NW: NDArray[np.uint8], layout: CodeLayout) -> NDArray[np.uint16]:
    """Codes [N, M] of packed codes [N, W]. A damaged row's codes may be K or more: see `find_damaged_row`."""
    bits = layout.code_bits
    if bits == 8:
        return packed_NW.astype(np.uint16)
    # A code spans 23 bits at most (16 of them, begun at bit 7): it lies in the 3 bytes from its first.
    first_bit_M = np.arange(layout.codes_per_row) * bits
    padded_NW = np.pad(packed_NW, ((0, 0), (0, 2)))
    window_NM = np.zeros((len(packed_NW), layout.codes_per_row), np.uint32)
    for byte in range(3):
        window_NM |= padded_NW[:, first_bit_M // 8 + byte].astype(np.uint32) << (8 * byte)
    return (window_NM >> (first_bit_M % 8).astype(np.uint32) & ((1 << bits) - 1)).astype(np.uint16)


def find_damaged_row(packed_NW: NDArray[np.uint8], layout: CodeLayout) -> int | None:
    """The first row with a code of K or more, or with a padding bit set; None where all are sound."""
    damaged_N = np.zeros(len(packed_NW), np.bool_)
    if layout.num_codes < 1 << layout.code_bits:
        damaged_N |= (unpack_codes(packed_NW, layout) >= layout.num_codes).any(axis=1)
    padding_bits = layout.row_bytes * 8 - layout.codes_per_row * layout.code_bits
    if padding_bits:
        damaged_N |= (packed_NW[:, -1] >> (8 - padding_bits)) != 0
    return int(damaged_N.argmax()) if damaged_N.any() else None
