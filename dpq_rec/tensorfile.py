"""Tensors to a file and back. In: arrays, or chunks of them. Out: a safetensors file; read-only arrays mapped from it.

Any safetensors library reads what `write_tensors` writes. The library's own writer takes whole tensors and aligns to 8
bytes; tables outgrow memory and rows of codes must not straddle cache lines, so the writing is done here: tensors
are streamed, and data begins at a multiple of 64.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.errors import DamagedArtifactError
from dpq_rec.kernels._native import map_file

ALIGNMENT = 64
PADDING = "padding"  # a tensor of zeros that brings the last tensor, read at random, to a multiple of ALIGNMENT
MAX_HEADER_BYTES = 1 << 20  # 10,000 tensors'; the safetensors library takes 100 MB, which Python parses for minutes
_UINT64_END = 1 << 64
_MOST_DIGITS = 20  # of a 64-bit integer
_MOST_SHOWN = 300  # characters of an error about a file

_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<i8"): "I64",
    np.dtype("<f4"): "F32",
    np.dtype("<u4"): "U32",
    np.dtype("<f2"): "F16",
    np.dtype("<u2"): "U16",
    np.dtype("u1"): "U8",
}
# Other tensors may stand beside those of a table: they are read in numpy's types, where it has them.
_DTYPES = {name: dtype for dtype, name in _NAMES.items()} | {
    "BOOL": np.dtype("?"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_NUM_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "BF16": 16,
}


@dataclass(frozen=True)
class Stream:
    """A tensor that comes in chunks along its first axis, so that it never has to be in memory whole."""

    dtype: DTypeLike
    shape: tuple[int, ...]
    chunks: Iterable[NDArray[Any]]


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any] | Stream]) -> tuple[int, str]:
    """Write tensors as one safetensors file; wide types first, so that each is aligned to its own size.

    Returns:
        The file's bytes, and its sha256.

    Raises:
        ValueError: a stream's chunks are of another type than the stream, or do not add up to its shape.
    """
    streams = {name: _as_stream(tensor) for name, tensor in tensors.items()}
    order = sorted(streams, key=lambda name: -np.dtype(streams[name].dtype).itemsize)
    before_last = sum(_num_bytes(streams[name]) for name in order[:-1])
    if before_last % ALIGNMENT:
        fill = np.zeros(-before_last % ALIGNMENT, np.uint8)
        streams[PADDING] = Stream(fill.dtype, fill.shape, [fill])
        order.insert(len(order) - 1, PADDING)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in _blocks(streams, order):
            file.write(block)
            digest.update(block)
            num_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()


def pack_tensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, as bytes: tensors in their order, and text beside them."""
    streams = {name: _as_stream(tensor) for name, tensor in tensors.items()}
    return b"".join(_blocks(streams, list(streams), metadata))


def _as_stream(tensor: NDArray[Any] | Stream) -> Stream:
    return tensor if isinstance(tensor, Stream) else Stream(tensor.dtype, tensor.shape, [tensor])


