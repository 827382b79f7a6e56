"""What a report shows of a table. In: a table of an opened artifact, ids to look at. Out: TableFacts.

Rows are decoded a block at a time: what is held does not grow with the table.
"""

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
from dpq_rec.table import Table, codes_name
from dpq_rec.tensorfile import PADDING

Id = int | str
Progress = Callable[[int], object]
NUM_NEIGHBOURS = 8
NUM_CHOSEN = 5
CANDIDATES = 100  # first rows among which telling ones are chosen
_BLOCK_NUMBERS = 1 << 22  # fp32 numbers decoded at a time
_DECIMALS = 6  # of a cosine: what a matrix product leaves below them depends on the block a row stands in
_SAMPLE_NUMBERS = 1 << 23  # fp64 numbers of the rows that are decomposed: 64 MiB
_LEAST_ROWS_PER_COLUMN = 2


class CodeHistory(NamedTuple):
    """How the M codes of a row changed in T epochs of training.

    Attributes:
        epochs_T: their numbers (int64).
        changed_TM: share of rows whose code is another than the epoch before (float64; DPQ paper, figure 6); NaN where
            there was none.
        perplexity_TM: of the codes' use (float64).
    """

    epochs_T: NDArray[np.int64]
    changed_TM: NDArray[np.float64]
    perplexity_TM: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A training run that left an artifact.

    Attributes:
        about: what was trained, and how long; as it is shown.
        metrics: on the test split, by name.
        best_epoch: the one whose artifact was kept.
        codes: table -> how its codes changed; tables without codes are not there.
    """

    about: Mapping[str, object]
    metrics: Mapping[str, float]
    best_epoch: int | None
    codes: Mapping[str, CodeHistory]


class CodeUse:
    """How many rows have each code, counts_MK (int64), and what follows: see `dpq_rec.code_use`."""

    def __init__(self, counts_MK: NDArray[np.int64]) -> None:
        self.counts_MK = counts_MK
        self.perplexity_M, self.agreement_M = perplexity(counts_MK), chance_of_agreement(counts_MK)

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


class Spectrum(NamedTuple):
    """What a singular value decomposition of the decoded rows shows.

    Attributes:
        singular_values_R: falling (float64), as many as the smaller of rows and columns.
        num_rows: rows that were decomposed.
        tolerance: singular values above this share of the largest count.
        rank: how many do.
    """

    singular_values_R: NDArray[np.float64]
    num_rows: int
    tolerance: float
    rank: int

    def directions_of(self, share: float) -> int:
        """How many leading directions hold a share of the vectors' squared length."""
        squares_R = np.square(self.singular_values_R)
        return int(np.searchsorted(np.cumsum(squares_R), share * squares_R.sum())) + 1


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
        missing: ids to be shown that are not in the vocabulary.
        are_chosen_by_caller: whether the caller chose which ids are shown.
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


def measure(table: Table, ids: Sequence[Id] = (), progress: Progress = lambda num_rows: None) -> TableFacts:
    """Look at a table.

    Args:
        table: of an opened artifact.
        ids: whose neighbours are shown, of the vocabulary's type; if there are none, telling ones are found.
        progress: called with the number of rows of each block, of each of two passes (one where there are no codes).

    Raises:
        DamagedArtifactError: a row's codes are not what was published.
        IdTypeError: ids of another type than the vocabulary's.
    """
    code_use = CodeUse(count_codes(table, progress)) if table.manifest.has_codes else None
    if ids:
        chosen = list(zip(ids, table.vocabulary.rows(list(ids)).tolist(), strict=True))
    else:  # of the first rows, which training fills with the most frequent ids
        _, rows_N = table.vocabulary.ids_of_rows(0, min(CANDIDATES, table.manifest.num_embeddings))
        rows_N = telling_rows(table, np.unique(rows_N), NUM_CHOSEN)
        chosen = [(an_id, row) for row in rows_N.tolist() for an_id in _ids_of_row(table, row)[:1]]
    found = [(an_id, row) for an_id, row in chosen if row != MISSING_ROW]
    return TableFacts(
        table=table,
        code_use=code_use,
        spectrum=spectrum(table),
        neighbourhoods=_neighbourhoods(table, found, progress),
        missing=[an_id for an_id, row in chosen if row == MISSING_ROW],
        are_chosen_by_caller=bool(ids),
    )


# Neighbours


def _neighbourhoods(table: Table, chosen: Sequence[tuple[Id, int]], progress: Progress) -> list[list[Member]]:
    def member(row: int, cosine: float, an_id: Id | None = None) -> Member:
        ids = _ids_of_row(table, row)
        shown = an_id if an_id is not None else ids[0] if ids else None
        return Member(row, shown, len(ids), cosine, _codes_of_row(table, row))

    nearest = nearest_rows(table, np.array([row for _, row in chosen], np.int64), NUM_NEIGHBOURS, progress)
    return [
        [member(row, 1.0, an_id), *map(member, rows_T.tolist(), cosines_T.tolist())]
        for (an_id, row), (rows_T, cosines_T) in zip(chosen, nearest, strict=True)
    ]


