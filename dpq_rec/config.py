"""What can be chosen about a DPQ table. Checked once, here; inside, values are trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DPQConfig:
    """How a table is quantized and how that is trained.

    Attributes:
        method: "sx" makes the choice of a code differentiable by a softmax (dot product, keys and values apart); "vq"
            takes the nearest key, emits it, and passes the gradient straight through (Euclidean, keys are the values).
        num_subspaces: D, groups a vector is split into; must divide every table's embedding_dim.
        num_codes: K, choices per group, 2 to 65,536.
        batch_norm: normalise the scores of each code over batch and subspaces, without scale and offset of its own
            (DPQ paper, appendix C). Spreads rows over the codes.
        penalty_weight: "vq" only: weight of the term that draws each value to the queries it stands for.
    """

    method: Literal["sx", "vq"] = "sx"
    num_subspaces: int = 16
    num_codes: int = 32
    batch_norm: bool = True
    penalty_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("sx", "vq"):
            raise ConfigError(f"method: got {self.method!r}, want 'sx' or 'vq'")
        if self.penalty_weight <= 0:
            raise ConfigError(f"penalty_weight: got {self.penalty_weight}, want more than 0: values move by it alone")
        _ = self.layout  # checks num_subspaces and num_codes

    @property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes)

    def subspace_dim(self, embedding_dim: int) -> int:
        """S = E / D.

        Raises:
            ConfigError: D does not divide E.
        """
        if embedding_dim % self.num_subspaces:
            divisors = [d for d in range(1, embedding_dim + 1) if embedding_dim % d == 0]
            raise ConfigError(
                f"num_subspaces: got {self.num_subspaces}, want a divisor of embedding_dim {embedding_dim}: {divisors}"
            )
        return embedding_dim // self.num_subspaces