def _blocks(
    streams: Mapping[str, Stream], order: list[str], metadata: Mapping[str, str] | None = None
) -> Iterable[bytes]:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in order:
        end = offset + _num_bytes(streams[name])
        dtype = _NAMES[np.dtype(streams[name].dtype).newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(streams[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        stream, num_rows = streams[name], 0
        for chunk in stream.chunks:
            if chunk.shape[1:] != stream.shape[1:] or not np.can_cast(chunk.dtype, stream.dtype):
                wanted = f"{np.dtype(stream.dtype)} [N, {', '.join(map(str, stream.shape[1:]))}]"
                raise ValueError(f"tensor {name!r}: got a chunk {chunk.dtype} {chunk.shape}, want {wanted}")
            num_rows += len(chunk)
            yield np.ascontiguousarray(chunk, np.dtype(stream.dtype).newbyteorder("<")).tobytes()
        if num_rows != stream.shape[0]:
            raise ValueError(f"tensor {name!r}: got {num_rows} rows, want {stream.shape[0]}")


def _num_bytes(stream: Stream) -> int:
    return math.prod(stream.shape) * np.dtype(stream.dtype).itemsize


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only arrays mapped from a safetensors file. Only the header is read; no descriptor stays open.

    A tensor of a type that numpy lacks, such as BF16, comes as its bytes, of type "V1".

    Raises:
        DamagedArtifactError: the header does not describe the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise DamagedArtifactError(f"{path}: got {size} bytes, want a safetensors file")
        mapped = map_file(file.fileno(), size)
    return _parse(memoryview(mapped.data), str(path))[0]


def unpack_tensors(content: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read-only arrays, views of a safetensors file's bytes, and the text beside them.

    Raises:
        DamagedArtifactError: the header does not describe the bytes.
    """
    if len(content) < 8:
        raise DamagedArtifactError(f"tensors: got {len(content)} bytes, want a safetensors file")
    return _parse(memoryview(content), "tensors")


def _parse(content: memoryview, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors and the text of a file that the safetensors library reads too."""
    header_bytes, size = int.from_bytes(content[:8], "little"), len(content)
    if header_bytes > size - 8:
        raise DamagedArtifactError(f"{name}: the header claims {header_bytes} bytes, the file has {size}")
    if header_bytes > MAX_HEADER_BYTES:
        raise DamagedArtifactError(f"{name}: the header takes {header_bytes} bytes, want at most {MAX_HEADER_BYTES}")
    text = bytes(content[8 : 8 + header_bytes])
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = parse_json(text)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (type(metadata) is dict and all(type(v) is str for v in metadata.values())):
            raise ValueError("__metadata__ is no map of text to text")
        for entry in header.values():
            _check_entry(entry)
        _check_offsets(sorted(tuple(entry["data_offsets"]) for entry in header.values()), size - 8 - header_bytes)
        return {name: _view(content, 8 + header_bytes, entry) for name, entry in header.items()}, metadata or {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifactError(f"{name}: the header does not describe the file: {shorten(error)}") from error


def parse_json(content: bytes) -> Any:
    """JSON in UTF-8 that all readers take alike: no key twice, no NaN, no half surrogate pair, no huge number.

    Raises:
        ValueError, RecursionError: it is none.
    """
    text = content.decode()
    found = json.loads(
        text,
        object_pairs_hook=_without_duplicates,
        parse_int=_parse_integer,
        parse_float=_parse_float,
        parse_constant=_parse_float,
    )
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # which half a surrogate pair cannot be
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands there twice: {reprlib.repr([key for key, _ in pairs])}")
    return found


def _parse_integer(text: str) -> int | float:
    """An int; a float where it has more digits than 64 bits have or is minus zero, so that it is no count."""
    return _parse_float(text) if len(text) > _MOST_DIGITS or text == "-0" else int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"a number is NaN or out of range: {reprlib.repr(text)}")
    return number


def shorten(error: BaseException) -> str:
    """An error's text in one short line: a file may have put much into it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MOST_SHOWN]}{'...' if len(text) > _MOST_SHOWN else ''}"


def _check_entry(entry: dict[str, Any]) -> None:
    """Type, shape and offsets of a tensor agree, as the safetensors format wants it."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or not all(type(n) is int and 0 <= n < _UINT64_END for n in (begin, end, *shape)):
        raise ValueError(f"shape and offsets must be counts, got {reprlib.repr(entry)}")
    count = 1
    for factor in (*shape, _NUM_BITS[entry["dtype"]]):
        count *= factor
        if count >= _UINT64_END:
            raise ValueError(f"a tensor is larger than 64 bits can say: {reprlib.repr(entry)}")
    if count != 8 * (end - begin):
        raise ValueError(f"offsets and shape disagree: {reprlib.repr(entry)}")


def _check_offsets(spans: Sequence[tuple[int, int]], data_bytes: int) -> None:
    """Tensors lie one behind the other and fill the file, as the safetensors format wants it."""
    at = 0
    for begin, end in spans:
        if begin != at:
            raise ValueError(f"a tensor begins at byte {begin} of the data, want {at}: no gaps and no overlaps")
        at = end
    if at != data_bytes:
        raise ValueError(f"the tensors take {at} bytes, the file holds {data_bytes}")


def _view(content: memoryview, data_start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        dtype, shape = np.dtype("V1"), (end - begin,)
    return np.frombuffer(content, dtype, math.prod(shape), data_start + begin).reshape(shape)


def sha256_of(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> str:
    """The digest of a file, read in pieces; `progress` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()