def _ids_of_row(table: Table, row: int) -> list[Id]:
    ids_N, _ = table.vocabulary.ids_of_rows(row, row + 1)
    return list(ids_N.tolist())


def _codes_of_row(table: Table, row: int) -> NDArray[np.uint16] | None:
    for tier, packed_VW, _ in table.by_tier(np.array([row])):
        at = row - tier.first_row
        return np.asarray(unpack_codes(packed_VW[at : at + 1], tier.layout)[0])
    return None


def nearest_rows(
    table: Table, rows_Q: NDArray[np.int64], most: int, progress: Progress = lambda num_rows: None
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The nearest other rows of each row, and their cosines; the lower row comes first where cosines tie.

    The search is exact: every row is decoded, whatever the table's kind. A vector without a direction, because it is
    zero or not finite, has a cosine of 0 with every other.

    Args:
        table: of any kind.
        rows_Q: rows of the table (int64).
        most: how many to find of each; fewer where the table has no more.
        progress: called with the number of rows of each block.

    Returns:
        of each row, rows_T (int64) and cosines_T (float32), which fall.

    Raises:
        DamagedArtifactError: an impossible code.
    """
    num_rows, width = table.manifest.num_embeddings, max(1, _BLOCK_NUMBERS // table.manifest.embedding_dim)
    queries_QE = _directions(table, rows_Q)
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in rows_Q]
    for start in range(0, num_rows, width):
        block_N = np.arange(start, min(start + width, num_rows))
        cosines_QN = np.round(queries_QE @ _directions(table, block_N).T, _DECIMALS)
        for q, (rows_T, cosines_T) in enumerate(best):
            worst = cosines_T[-1] if len(cosines_T) == most else -np.inf
            (better_P,) = ((cosines_QN[q] > worst) & (block_N != rows_Q[q])).nonzero()
            rows_C = np.concatenate([rows_T, block_N[better_P]])
            cosines_C = np.concatenate([cosines_T, cosines_QN[q, better_P]])
            order_T = np.argsort(-cosines_C, kind="stable")[:most]  # stable: rows ascend, and do so where cosines tie
            best[q] = rows_C[order_T], cosines_C[order_T]
        progress(len(block_N))
    return best


def telling_rows(table: Table, candidates_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Some of the candidates, in their order, passing over those nearer to a chosen one than candidates usually are.

    Rows that say the same twice are left out: the median cosine of two candidates is the limit.
    """
    directions_NE = _directions(table, candidates_N)
    cosines_NN = directions_NE @ directions_NE.T
    usual = float(np.median(cosines_NN[np.triu_indices(len(candidates_N), 1)])) if len(candidates_N) > 1 else 0.0
    chosen: list[int] = []
    for n in range(len(candidates_N)):
        if len(chosen) < most and all(cosines_NN[n, other] <= usual for other in chosen):
            chosen.append(n)
    return candidates_N[chosen]


def _directions(table: Table, rows_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Decoded vectors, cut to length 1 (float32 [N, E]); zeros where one is zero or not finite."""
    vectors_NE = table.decode(rows_N)
    with np.errstate(over="ignore", invalid="ignore"):
        squares_N = np.einsum("ne,ne->n", vectors_NE, vectors_NE, dtype=np.float64)
        sound_N = np.isfinite(squares_N) & (squares_N > 0)
        scale_N = 1 / np.sqrt(np.where(sound_N, squares_N, 1))
        return np.where(sound_N[:, None], vectors_NE * scale_N[:, None], 0).astype(np.float32)


# Rank


def spectrum(table: Table) -> Spectrum | None:
    """The spectrum of a table, or of an even sample of its rows where it is large; None where a number is not finite.

    The DPQ paper's theorem 1: a table that is decoded from codes can have full rank, unlike one of low-rank factors.

    The tolerance is E times the precision of fp32: rounding to fp32 leaves noise of no more than that, however many
    rows there are. (numpy's matrix_rank multiplies by the number of rows too, and would call directions noise that
    training put there: at a million rows all below a tenth of the largest.)
    """
    embedding_dim = table.manifest.embedding_dim
    most = max(_SAMPLE_NUMBERS // embedding_dim, _LEAST_ROWS_PER_COLUMN * embedding_dim)
    rows_N = spread_rows(table.manifest.num_embeddings, most)
    vectors_NE = table.decode(rows_N).astype(np.float64)
    if not np.isfinite(vectors_NE).all():
        return None
    singular_values_R: NDArray[np.float64] = np.linalg.svd(vectors_NE, compute_uv=False).astype(np.float64)
    tolerance = embedding_dim * float(np.finfo(np.float32).eps)
    rank = int((singular_values_R > tolerance * singular_values_R.max(initial=0.0)).sum())
    return Spectrum(singular_values_R, len(rows_N), tolerance, rank)


def spread_rows(num_embeddings: int, most: int) -> NDArray[np.int64]:
    """All rows, or `most` of them: one, at random, of each of as many ranges of equal length. The same every time."""
    if num_embeddings <= most:
        return np.arange(num_embeddings)
    starts_N = np.arange(most + 1) * num_embeddings // most
    return np.random.default_rng(0).integers(starts_N[:-1], starts_N[1:])
