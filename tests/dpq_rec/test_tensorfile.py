import gc
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load, save

from dpq_rec import DamagedArtifactError
from dpq_rec.tensorfile import ALIGNMENT, MAX_HEADER_BYTES, PADDING, Stream, map_tensors, write_tensors

DTYPES = [np.int64, np.float32, np.uint32, np.float16, np.uint16, np.uint8]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7))
)
named_arrays = st.dictionaries(st.text("abcdefg", min_size=1, max_size=5), arrays, min_size=1, max_size=4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.safetensors"


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory):
    """For properties: hypothesis runs many examples in one test."""
    return tmp_path_factory.mktemp("tensors") / "t.safetensors"


def header_of(path):
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + header_bytes]), 8 + header_bytes


def file_of(header, data=b"", header_bytes=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@given(named_arrays)
def test_write_tensors_writes_what_the_safetensors_library_reads(shared_path, tensors):
    write_tensors(shared_path, tensors)
    found = load(shared_path.read_bytes())
    found.pop(PADDING, None)
    assert_same(found, tensors)


@given(named_arrays)
def test_map_tensors_reads_what_the_safetensors_library_writes(shared_path, tensors):
    shared_path.write_bytes(save(tensors, metadata={"written_by": "safetensors"}))
    assert_same(map_tensors(shared_path), tensors)


@given(named_arrays)
def test_map_tensors_reads_what_write_tensors_writes(shared_path, tensors):
    write_tensors(shared_path, tensors)
    found = map_tensors(shared_path)
    found.pop(PADDING, None)
    assert_same(found, tensors)


@given(st.integers(0, 50), st.integers(0, 9), st.integers(1, 30), st.sampled_from([np.float32, np.float16]))
def test_write_tensors_begins_packed_codes_at_a_multiple_of_64(shared_path, num_ids, num_values, row_bytes, dtype):
    tensors = {
        "packed_codes": np.ones((5, row_bytes), np.uint8),
        "rows": np.zeros(num_ids, np.uint32),
        "values": np.zeros((num_values, 3), dtype),
        "ids": np.zeros(num_ids, np.int64),
    }
    write_tensors(shared_path, tensors)
    header, data_start = header_of(shared_path)
    assert (data_start + header["packed_codes"]["data_offsets"][0]) % ALIGNMENT == 0


@given(named_arrays)
def test_write_tensors_aligns_every_tensor_to_its_own_type(shared_path, tensors):
    write_tensors(shared_path, tensors)
    header, data_start = header_of(shared_path)
    for name, array in tensors.items():
        assert (data_start + header[name]["data_offsets"][0]) % array.itemsize == 0


def test_write_tensors_returns_size_and_digest_of_the_file(path):
    written = write_tensors(path, {"a": np.arange(100)})
    assert written == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_write_tensors_joins_the_chunks_of_a_stream(path):
    chunks = [np.full((2, 3), 1, np.uint8), np.full((0, 3), 9, np.uint8), np.full((1, 3), 2, np.uint8)]
    write_tensors(path, {"a": Stream(np.uint8, (3, 3), iter(chunks))})
    assert map_tensors(path)["a"].tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 2]]


def test_write_tensors_writes_little_endian_what_comes_big_endian(path):
    write_tensors(path, {"a": np.array([1, 2], ">i8")})
    assert load(path.read_bytes())["a"].tolist() == [1, 2]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_write_tensors_rejects_chunks_that_do_not_add_up(path, num_rows):
    with pytest.raises(ValueError, match=f"got {num_rows} rows, want 2"):
        write_tensors(path, {"a": Stream(np.uint8, (2, 4), [np.zeros((num_rows, 4), np.uint8)])})


@pytest.mark.parametrize("chunk", [np.zeros((2, 5), np.uint8), np.zeros((2, 4), np.uint16), np.zeros(8, np.uint8)])
def test_write_tensors_rejects_a_chunk_of_another_type_or_width(path, chunk):
    with pytest.raises(ValueError, match="got a chunk"):
        write_tensors(path, {"a": Stream(np.uint8, (2, 4), [chunk])})


def test_map_tensors_gives_arrays_that_cannot_be_written_to(path):
    write_tensors(path, {"a": np.zeros(3, np.uint8)})
    with pytest.raises(ValueError, match="read-only"):
        map_tensors(path)["a"][0] = 1


