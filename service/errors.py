"""What can be wrong with a request, apart from what `dpq_rec.errors` names already.

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

`error_type` is the name a caller sees; `http_api` and `grpc_api` hold the status codes.
"""

from __future__ import annotations

from typing import ClassVar


class RequestError(Exception):
    """Every request that is refused on purpose."""

    error_type: ClassVar[str]


class MalformedError(RequestError):
    """Bytes that are no JSON, or no whole number of ids, or do not arrive."""

    error_type = "malformed"


class UnauthorizedError(RequestError):
    """No API key, or a wrong one."""

    error_type = "unauthorized"


class NotAcceptableError(RequestError):
    """A reply type that is not offered."""

    error_type = "not_acceptable"


class UnsupportedMediaTypeError(RequestError):
    """A body type that is not read."""

    error_type = "unsupported_media_type"


class TooManyBytesError(RequestError):
    """A body over the limit."""

    error_type = "too_many_bytes"


class TooManyIdsError(RequestError):
    """A request over the limit."""

    error_type = "too_many_ids"


class InvalidRequestError(RequestError):
    """Well-formed, but of the wrong types or in contradiction with itself."""

    error_type = "invalid_request"


class OverloadedError(RequestError):
    """As many requests as allowed are being answered."""

    error_type = "overloaded"


class NotReadyError(RequestError):
    """Not started yet, about to stop, or a table's file was damaged while it was served."""

    error_type = "not_ready"
