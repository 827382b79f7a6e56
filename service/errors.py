"""What can be wrong with a request, apart from what `dpq_rec.errors` names already; and what each API says of it.

RequestError
├── MalformedError              bytes that are no JSON, or no whole number of ids, or do not arrive
├── UnauthorizedError           no API key, or a wrong one
├── NotAcceptableError          a reply type that is not offered
├── UnsupportedMediaTypeError   a body type that is not read
├── TooManyBytesError           a body over the limit
├── TooManyIdsError             a request over the limit
├── InvalidRequestError         well-formed, but of the wrong types or in contradiction with itself
├── OverloadedError             as many requests as allowed are being answered
└── NotReadyError               not started yet, about to stop, or a table's file was damaged
"""

from __future__ import annotations

from typing import NamedTuple

from dpq_rec import IdTypeError, UnknownIdsError, UnknownTableError


class RequestError(Exception):
    """Every request that is refused on purpose."""


class MalformedError(RequestError):
    """Bytes that are no JSON, or no whole number of ids, or do not arrive."""


class UnauthorizedError(RequestError):
    """No API key, or a wrong one."""


class NotAcceptableError(RequestError):
    """A reply type that is not offered."""


class UnsupportedMediaTypeError(RequestError):
    """A body type that is not read."""


class TooManyBytesError(RequestError):
    """A body over the limit."""


class TooManyIdsError(RequestError):
    """A request over the limit."""


class InvalidRequestError(RequestError):
    """Well-formed, but of the wrong types or in contradiction with itself."""


class OverloadedError(RequestError):
    """As many requests as allowed are being answered."""


class NotReadyError(RequestError):
    """Not started yet, about to stop, or a table's file was damaged while it was served."""


class ErrorCodes(NamedTuple):
    """What a caller is told of an error, beside its text.

    Attributes:
        http: the status.
        grpc: the name of a `grpc.StatusCode`; grpc itself must not be imported before the workers are forked.
        error_type: the name that stays the same, to tell errors apart.
    """

    http: int
    grpc: str
    error_type: str


ERROR_CODES: dict[type[Exception], ErrorCodes] = {
    MalformedError: ErrorCodes(400, "INVALID_ARGUMENT", "malformed"),
    UnauthorizedError: ErrorCodes(401, "UNAUTHENTICATED", "unauthorized"),
    UnknownTableError: ErrorCodes(404, "NOT_FOUND", "unknown_table"),
    UnknownIdsError: ErrorCodes(404, "NOT_FOUND", "unknown_ids"),
    NotAcceptableError: ErrorCodes(406, "INVALID_ARGUMENT", "not_acceptable"),
    TooManyBytesError: ErrorCodes(413, "RESOURCE_EXHAUSTED", "too_many_bytes"),
    TooManyIdsError: ErrorCodes(413, "RESOURCE_EXHAUSTED", "too_many_ids"),
    UnsupportedMediaTypeError: ErrorCodes(415, "INVALID_ARGUMENT", "unsupported_media_type"),
    InvalidRequestError: ErrorCodes(422, "INVALID_ARGUMENT", "invalid_request"),
    IdTypeError: ErrorCodes(422, "INVALID_ARGUMENT", "wrong_id_type"),
    OverloadedError: ErrorCodes(429, "RESOURCE_EXHAUSTED", "overloaded"),
    NotReadyError: ErrorCodes(503, "UNAVAILABLE", "not_ready"),
}
INTERNAL = ErrorCodes(500, "INTERNAL", "internal")  # of what nobody expected