def entry(begin=0, end=4, dtype="U8", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DATA = b"abcd"
TWICE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
HOSTILE = {
    "nothing": b"",
    "shorter than a length": b"\x01\x00\x00",
    "a length and nothing else": (10).to_bytes(8, "little"),
    "a header beyond the file": file_of({"a": entry()}, DATA, header_bytes=500),
    "a header of 2**64-1 bytes": file_of({"a": entry()}, DATA, header_bytes=2**64 - 1),
    "a header beyond the format's limit": file_of({"a": entry()}, DATA, header_bytes=MAX_HEADER_BYTES + 1),
    "no JSON": file_of(b"hello", DATA),
    "an empty header": file_of(b"", DATA),
    "bytes that are no text": file_of(b"\xff\xfe\xfa\x80", DATA),
    "a list": file_of([entry()], DATA),
    "a number": file_of(7, DATA),
    "null": file_of(None, DATA),
    "lists in lists in lists": file_of(b"[" * 200_000 + b"]" * 200_000, DATA),
    "objects in objects in objects": file_of(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, DATA),
    "an integer of 5,000 digits": file_of(b'{"a":' + b"9" * 5_000 + b"}", DATA),
    "an entry that is no object": file_of({"a": 3}, DATA),
    "an entry that is a list": file_of({"a": [1, 2]}, DATA),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}, DATA),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, DATA),
    "no offsets": file_of({"a": {"dtype": "U8", "shape": [4]}}, DATA),
    "an unknown dtype": file_of({"a": entry(dtype="U9")}, DATA),
    "a dtype that is a list": file_of({"a": entry(dtype=["U8"])}, DATA),
    "another dtype than the bytes": file_of({"a": entry(dtype="F32", shape=(4,))}, DATA),
    "a shape larger than the bytes": file_of({"a": entry(shape=(5,))}, DATA),
    "a shape that is a number": file_of({"a": {**entry(), "shape": 4}}, DATA),
    "a shape of text": file_of({"a": entry(shape=("4",))}, DATA),
    "a shape of floats": file_of({"a": entry(shape=(4.0,))}, DATA),
    "a shape of booleans": file_of({"a": entry(0, 1, shape=(True,))}, b"a"),
    "two negative sides": file_of({"a": entry(shape=(-2, -2))}, DATA),
    "a side of 2**70": file_of({"a": entry(0, 2**70, shape=(2**70,))}, DATA),
    "nothing, 2**70 times": file_of({"a": entry(0, 0, shape=(0, 2**70))}),
    "more dimensions than numpy has": file_of({"a": entry(0, 1, shape=(1,) * 100)}, b"a"),
    "negative offsets": file_of({"a": entry(-4, 0)}, DATA),
    "offsets the wrong way round": file_of({"a": entry(4, 0)}, DATA),
    "offsets beyond the file": file_of({"a": entry(4, 8)}, DATA),
    "an end beyond the file": file_of({"a": entry(0, 8, shape=(8,))}, DATA),
    "offsets that are floats": file_of({"a": entry(0.0, 4.0)}, DATA),
    "offsets that are text": file_of({"a": entry("0", "4")}, DATA),
    "three offsets": file_of({"a": {**entry(), "data_offsets": [0, 2, 4]}}, DATA),
    "offsets that are a number": file_of({"a": {**entry(), "data_offsets": 4}}, DATA),
    "tensors that overlap": file_of({"a": entry(0, 3, shape=(3,)), "b": entry(2, 4, shape=(2,))}, DATA),
    "the same bytes twice": file_of({"a": entry(), "b": entry()}, DATA),
    "a gap between tensors": file_of({"a": entry(0, 1, shape=(1,)), "b": entry(2, 4, shape=(2,))}, DATA),
    "bytes that no tensor has": file_of({"a": entry(0, 3, shape=(3,))}, DATA),
    "fewer bytes than the tensors have": file_of({"a": entry()}, DATA[:3]),
    # What json.loads takes, and the safetensors format does not.
    "UTF-16": file_of(json.dumps({"a": entry()}).encode("utf-16-le"), DATA),
    "UTF-32": file_of(json.dumps({"a": entry()}).encode("utf-32-le"), DATA),
    "a byte order mark": file_of(json.dumps({"a": entry()}).encode("utf-8-sig"), DATA),
    "a leading blank": file_of(b" " + json.dumps({"a": entry()}).encode(), DATA),
    "a leading line end": file_of(b"\n" + json.dumps({"a": entry()}).encode(), DATA),
    "a tensor twice": file_of(TWICE, DATA),
    "a tensor twice, once escaped": file_of(TWICE.replace(b'"a"', b'"\\u0061"', 1), DATA),
    "a dtype twice": file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', DATA),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{},' + TWICE[1:56] + b"}", DATA),
    "metadata that is a list": file_of({"__metadata__": [], "a": entry()}, DATA),
    "metadata that holds a number": file_of({"__metadata__": {"n": 1}, "a": entry()}, DATA),
    "an entry without names": file_of({"a": ["U8", [4], [0, 4]]}, DATA),
    "minus zero": file_of(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', DATA),
    "NaN beside": file_of(b'{"a":{"x":NaN,' + TWICE[6:56] + b"}", DATA),
    "a number out of range beside": file_of(b'{"a":{"x":1e999,' + TWICE[6:56] + b"}", DATA),
    "half a surrogate pair": file_of({"\ud800": entry()}, DATA),
    "NUL behind": file_of(json.dumps({"a": entry()}).encode() + b"\0", DATA),
    "a shape beyond 64 bits, times nothing": file_of({"a": entry(0, 0, shape=(2**63, 2**63, 0))}),
    "half a byte": file_of({"a": entry(0, 2, "F4", (3,))}, b"ab"),
    # What takes long.
    "a header beyond our limit": file_of(b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3) + b"[]]}", DATA),
    "lists up to our limit": file_of((b'{"a":[' + b"[]," * MAX_HEADER_BYTES)[: MAX_HEADER_BYTES - 4] + b"[]]}", DATA),
    "a shape of thousands of large sides": file_of({"a": entry(shape=(2**63,) * 30_000)}, DATA),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_map_tensors_calls_a_hostile_file_damaged(path, name):
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DamagedArtifactError, match=str(path)):
        map_tensors(path)


