import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import Lookup
from service.grpc_api import batch_reply, reply_pieces
from service.proto.dpq.v1 import embedding_pb2 as pb


def found_of(num_rows, dim, missing, dtype=np.float32):
    vectors_NE = np.arange(num_rows * dim, dtype=dtype).reshape(num_rows, dim)
    return Lookup(vectors_NE, np.array(missing, np.uint32))


def message_of(found, dtype=pb.FLOAT32):
    return pb.LookupReply(
        vectors=found.vectors.tobytes(),
        dim=found.vectors.shape[1],
        dtype=dtype,
        missing=found.missing.tolist(),
        version="v",
    )


@given(num_rows=st.integers(0, 70), dim=st.integers(1, 65), missing=st.lists(st.integers(0, 2**32 - 1), max_size=3))
def test_reply_is_what_protobuf_serializes(num_rows, dim, missing):
    found = found_of(num_rows, dim, missing)
    assert b"".join(reply_pieces("v", pb.FLOAT32, found)) == message_of(found).SerializeToString()


@pytest.mark.parametrize("num_rows", [31, 32, 4095, 4096, 524_287, 524_288])  # lengths around 2^7, 2^14 and 2^21
def test_reply_has_a_length_of_as_many_bytes_as_it_needs(num_rows):
    found = found_of(num_rows, 1, [], np.float32)
    assert pb.LookupReply.FromString(b"".join(reply_pieces("v", 0, found))) == message_of(found)


def test_reply_in_half_precision():
    found = found_of(3, 2, [1], np.float16)
    pieces = reply_pieces("v", pb.FLOAT16, found)
    assert pb.LookupReply.FromString(b"".join(pieces)) == message_of(found, pb.FLOAT16)


@given(sizes=st.lists(st.integers(0, 40), max_size=4))
def test_batch_reply_is_what_protobuf_serializes(sizes):
    founds = [found_of(size, 3, [size]) for size in sizes]
    wanted = pb.BatchLookupReply(replies=[message_of(found) for found in founds])
    assert batch_reply([reply_pieces("v", 0, found) for found in founds]) == wanted.SerializeToString()
