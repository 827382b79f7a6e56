"""`DPQConfig`: the options of a quantized table and of its training, checked once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dpq_rec.codes import MAX_TIERS, CodeLayout, Tier, cut_into_tiers
from dpq_rec.errors import ConfigError

Metric = Literal["dot", "euclidean", "cosine"]
ValuesDtype = Literal["float32", "float16"]

_LEAST_TEMPERATURE = 1e-6  # scores are divided by it in fp32
_CHOICES = {"method": ("sx", "vq"), "metric": (None, *get_args(Metric)), "values_dtype": get_args(ValuesDtype)}
_ONLY_SX = {
    "tie_keys": "the keys of 'vq' are its values always",
    "key_dim": "the keys of 'vq' are its values, and so as wide",
    "temperature": "'vq' has no softmax",
    "hard_values": "'vq' has no softmax",
}
_ONLY_VQ = {
    "penalty_weight": "'sx' has no codebook loss",
    "commitment_weight": "'sx' moves queries by the softmax alone",
    "ema_decay": "'sx' moves values by the gradient of the softmax",
    "value_gradient": "'sx' moves values by the task's gradient always",
}


@dataclass(frozen=True, kw_only=True)
class DPQConfig:
    """How a table is quantized and how that is trained.

    Attributes:
        method: "sx" makes the choice of a code differentiable by a softmax; "vq" takes the nearest key, emits it, and
            passes the gradient straight through: keys are the values.
        num_subspaces: D, groups a vector is split into; must divide every table's embedding_dim.
        num_codes: K, choices per group, 2 to 65,536.
        num_levels: L, residual levels: level l encodes what the levels before it left over; 1 is plain DPQ.
        tiers: share of the rows and levels, such as (0.05, 32), (0.2, 16): rows from that share of the table on have
            the first so many levels only. Rows have to be sorted by falling frequency, as training sorts them: the
            rare ones at the end then take fewer bytes.
        metric: what "sx" compares queries and keys by: "dot" (unless given), "euclidean" (minus the squared distance)
            or "cosine". "vq" is Euclidean.
        tie_keys: "sx" only: keys are the values, as in "vq" (DPQ paper, table 12).
        key_dim: "sx" only: width of a key, where keys are not as wide as values; a query is then D * key_dim wide.
        share_subspaces: the D groups share keys and values (DPQ paper, appendix E.2).
        temperature: "sx" only: divides the scores before the softmax of the backward pass (DPQ paper, eq. 4).
        hard_values: "sx" only: a value is moved by the groups that chose it alone, as in the authors' program; else by
            all groups, in proportion to its share of their softmax (DPQ paper, eq. 5).
        batch_norm: normalise the scores of each code over batch and subspaces, without scale and offset of its own
            (DPQ paper, appendix C). Spreads rows over the codes.
        penalty_weight: "vq" only: weight of the codebook loss, which draws each value to the queries it stands for.
        commitment_weight: "vq" only: weight of the term that draws each query to its value (van den Oord et al., 2017).
        ema_decay: "vq" only: values are running means of the queries they stand for, with this decay per batch, instead
            of being drawn there by the codebook loss (Kaiser et al., 2018).
        value_gradient: "vq" only: values are moved by the task's gradient too, not by the codebook loss alone.
        revive_after: reset a code that was unused for this many batches to a random query (dead-code revival).
        values_dtype: how values are stored; "float16" halves their bytes. Training rounds them the same way.
        quantize_small: quantize tables of so few rows, too, that codes and values take as many bytes as their vectors,
            or more. Else they stay plain, which is said; but a DPQEmbedding that is built by itself always quantizes.
    """

    method: Literal["sx", "vq"] = "sx"
    num_subspaces: int = 16
    num_codes: int = 32
    num_levels: int = 1
    tiers: tuple[tuple[float, int], ...] = ()
    metric: Metric | None = None
    tie_keys: bool = False
    key_dim: int | None = None
    share_subspaces: bool = False
    temperature: float = 1.0
    hard_values: bool = False
    batch_norm: bool = True
    penalty_weight: float = 1.0
    commitment_weight: float = 0.0
    ema_decay: float | None = None
    value_gradient: bool = False
    revive_after: int | None = None
    values_dtype: ValuesDtype = "float32"
    quantize_small: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, want one of {wanted}")
        for name in ("num_subspaces", "num_codes", "num_levels", "key_dim", "revive_after"):
            if not (type(getattr(self, name)) is int or getattr(self, name) is None):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, want an integer")
        for name in ("temperature", "penalty_weight", "commitment_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}: got {getattr(self, name)}, want a finite number")
        _ = self.layout  # checks num_subspaces, num_codes and num_levels
        self._check_tiers()
        for name, reason in (_ONLY_VQ if self.method == "sx" else _ONLY_SX).items():
            self._refuse(name, f"method {self.method!r}", reason)
        if self.method == "vq" and self.metric not in (None, "euclidean"):
            raise ConfigError(f"metric: got {self.metric!r} with method 'vq', which emits the nearest key: 'euclidean'")
        self._check_keys()
        self._check_values()
        if not self.temperature >= _LEAST_TEMPERATURE:
            raise ConfigError(f"temperature: got {self.temperature}, want {_LEAST_TEMPERATURE} or more")
        if self.revive_after is not None and self.revive_after < 1:
            raise ConfigError(f"revive_after: got {self.revive_after}, want 1 batch or more")

    def _check_tiers(self) -> None:
        before_share, before_levels = 0.0, self.num_levels
        for share, num_levels in self.tiers:
            if not before_share < share < 1:
                wanted = "shares of the rows between 0 and 1, each larger than the one before"
                raise ConfigError(f"tiers: got {self.tiers}, want {wanted}")
            if type(num_levels) is not int or not 1 <= num_levels < before_levels:
                wanted = f"whole numbers of levels, from below num_levels {self.num_levels} down to 1, each smaller"
                raise ConfigError(f"tiers: got {self.tiers}, want {wanted}")
            before_share, before_levels = share, num_levels
        if len(self.tiers) >= MAX_TIERS:  # rows before the first share are a tier, too
            raise ConfigError(f"tiers: got {len(self.tiers)}, want at most {MAX_TIERS - 1}")

    def _check_keys(self) -> None:
        if self.key_dim is None:
            return
        if self.key_dim < 1:
            raise ConfigError(f"key_dim: got {self.key_dim}, want 1 or more")
        if self.tie_keys:
            self._refuse("key_dim", "tie_keys", "tied keys are as wide as values")
        if self.num_levels > 1:
            self._refuse("key_dim", f"num_levels {self.num_levels}", "a level encodes query minus value: equal widths")

    def _check_values(self) -> None:
        if self.commitment_weight < 0:
            raise ConfigError(f"commitment_weight: got {self.commitment_weight}, want 0 or more")
        if self.ema_decay is not None:
            if not 0 < self.ema_decay < 1:
                raise ConfigError(f"ema_decay: got {self.ema_decay}, want between 0 and 1, such as 0.99")
            self._refuse(
                "penalty_weight", "ema_decay", "values are means of their queries, the codebook loss would do it again"
            )
            self._refuse("value_gradient", "ema_decay", "values are means of their queries, no gradient moves them")
        elif self.penalty_weight < 0 or (self.penalty_weight == 0 and not self.value_gradient):
            raise ConfigError(
                f"penalty_weight: got {self.penalty_weight}, want more than 0 (or 0 with value_gradient): "
                "nothing else moves the values"
            )

    def _refuse(self, name: str, beside: str, reason: str) -> None:
        """Refuse a setting, unless it is left at its default, that does not apply beside another one."""
        default: Any = next(field.default for field in fields(self) if field.name == name)
        if getattr(self, name) != default:
            raise ConfigError(f"{name}: got {getattr(self, name)!r} with {beside}: {reason}; leave it out")

    @property
    def layout(self) -> CodeLayout:
        """How the codes of a row are laid out; of a row of the first tier, where there are tiers."""
        return CodeLayout(num_subspaces=self.num_subspaces, num_codes=self.num_codes, num_levels=self.num_levels)

    def tiers_of(self, num_embeddings: int) -> tuple[Tier, ...]:
        """The tiers of a table of V rows, with the layout of each one's codes; one of all rows without `tiers`."""
        return cut_into_tiers(self.layout, num_embeddings, self.tiers)

    def artifact_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Packed codes and values of a table of V rows of E numbers, as an artifact holds them."""
        tiers = self.tiers_of(num_embeddings)
        no_rows, value_bytes = (0, embedding_dim), 2 if self.values_dtype == "float16" else 4
        values = self.layout.table_bytes(no_rows, value_bytes, share_subspaces=self.share_subspaces)
        return values + sum(tier.num_rows * tier.layout.row_bytes for tier in tiers)

    def why_plain(self, num_embeddings: int, embedding_dim: int) -> str | None:
        """Why a table of V rows of E numbers stays plain; None where it is to be quantized."""
        full, small = 4 * num_embeddings * embedding_dim, self.artifact_bytes(num_embeddings, embedding_dim)
        if self.quantize_small or small < full:
            return None
        return f"its codes and values would take {small:,} bytes, its {num_embeddings:,} rows take {full:,}"

    @property
    def resolved_metric(self) -> Metric:
        """The metric, where none was given the method's own."""
        return self.metric or ("dot" if self.method == "sx" else "euclidean")

    @property
    def keys_are_values(self) -> bool:
        """Whether a query is compared with the values themselves."""
        return self.method == "vq" or self.tie_keys

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

    def query_dim(self, embedding_dim: int) -> int:
        """Width of a row's query: E, or D * key_dim where keys have a width of their own.

        Raises:
            ConfigError: as `subspace_dim`; or cosine of one number, which knows two directions only.
        """
        key_dim = self.subspace_dim(embedding_dim) if self.key_dim is None else self.key_dim
        if self.resolved_metric == "cosine" and key_dim == 1:
            raise ConfigError("metric: got 'cosine' with keys of width 1, which have only two directions; want 'dot'")
        return self.num_subspaces * key_dim


def drop_inapplicable(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a `DPQConfig`, with those at their defaults that do not apply to its method, or beside what was given.

    For recipes that begin with options of their own: whoever changes the method, or takes running means, need not know
    which of those to undo. What was given itself stays, so that `DPQConfig` refuses it with the reason.

    Args:
        options: by name, the method among them.
        given: those that a user set.
    """
    inapplicable = set(_ONLY_VQ if options.get("method") == "sx" else _ONLY_SX)
    if given.get("ema_decay") is not None:
        inapplicable |= {"penalty_weight", "value_gradient"}
    defaults = {field.name: field.default for field in fields(DPQConfig)}
    return {**options, **{name: defaults[name] for name in sorted(inapplicable - set(given))}}