def test_map_tensors_calls_a_file_damaged_wherever_it_is_cut_off(path):
    write_tensors(path, {"a": np.arange(3), "b": np.arange(5, dtype=np.uint8)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedArtifactError):
            map_tensors(path)


@given(st.data())
def test_map_tensors_opens_a_file_with_wrong_bytes_or_calls_it_damaged(shared_path, data):
    shared_path.write_bytes(save({"ab": np.arange(3), "c": np.ones((2, 2), np.float32)}))
    content = bytearray(shared_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    shared_path.write_bytes(content)
    try:
        tensors = map_tensors(shared_path)
    except DamagedArtifactError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


# What else the format allows


ENTRY_BYTES = json.dumps(entry()).encode()
SOUND = {
    "blanks behind": file_of(b'{"a":' + ENTRY_BYTES + b"}   \n\t\r", DATA),
    "no metadata": file_of({"__metadata__": None, "a": entry()}, DATA),
    "metadata": file_of({"__metadata__": {"ü": "\U0001f600"}, "a": entry()}, DATA),
    "another order": file_of({"b": entry(2, 4, shape=(2,)), "a": entry(0, 2, shape=(2,))}, DATA),
    "fields that are not known": file_of({"a": {**entry(), "x": [1, {"y": -0.5}, 10**40]}}, DATA),
    "a name without letters": file_of({"": entry()}, DATA),
    "a number": file_of({"a": entry(0, 1, shape=())}, b"a"),
    "nothing": file_of({"a": entry(0, 0, shape=(2**60, 0))}),
    "no tensors": file_of({}),
}


@pytest.mark.parametrize("name", SOUND)
def test_map_tensors_reads_what_the_format_allows(path, name):
    path.write_bytes(SOUND[name])
    found = {tensor: bytes(parts["data"]) for tensor, parts in deserialize(SOUND[name])}
    assert {tensor: array.tobytes() for tensor, array in map_tensors(path).items()} == found


# The dtypes that the library names in its own error.
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32},
    **{"F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64},
}


@pytest.mark.parametrize("dtype", BITS)
def test_map_tensors_reads_a_file_with_a_tensor_of_any_dtype(path, dtype):
    header = {"x": entry(0, BITS[dtype], dtype, (2, 4)), "a": entry(BITS[dtype], BITS[dtype] + 4)}
    content = file_of(header, bytes(range(BITS[dtype])) + DATA)
    assert {name: parts["dtype"] for name, parts in deserialize(content)} == {"x": dtype, "a": "U8"}
    path.write_bytes(content)
    found = map_tensors(path)
    assert (found["a"].tobytes(), found["x"].tobytes()) == (DATA, bytes(range(BITS[dtype])))


def test_map_tensors_knows_every_dtype_that_the_safetensors_library_knows():
    with pytest.raises(SafetensorError) as raised:
        deserialize(file_of({"a": entry(dtype="nothing")}, DATA))
    assert set(re.findall(r"`([A-Z]\w+)`", str(raised.value))) == set(BITS)


# A sound header as its tokens, and what may stand in their places by mistake.
TOKENS = re.findall(
    r'"[^"]*"|\d+|.',
    '{"__metadata__":{"n":"1"},"a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4],"x":[1,{"y":2}]},'
    '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
)
OTHERS = [
    *("0", "1", "4", "8", "-0", "-1", "4.0", "4e0", "1e999", "NaN", "Infinity", "9" * 25, "01", "null", "true"),
    *('"a"', '"b"', '"\\u0062"', '"dtype"', '"__metadata__"', '"U8"', '"F4"', '"BF16"', '"u8"', '""'),
    *('"\\ud800"', '"\\ud83d\\ude00"', '"\x01"', '"é"', '"', "a", "\ufeff", "\0", " ", "\n", "\v", "\\"),
    *("[]", "{}", "[4]", "[0,4]", "[2,2]", '{"a":1}', *"{}[]:,"),
]


@st.composite
def headers(draw):
    """The sound header, its tokens replaced by others of their kind or of any, or left out, once or twice."""
    tokens, values = [*TOKENS, ""], [at for at, token in enumerate(TOKENS) if len(token) > 1 or token.isdigit()]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(values)) if draw(st.integers(0, 2)) else draw(st.integers(0, len(TOKENS)))
        others = [token for token in OTHERS if token[:1] == tokens[at][:1]] if draw(st.booleans()) else []
        tokens[at] = draw(st.sampled_from(others or ["", *OTHERS]))
        tokens[at] += draw(st.sampled_from(["", "", "", " ", tokens[at]]))
    return "".join(tokens)


