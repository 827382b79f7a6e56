"""The API key. In: the headers of a request, or the metadata of a call. Out: nothing, or an UnauthorizedError."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from service.errors import UnauthorizedError

_KEY_NAMES = (b"authorization", b"x-api-key")


def check_key(pairs: Iterable[tuple[bytes, bytes]], wanted: bytes, how_to_send: str) -> None:
    """See that a request has the key, and no other: which of several counts would be a matter of taste.

    Args:
        pairs: names, in lower case, and values.
        wanted: the server's key.
        how_to_send: for the caller who sent none.

    Raises:
        UnauthorizedError: it has not.
    """
    given = {(name, value) for name, value in pairs if name in _KEY_NAMES}
    keys = set()
    for name, value in given:
        scheme, _, bearer = value.partition(b" ")
        if name == b"x-api-key":
            keys.add(value)
        elif scheme.lower() == b"bearer":
            keys.add(bearer.strip(b" "))
    if not any(keys):
        raise UnauthorizedError(f"got no API key; {how_to_send}")
    if len(keys) > 1 or len(given) > len({name for name, _ in given}):
        raise UnauthorizedError("got several API keys, which differ; send one")
    if not hmac.compare_digest(keys.pop(), wanted):
        raise UnauthorizedError("got an API key that is not this server's")
