"""Rows put together from smaller parts. In: rows of a table, what its parts hold. Out: vectors_NE.

`low-dim` a narrow table and a learned projection: a low-rank factorization that is trained; `hashing` (Weinberger et
al., 2009) a table of fewer rows; `qr` (Shi et al., 2020) the product of a row of quotients and one of remainders;
`tensor-train` (TT-Rec, Yin et al., 2021) tltorch's block TT matrix. Every number is stored in fp16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from dpq_rec import MissingDependencyError
from tests.benchmarks.quality.sizes import FLOAT_BYTES, Shape

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # Knuth's multiplier for 64 bits, as a signed number


class Composition(nn.Module):
    """One table made of parts, which TorchRec looks up, and of parameters of its own.

    Attributes:
        parts: part -> rows and width of its table.
    """

    parts: Mapping[str, Shape]

    def part_rows(self, rows_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """Part -> its row for each of the table's rows."""
        return dict.fromkeys(self.parts, rows_N)

    def start(self, part: str, weight: torch.Tensor) -> None:
        """Fill a part's table, or a shard of it: uniform, so that vectors begin as a plain table's."""
        bound = self.parts[part][1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)

    def forward(self, rows_N: torch.Tensor, looked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [N, E] of rows, given what their parts hold."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LowDim:
    """A table [V, r] and a projection [r, E]."""

    rank: int

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Both in fp16."""
        return FLOAT_BYTES * self.rank * (num_embeddings + embedding_dim)

    def build(self, num_embeddings: int, embedding_dim: int, device: torch.device) -> Composition:
        """The table."""
        return _Projected(num_embeddings, embedding_dim, self.rank, device)


class _Projected(Composition):
    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.parts = {"narrow": (num_embeddings, rank)}
        self.projection_RE = nn.Parameter(torch.empty(rank, embedding_dim, device=device))
        nn.init.orthogonal_(self.projection_RE)  # keeps the length of a row

    def forward(self, rows_N: torch.Tensor, looked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return looked["narrow"] @ self.projection_RE


@dataclasses.dataclass(frozen=True)
class Hashing:
    """A table of fewer rows that several ids share.

    Attributes:
        num_rows: of it.
        hash: "remainder" of the row; as rows are sorted by frequency, the most frequent ids share theirs with rare ones
            only. "mixed": the remainder of the row times a large odd number.
    """

    num_rows: int
    hash: Literal["remainder", "mixed"] = "remainder"

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """The rows in fp16."""
        return FLOAT_BYTES * self.num_rows * embedding_dim

    def build(self, num_embeddings: int, embedding_dim: int, device: torch.device) -> Composition:
        """The table."""
        return _Hashed(self, embedding_dim)


class _Hashed(Composition):
    def __init__(self, size: Hashing, embedding_dim: int) -> None:
        super().__init__()
        self.size, self.parts = size, {"shared": (size.num_rows, embedding_dim)}

    def part_rows(self, rows_N: torch.Tensor) -> dict[str, torch.Tensor]:
        mixed_N = rows_N if self.size.hash == "remainder" else (rows_N * _MIX) >> 32  # low bits mix badly
        return {"shared": mixed_N % self.size.num_rows}

    def forward(self, rows_N: torch.Tensor, looked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return looked["shared"]


@dataclasses.dataclass(frozen=True)
class QuotientRemainder:
    """The elementwise product of row v // m of one table and row v % m of another: each id has a pair of its own.

    Attributes:
        num_remainders: m.
    """

    num_remainders: int

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Both tables in fp16."""
        return FLOAT_BYTES * embedding_dim * (self.num_remainders + -(-num_embeddings // self.num_remainders))

    def build(self, num_embeddings: int, embedding_dim: int, device: torch.device) -> Composition:
        """The table."""
        return _Product(num_embeddings, embedding_dim, self.num_remainders)


class _Product(Composition):
    def __init__(self, num_embeddings: int, embedding_dim: int, num_remainders: int) -> None:
        super().__init__()
        quotients = -(-num_embeddings // num_remainders)
        self.num_remainders = num_remainders
        self.parts = {"quotient": (quotients, embedding_dim), "remainder": (num_remainders, embedding_dim)}

    def part_rows(self, rows_N: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"quotient": rows_N // self.num_remainders, "remainder": rows_N % self.num_remainders}

    def start(self, part: str, weight: torch.Tensor) -> None:
        """Quotients begin around 1: a product of two small numbers would begin with gradients as small."""
        bound, middle = self.parts[part][1] ** -0.5, 1 if part == "quotient" else 0
        nn.init.uniform_(weight, middle - bound, middle + bound)

    def forward(self, rows_N: torch.Tensor, looked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return looked["quotient"] * looked["remainder"]


@dataclasses.dataclass(frozen=True)
class TensorTrain:
    """tltorch's block tensor train: V and E are cut into `order` factors, and a core stands for each pair of them.

    Attributes:
        rank: of all cores.
        order: number of cores.
    """

    rank: int
    order: int = 3

    def row_factors(self, num_embeddings: int) -> tuple[int, ...]:
        """Factors whose product is V or a little more: the rows beyond are never asked for."""
        factors: list[int] = []
        for number in range(self.order, 0, -1):
            rest = -(-num_embeddings // math.prod(factors))
            factors.append(max(1, math.ceil(rest ** (1 / number) - 1e-9)))
        return tuple(factors)

    def column_factors(self, embedding_dim: int) -> tuple[int, ...]:
        """Factors whose product is E, as equal as its divisors allow."""
        factors, rest = [], embedding_dim
        for number in range(self.order, 0, -1):
            wanted = rest ** (1 / number)
            factors.append(min((d for d in range(1, rest + 1) if rest % d == 0), key=lambda d: abs(d - wanted)))
            rest //= factors[-1]
        return tuple(factors)

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """The cores in fp16."""
        ranks = [1, *[self.rank] * (self.order - 1), 1]
        sizes = zip(self.row_factors(num_embeddings), self.column_factors(embedding_dim), strict=True)
        return FLOAT_BYTES * sum(v * e * ranks[n] * ranks[n + 1] for n, (v, e) in enumerate(sizes))

    def build(self, num_embeddings: int, embedding_dim: int, device: torch.device) -> Composition:
        """The table.

        Raises:
            MissingDependencyError: tltorch is not installed.
        """
        return _Train(self, num_embeddings, embedding_dim, device)


class _Train(Composition):
    def __init__(self, size: TensorTrain, num_embeddings: int, embedding_dim: int, device: torch.device) -> None:
        super().__init__()
        try:
            import tltorch
        except ModuleNotFoundError as error:
            raise MissingDependencyError("tltorch, of whose tensor trains a table is made,", "dev") from error
        self.parts = {}
        shape = (size.row_factors(num_embeddings), size.column_factors(embedding_dim))
        ranks = (1, *[size.rank] * (size.order - 1), 1)
        self.matrix: Any = tltorch.TensorizedTensor.new(shape, rank=ranks, factorization="blocktt", device=device)
        # Numbers as large as a plain table's; tltorch's own start, 1/sqrt(3V), is for sums of many.
        tltorch.tensor_init(self.matrix, std=(3 * embedding_dim) ** -0.5)

    def forward(self, rows_N: torch.Tensor, looked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not len(rows_N):
            return rows_N.new_zeros((0, self.matrix.shape[1]), dtype=torch.float32)
        return self.matrix[rows_N.tolist(), :].view(len(rows_N), -1)