def is_stricter_here(text):
    """What the library lets pass although the format forbids it: blanks before, a key twice, an entry as a list."""
    if not text.startswith("{"):
        return True
    objects = []
    whole = json.loads(text, object_pairs_hook=lambda pairs: objects.append(pairs) or dict(pairs))
    is_list = any(isinstance(value, list) for value in whole.values())
    return is_list or any(len(dict(pairs)) != len(pairs) for pairs in objects)


@settings(max_examples=500)
@given(headers())
def test_map_tensors_takes_the_headers_that_the_safetensors_library_takes(shared_path, text):
    content = file_of(text.encode(), DATA * 2)
    shared_path.write_bytes(content)
    try:
        map_tensors(shared_path)
        is_taken = True
    except DamagedArtifactError:
        is_taken = False
    try:
        deserialize(content)
        is_sound = True
    except SafetensorError:
        is_sound = False
    event(f"here {is_taken}, there {is_sound}")
    assert is_taken == is_sound or (is_sound and is_stricter_here(text))


# Descriptors


def test_map_tensors_keeps_no_descriptor_open(path):
    write_tensors(path, {"a": np.arange(3)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    tensors = map_tensors(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert tensors["a"].tolist() == [0, 1, 2]


def test_map_tensors_lets_go_of_the_memory_when_the_last_array_is_gone(path):
    write_tensors(path, {"a": np.arange(3), "b": np.arange(3)})
    tensors = map_tensors(path)
    kept = tensors.pop("a")[1:]
    del tensors
    gc.collect()
    assert (kept.tolist(), str(path) in Path("/proc/self/maps").read_text()) == ([1, 2], True)
    del kept
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
