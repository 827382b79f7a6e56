"""Replies of the gRPC API as bytes. In: a Lookup. Out: the serialized LookupReply, BatchLookupReply.

protobuf's own way copies the vectors into a message, out of it and together; here they are copied once. A message's
fields may be written one behind the other, each as its tag, its length and its content.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dpq_rec import Lookup
from dpq_rec.octets import Octets, bytes_of
from service.proto.dpq.v1 import embedding_pb2 as pb

_FIELD_1 = 1 << 3 | 2  # the tag of a field of bytes, or of a message: LookupReply.vectors, BatchLookupReply.replies
_MOST_KEPT = 256


def reply_pieces(version: str, dtype: int, found: Lookup) -> list[Octets]:
    """A serialized LookupReply, in pieces that are to be joined."""
    vectors = bytes_of(found.vectors)
    dim, missing = found.vectors.shape[1], found.missing.tolist()
    rest = _rest(version, dtype, dim, missing) if missing else _rest_of_all(version, dtype, dim)
    return [_begin(len(vectors)), vectors, rest] if len(vectors) else [rest]


def batch_reply(replies: Sequence[Sequence[Octets]]) -> bytes:
    """A serialized BatchLookupReply of the pieces of its replies."""
    pieces: list[Octets] = []
    for reply in replies:
        pieces += [_begin(sum(map(len, reply))), *reply]
    return b"".join(pieces)


@functools.lru_cache(_MOST_KEPT)
def _rest_of_all(version: str, dtype: int, dim: int) -> bytes:
    """Where none is missing; what is seldom repeats, and would be kept for nothing."""
    return _rest(version, dtype, dim, [])


def _rest(version: str, dtype: int, dim: int, missing: list[int]) -> bytes:
    """The fields behind the vectors."""
    message = pb.LookupReply(dim=dim, dtype=dtype, missing=missing, version=version)  # type: ignore[arg-type] # an enum is an int
    serialized: bytes = message.SerializeToString()
    return serialized


def _begin(num_bytes: int) -> bytes:
    """Tag and length of field 1."""
    varint = bytearray([_FIELD_1])
    while num_bytes > 0x7F:
        varint.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    varint.append(num_bytes)
    return bytes(varint)
