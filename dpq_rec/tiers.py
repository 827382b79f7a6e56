"""Rows with fewer levels than others. In: shares of the rows, or what a manifest says. Out: tiers, their packed codes.

Rows are sorted by falling frequency, so that a tier is a range of rows: those of a later one have fewer levels, and so
fewer codes. As values stand level by level, the values of a tier are the first of all.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import DamagedArtifactError
from dpq_rec.tensorfile import Stream

MAX_TIERS = 256  # a tier's number travels in a byte


class Tier(NamedTuple):
    """Rows of a table that have as many levels.

    Attributes:
        first_row: where they begin.
        num_rows: how many they are; maybe none.
        layout: of their codes.
    """

    first_row: int
    num_rows: int
    layout: CodeLayout


class PackedTier(NamedTuple):
    """Rows from first_row on that have as many levels, and their packed codes (uint8, mapped)."""

    first_row: int
    layout: CodeLayout
    packed_VW: NDArray[np.uint8]


def cut_into_tiers(
    layout: CodeLayout, num_embeddings: int, shares: Sequence[tuple[float, int]] = ()
) -> tuple[Tier, ...]:
    """The tiers of a table, in the order of rows; one of all rows where no share is given.

    Args:
        layout: of the first tier.
        num_embeddings: V.
        shares: share and levels, by rising share: rows from round(share * V) on have only so many levels.
    """
    starts = [0, *(round(share * num_embeddings) for share, _ in shares), num_embeddings]
    layouts = [layout, *(replace(layout, num_levels=num_levels) for _, num_levels in shares)]
    ranges = zip(itertools.pairwise(starts), layouts, strict=True)
    return tuple(Tier(first, stop - first, of_tier) for (first, stop), of_tier in ranges)


def as_entries(tiers: Sequence[Tier]) -> tuple[Mapping[str, int], ...]:
    """Tiers as manifest.json holds them."""
    return tuple({"rows": tier.num_rows, "num_levels": tier.layout.num_levels} for tier in tiers)


def of_entries(
    entries: Sequence[Mapping[str, int]], layout: CodeLayout, num_embeddings: int, file: str
) -> tuple[Tier, ...]:
    """Tiers of what manifest.json holds of them; one of all rows of what it holds of a table without.

    Args:
        entries: `rows` and `num_levels` of each.
        layout: of the first tier.
        num_embeddings: V.
        file: of the table, to be named in an error.

    Raises:
        DamagedArtifactError: they are no rows that add up to all, or no levels that fall from the table's own.
    """
    entries = entries or [{"rows": num_embeddings, "num_levels": layout.num_levels}]
    if len(entries) > MAX_TIERS:
        raise DamagedArtifactError(f"{file}: tiers: got {len(entries)}, want at most {MAX_TIERS}")
    rows, levels = [entry["rows"] for entry in entries], [entry["num_levels"] for entry in entries]
    if not all(type(count) is int and count >= 0 for count in (*rows, *levels)):
        raise DamagedArtifactError(f"{file}: tiers: got {reprlib.repr(entries)}, want counts")
    falls = all(before > after > 0 for before, after in itertools.pairwise(levels))
    if sum(rows) != num_embeddings or levels[0] != layout.num_levels or not falls:
        wanted = f"{num_embeddings} rows in all, and levels that fall from {layout.num_levels}"
        raise DamagedArtifactError(f"{file}: tiers: got {reprlib.repr(entries)}, want {wanted}")
    starts = itertools.accumulate(rows, initial=0)
    tiers = zip(starts, rows, levels, strict=False)
    return tuple(Tier(first, num_rows, replace(layout, num_levels=level)) for first, num_rows, level in tiers)


def codes_name(at: int) -> str:
    """The tensor that holds the packed codes of a tier."""
    return f"packed_codes.{at}" if at else "packed_codes"


def packed_streams(tiers: Sequence[Tier], chunks: Iterable[NDArray[Any]]) -> dict[str, Stream]:
    """The packed codes by tensor, to be written in this order: each takes its rows from the same chunks."""
    rest = iter(chunks) if len(tiers) == 1 else (chunk for chunk in chunks if len(chunk))  # of no rows are of no tier
    return {
        codes_name(at): Stream(
            np.uint8,
            (tier.num_rows, tier.layout.row_bytes),
            rest if at == len(tiers) - 1 else _taken(rest, tier.num_rows),  # the last would take too many, too
        )
        for at, tier in enumerate(tiers)
    }


def _taken(chunks: Iterator[NDArray[Any]], num_rows: int) -> Iterator[NDArray[Any]]:
    while num_rows > 0:
        chunk = next(chunks, None)
        if chunk is None:  # too few rows, as whoever counts them will say
            return
        num_rows -= len(chunk)
        yield chunk


def shown_levels(tiers: Sequence[PackedTier]) -> str:
    """Levels, of each tier where there are several: "44, 32, 16"."""
    return ", ".join(str(tier.layout.num_levels) for tier in tiers)


def shown_row_bytes(tiers: Sequence[PackedTier]) -> str:
    """Bytes of a row's codes, of each tier where there are several."""
    return ", ".join(f"{tier.layout.row_bytes:,}" for tier in tiers)


def by_tier(tiers: Sequence[PackedTier], rows_N: NDArray[np.int64]) -> Iterator[tuple[PackedTier, NDArray[np.intp]]]:
    """Each tier that has some of the rows, and the positions [P] of these; negative rows are in none."""
    tier_N = np.searchsorted([tier.first_row for tier in tiers], rows_N, side="right") - 1
    for at, tier in enumerate(tiers):
        (here_P,) = (tier_N == at).nonzero()
        if len(here_P):
            yield tier, here_P
