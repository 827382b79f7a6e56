"""The exceptions of dpq_rec, which a caller can tell apart.

DpqRecError
├── ConfigError (ValueError)            a setting, or a combination of settings, that makes no sense
├── ArtifactError                       a path that holds no artifact, or one this version cannot read
│   └── DamagedArtifactError            bytes that are not what was published
├── UnknownTableError (LookupError)     a table the artifact does not have
├── UnknownIdsError (LookupError)       ids outside the vocabulary, where the caller wanted an error
├── IdTypeError (TypeError)             ids of another type than the vocabulary's
├── ServerError                         a request that a server refused, or a reply that is none of its
└── MissingDependencyError (ImportError)  an optional dependency that is not installed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MOST_SHOWN = 40  # characters of an id


class DpqRecError(Exception):
    """Every error that dpq_rec raises on purpose."""


class ConfigError(DpqRecError, ValueError):
    """A setting, or a combination of settings, that makes no sense."""


class ArtifactError(DpqRecError):
    """A path that holds no artifact, or an artifact that this version cannot read."""


class DamagedArtifactError(ArtifactError):
    """Bytes that are not what was published."""


class UnknownTableError(DpqRecError, LookupError):
    """A table that the artifact does not have."""

    def __init__(self, table: str, known: Iterable[str]) -> None:
        super().__init__(f"table {table!r} is not in this artifact; it has: {', '.join(sorted(known))}")
        self.table = table


class UnknownIdsError(DpqRecError, LookupError):
    """Ids outside the vocabulary; `positions` says where they stand in the request."""

    def __init__(self, table: str, ids: Sequence[object], positions: Sequence[int]) -> None:
        shown = ", ".join(map(_shown, ids[:5])) + (", ..." if len(ids) > 5 else "")
        super().__init__(
            f"{len(ids)} id(s) are not in the vocabulary of table {table!r}: {shown}; "
            "ask for missing='zeros' to get zero vectors and their positions instead"
        )
        self.table = table
        self.positions = list(positions)


def _shown(wrong_id: object) -> str:
    """An id in a message: a string in quotes, escaped, and cut, for a header of a reply may have to hold it."""
    text = repr(str(wrong_id)) if isinstance(wrong_id, str) else str(wrong_id)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


class IdTypeError(DpqRecError, TypeError):
    """Ids of another type than the vocabulary's."""


class ServerError(DpqRecError):
    """A request that a server refused, with the reply's `status` and `error_type`; or, with status 0, a wrong reply."""

    def __init__(self, status: int, error_type: str, text: str) -> None:
        super().__init__(f"{status} {error_type}: {text}")
        self.status, self.error_type = status, error_type


class MissingDependencyError(DpqRecError, ImportError):
    """An optional dependency that is not installed; the message holds the command that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; install it: pip install 'dpq-rec[{extra}]'")
