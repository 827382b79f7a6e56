from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

LANES: int

class Vectors:
    @overload
    def __init__(self, dense: NDArray[np.float32]) -> None: ...
    @overload
    def __init__(self, others: Vectors, packed: list[tuple[NDArray[np.uint8], int]]) -> None: ...
    @overload
    def __init__(
        self,
        packed: list[tuple[NDArray[np.uint8], int]],
        values: NDArray[np.float32],
        num_subspaces: int,
        code_bits: int,
        shared: bool,
    ) -> None: ...
    @property
    def dim(self) -> int: ...

class Integers:
    def __init__(self, ids: NDArray[np.int64], rows: NDArray[np.uint32], tree: NDArray[np.int64] | None) -> None: ...

def decode(vectors: Vectors, rows: NDArray[np.int64], out: NDArray[Any], num_threads: int) -> tuple[int, int]: ...
def decode_bags(
    vectors: Vectors,
    rows: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
    bag_lengths: NDArray[np.int64],
    mean: bool,
    out: NDArray[Any],
    num_threads: int,
) -> tuple[int, int]: ...

class JsonTexts:
    def __init__(self, groups: bytes, ends: NDArray[np.uint32], zeros: bytes) -> None: ...

def decode_to_json(
    vectors: Vectors, texts: JsonTexts, rows: NDArray[np.int64], before: bytes, after: bytes
) -> tuple[bytes, tuple[int, int]]: ...
def encode(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    codes: NDArray[np.uint16],
    euclidean: bool,
) -> None: ...
def softmax_gradients(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    gradients: NDArray[np.float32],
    query_gradients: NDArray[np.float32],
    key_gradients: NDArray[np.float32],
    value_gradients: NDArray[np.float32],
    scale_gradients: NDArray[np.float32],
    shift_gradients: NDArray[np.float32],
    euclidean: bool,
) -> None: ...
def central_moments(
    queries: NDArray[np.float32],
    mean: NDArray[np.float32],
    weights: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None: ...
def central_moments_gradient(
    queries: NDArray[np.float32],
    mean: NDArray[np.float32],
    weights: NDArray[np.float32],
    gradients: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None: ...
def map_file(descriptor: int, num_bytes: int) -> NDArray[np.uint8]: ...
def scan_top(
    packed: NDArray[np.uint8],
    scores: NDArray[np.float32],
    scales: NDArray[np.float32] | None,
    num_codes: int,
    code_bits: int,
    first_row: int,
    best_rows: NDArray[np.int64],
    best_scores: NDArray[np.float32],
    num_found: int,
) -> tuple[int, int]: ...
def find_integer_rows(known: Integers, asked: NDArray[np.int64], out: NDArray[np.int64]) -> int: ...
def lookup_integers(
    known: Integers,
    vectors: Vectors,
    asked: NDArray[np.int64],
    rows: NDArray[np.int64],
    out: NDArray[Any],
    num_threads: int,
) -> tuple[int, int, int, int]: ...
def lookup_bytes(
    known: Integers, vectors: Vectors, asked: bytes, number_bytes: int
) -> tuple[bytes, int, int, int, int]: ...
def copy_codes(
    vectors: Vectors, rows: NDArray[np.int64], packed: NDArray[np.uint8], tiers: NDArray[np.uint8] | None
) -> tuple[int, int]: ...
def find_rows(
    ids: tuple[object, ...],
    id_bytes: NDArray[np.uint8],
    id_offsets: NDArray[np.int64],
    rows: NDArray[np.uint32],
    slots: NDArray[np.uint32] | None,
    out: NDArray[np.int64],
) -> tuple[int, int]: ...
def fill_slots(id_bytes: NDArray[np.uint8], id_offsets: NDArray[np.int64], slots: NDArray[np.uint32]) -> int: ...
def find_disorder(id_bytes: NDArray[np.uint8], id_offsets: NDArray[np.int64]) -> int: ...
