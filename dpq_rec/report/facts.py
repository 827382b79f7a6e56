"""What a report shows of a table. In: a table of an opened artifact, ids to look at. Out: TableFacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.code_use import chance_of_agreement, count_codes, perplexity
from dpq_rec.codes import unpack_codes
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.report.names import Id
from dpq_rec.report.neighbours import nearest_rows, telling_rows
from dpq_rec.report.spectrum import Spectrum, spectrum
from dpq_rec.table import Table, codes_name
from dpq_rec.tensorfile import PADDING

NUM_NEIGHBOURS = 8
_NUM_CHOSEN = 5
CANDIDATES = 100  # first rows among which telling ones are chosen


class CodeUse(NamedTuple):
    """How many rows have each code, counts_MK (int64), and what follows: see `dpq_rec.code_use`."""

    counts_MK: NDArray[np.int64]
    perplexity_M: NDArray[np.float64]
    agreement_M: NDArray[np.float64]

    def most_rank(self, embedding_dim: int) -> int:
        """The rank that the codes in use allow.

        A decoded row is a row of one-hot codes times the values. The one-hot codes of each of the M groups add up to 1,
        so that together they have a rank of 1 + the sum over groups of (used codes - 1) at most: a little less than
        the K * D that theorem 1 of the DPQ paper counts. With tiers they add up to 1 in rows that have the level: the 1
        is there once for each number of rows that have one.
        """
        used_M = (self.counts_MK > 0).sum(1)
        num_sums = len(np.unique(self.counts_MK.sum(1)[used_M > 0]))
        return int(min(embedding_dim, num_sums + np.maximum(used_M - 1, 0).sum()))


class Member(NamedTuple):
    """A row that is shown.

    Attributes:
        row: its position in the table.
        id: of it; None where no id lives in the row.
        num_ids: ids that live in the row.
        cosine: with the chosen row.
        codes_M: its codes (uint16); None in a dense table.
    """

    row: int
    id: Id | None
    num_ids: int
    cosine: float
    codes_M: NDArray[np.uint16] | None


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """All that is shown of a table.

    Attributes:
        table: the table.
        code_use: None in a dense table.
        spectrum: None where a number is not finite.
        neighbourhoods: chosen rows, each followed by the rows nearest to it.
        missing: ids that were asked for and are not in the vocabulary.
        are_chosen_by_caller: whether ids were asked for.
    """

    table: Table
    code_use: CodeUse | None
    spectrum: Spectrum | None
    neighbourhoods: Sequence[Sequence[Member]]
    missing: Sequence[Id]
    are_chosen_by_caller: bool

    @cached_property
    def byte_parts(self) -> Mapping[str, int]:
        """What the table's file holds, and how many bytes each takes: they add up to the file."""
        tensors, vocabulary = self.table.tensors, self.table.vocabulary.tensors()
        parts = {"packed codes": self.table.packed_bytes}
        parts |= {name: tensors[name].nbytes for name in ("values", "vectors") if name in tensors}
        parts["vocabulary"] = self.table.vocabulary_bytes
        packed = {codes_name(at) for at in range(len(self.table.tiers))}
        known = {*packed, "values", "vectors", *vocabulary, PADDING, "values_fp32"}  # values_fp32: in memory alone
        parts["other tensors"] = sum(tensor.nbytes for name, tensor in tensors.items() if name not in known)
        parts["header, padding"] = self.table.manifest.bytes - sum(parts.values())
        return {what: num_bytes for what, num_bytes in parts.items() if num_bytes}

    @property
    def shown_ids(self) -> set[Id]:
        """Ids whose titles are of use."""
        return {member.id for members in self.neighbourhoods for member in members if member.id is not None}


def num_steps(table: Table) -> int:
    """How many rows `measure` tells its progress, in all."""
    return table.manifest.num_embeddings * (2 if table.manifest.has_codes else 1)


def measure(
    table: Table, ids: Sequence[Id] = (), progress: Callable[[int], object] = lambda num_rows: None
) -> TableFacts:
    """Look at a table; what is held does not grow with its rows.

    Args:
        table: of an opened artifact.
        ids: whose neighbours are shown, of the vocabulary's type; if there are none, telling ones are found.
        progress: called with the number of rows of each block, of each of two passes (one where there are no codes).

    Raises:
        DamagedArtifactError: a row's codes are not what was published.
        IdTypeError: ids of another type than the vocabulary's.
    """
    code_use = None
    if table.manifest.has_codes:
        counts_MK = count_codes(table, progress)
        code_use = CodeUse(counts_MK, perplexity(counts_MK), chance_of_agreement(counts_MK))
    chosen = list(zip(ids, table.vocabulary.rows(list(ids)).tolist(), strict=True)) if ids else _telling(table)
    found = [(an_id, row) for an_id, row in chosen if row != MISSING_ROW]
    return TableFacts(
        table=table,
        code_use=code_use,
        spectrum=spectrum(table),
        neighbourhoods=_neighbourhoods(table, found, progress),
        missing=[an_id for an_id, row in chosen if row == MISSING_ROW],
        are_chosen_by_caller=bool(ids),
    )


def _telling(table: Table) -> list[tuple[Id, int]]:
    """Ids of a few of the first rows, which training fills with the most frequent ids, and their rows."""
    first = table.vocabulary.ids_of_rows(0, min(CANDIDATES, table.manifest.num_embeddings))
    rows_N = telling_rows(table, np.unique(first.rows_N), _NUM_CHOSEN)
    return [(an_id, row) for row in rows_N.tolist() for an_id in _ids_of_row(table, row)[:1]]


def _ids_of_row(table: Table, row: int) -> list[Id]:
    return list(table.vocabulary.ids_of_rows(row, row + 1).ids_N.tolist())


def _neighbourhoods(
    table: Table, chosen: Sequence[tuple[Id, int]], progress: Callable[[int], object]
) -> list[list[Member]]:
    rows_Q = np.array([row for _, row in chosen], np.int64)
    nearest = nearest_rows(table, rows_Q, NUM_NEIGHBOURS, progress)
    ids_of_row = {row: _ids_of_row(table, row) for row in {*rows_Q.tolist(), *nearest.rows_QT.ravel().tolist()}}

    def member(row: int, cosine: float, an_id: Id | None = None) -> Member:
        ids = ids_of_row[row]
        shown = an_id if an_id is not None else ids[0] if ids else None
        return Member(row, shown, len(ids), cosine, _codes_of_row(table, row))

    return [
        [member(row, 1.0, an_id), *map(member, rows_T.tolist(), cosines_T.tolist())]
        for (an_id, row), rows_T, cosines_T in zip(chosen, *nearest, strict=True)
    ]


def _codes_of_row(table: Table, row: int) -> NDArray[np.uint16] | None:
    if not table.manifest.has_codes:
        return None
    tier, packed_VW, _ = next(table.by_tier(np.array([row])))
    at = row - tier.first_row
    return np.asarray(unpack_codes(packed_VW[at : at + 1], tier.layout)[0])
