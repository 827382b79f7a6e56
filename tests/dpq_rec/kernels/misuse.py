"""Calls of every public function of the kernels with arguments that are wrong in one thing each.

A program: what leaves an array of it, which all end where readable memory ends, ends it. Prints what was refused.
"""

import inspect
import sys

import numpy as np

from dpq_rec import CodeLayout, kernels
from dpq_rec.errors import ConfigError, DamagedArtifactError, IdTypeError
from dpq_rec.kernels import Coded, _native, ids, lookup
from dpq_rec.kernels.arguments import call
from dpq_rec.kernels.ids import build_tree, sorted_integers
from dpq_rec.kernels.lookup import JsonTexts
from dpq_rec.strings import PackedStrings
from tests.dpq_rec.kernels.end_of_memory import at_the_end

REFUSED = (ConfigError, DamagedArtifactError, IdTypeError)
HELPERS = {
    *("call", "argument_error", "check_array", "check_coded", "check_damage", "native_of", "new_array", "shown"),
    *("build_tree", "num_slots", "num_tree_keys", "sorted_integers"),
}
generator = np.random.default_rng(0)


def floats(*shape):
    return at_the_end(generator.standard_normal(shape).astype(np.float32))


def integers(*numbers, dtype=np.int64):
    return at_the_end(np.array(numbers, dtype))


LAYOUT, OTHER = CodeLayout(num_subspaces=3, num_codes=5), CodeLayout(num_subspaces=3, num_codes=5, num_levels=2)
PACKED = at_the_end(np.zeros((7, LAYOUT.row_bytes), np.uint8))
VALUES, KEYS, QUERIES = floats(3, 5, 4), floats(3, 5, 4), floats(6, 3, 4)
ROWS = integers(0, 3, -1, 6, 2)
KNOWN = at_the_end(np.arange(100, 140))
PLACES = at_the_end(np.arange(40, dtype=np.uint32) % 7)
TEXTS = PackedStrings.pack([b"a", b"bc", b"def"])
BYTES, OFFSETS = at_the_end(TEXTS.bytes_T), at_the_end(TEXTS.offsets_U1)


def stored(packed=PACKED, values=VALUES):
    return Coded.of(packed, values, LAYOUT)


def of_two_tiers(second=PACKED, *, values):
    first = at_the_end(np.zeros((2, OTHER.row_bytes), np.uint8))
    return Coded((OTHER, LAYOUT), (first, second), values)


def write(numbers):
    return ",".join(map(str, numbers.tolist())).encode()


def decode_stored(packed, values, rows, dtype, num_threads):
    return kernels.decode(stored(packed, values), rows, dtype=dtype, num_threads=num_threads)


def decode_tiers(second, values, rows):
    return kernels.decode(of_two_tiers(second, values=values), rows)


def decode_dense(dense, rows, dtype, num_threads):
    return kernels.decode(dense, rows, dtype=dtype, num_threads=num_threads)


def decode_bags(rows, lengths, weights, dtype, num_threads):
    return kernels.decode_bags(stored(), rows, lengths, weights_N=weights, dtype=dtype, num_threads=num_threads)


def softmax_gradients(queries, keys, values, scale, shift, gradients):
    return kernels.softmax_gradients(queries, keys, values, (scale, shift), gradients, euclidean=True)


def scan_top(packed, scores, most, scales, first_row, rows, best):
    before = rows, best
    return kernels.scan_top(packed, scores, LAYOUT, most, scales_V=scales, first_row=first_row, before=before)


def find_integer_rows(wanted_ids, known, rows, tree):
    return lookup.find_integer_rows(wanted_ids, sorted_integers(known, rows, tree))


def lookup_integers(wanted_ids, known, rows, dense, dtype, num_threads):
    return lookup.lookup_integers(wanted_ids, sorted_integers(known, rows), dense, dtype=dtype, num_threads=num_threads)


def lookup_bytes(content, form, of):
    return lookup.lookup_bytes(content, sorted_integers(KNOWN, PLACES), of, form=form)


def decode_to_json(of, ends, rows):
    texts = JsonTexts.of(stored(), np.float32, write)
    return lookup.decode_to_json(of, JsonTexts(texts.groups, texts.ends_G if ends is None else ends, b""), rows)


def native(name):
    """A function of the C++ itself, whose own refusals are enough."""
    function = getattr(_native, name)
    return lambda *arguments: call(function, *arguments)


def counts(*shape, dtype=np.int64):
    return at_the_end(np.zeros(shape, dtype))


TREE, ENDS = at_the_end(build_tree(KNOWN)), at_the_end(JsonTexts.of(stored(), np.float32, write).ends_G)
CALLS = [  # what is called, with arguments that are right
    (decode_stored, [PACKED, VALUES, ROWS, np.float32, 1]),
    (decode_tiers, [PACKED, floats(6, 5, 4), ROWS]),
    (decode_dense, [floats(7, 9), ROWS, np.float16, 2]),
    (decode_bags, [ROWS, integers(2, 0, 3), floats(5), np.float16, 2]),
    (kernels.copy_codes, [stored(), ROWS]),
    (kernels.encode, [QUERIES, KEYS, floats(5), floats(5)]),
    (softmax_gradients, [QUERIES, KEYS, floats(3, 5, 2), floats(5), floats(5), floats(6, 3, 2)]),
    (kernels.central_moments, [QUERIES, floats(3, 4), floats(6)]),
    (kernels.central_moments_gradient, [QUERIES, floats(3, 4), floats(6), floats(3, 22)]),
    (scan_top, [PACKED, floats(3, 5), 4, floats(7), 10, integers(2, 3), floats(2)]),
    (find_integer_rows, [integers(100, 5, 139), KNOWN, PLACES, TREE]),
    (lookup_integers, [integers(100, 5, 139), KNOWN, PLACES, floats(7, 9), np.float32, 1]),
    (lookup_bytes, [integers(100, 5, 139).tobytes(), "codes", stored()]),
    (ids.find_string_rows, [["bc", "x"], BYTES, OFFSETS, integers(0, 1, 2, dtype=np.uint32), None]),
    (ids.build_slots, [BYTES, OFFSETS]),
    (ids.find_disorder, [BYTES, OFFSETS]),
    (decode_to_json, [stored(), ENDS, ROWS]),
    (JsonTexts.of, [stored(), np.float32, write]),
]
OF_CODES, OF_KNOWN = stored().native, sorted_integers(KNOWN, PLACES)
NATIVE_CALLS = [
    ("decode", [OF_CODES, ROWS, floats(5, 12), 1]),
    ("decode_bags", [OF_CODES, ROWS, None, integers(2, 0, 3), False, floats(3, 12), 1]),
    ("copy_codes", [OF_CODES, ROWS, counts(5, 2, dtype=np.uint8), counts(5, dtype=np.uint8)]),
    ("encode", [QUERIES, floats(3, 4, 16), floats(16), floats(16), counts(6, 3, dtype=np.uint16), False]),
    ("softmax_gradients", [QUERIES, floats(3, 4, 16), floats(3, 2, 16), floats(16), floats(16), floats(6, 3, 2),
                           floats(6, 3, 4), floats(3, 4, 16), floats(3, 2, 16), floats(16), floats(16), True]),
    ("central_moments", [QUERIES, floats(3, 4), floats(6), at_the_end(np.zeros((3, 22)))]),
    ("central_moments_gradient", [QUERIES, floats(3, 4), floats(6), floats(3, 22), floats(6, 3, 4)]),
    ("scan_top", [PACKED, floats(3, 8), floats(7), 5, 3, 0, counts(4), floats(4), 2]),
    ("find_integer_rows", [OF_KNOWN, ROWS, counts(5)]),
    ("lookup_integers", [OF_KNOWN, OF_CODES, ROWS, counts(5), floats(5, 12), 1]),
    ("lookup_bytes", [OF_KNOWN, OF_CODES, ROWS.tobytes(), 4]),
    ("find_rows", [("bc", "x"), BYTES, OFFSETS, counts(3, dtype=np.uint32), counts(4, dtype=np.uint32), counts(2)]),
    ("fill_slots", [BYTES, OFFSETS, counts(4, dtype=np.uint32)]),
    ("find_disorder", [BYTES, OFFSETS]),
    ("Vectors", [[(PACKED, 1)], VALUES, 3, 3, False]),
    ("Integers", [KNOWN, PLACES, TREE]),
    ("JsonTexts", [b"1,2,", integers(2, 4, dtype=np.uint32), b""]),
    ("decode_to_json", [OF_CODES, JsonTexts.of(stored(), np.float32, write).native, ROWS, b"", b""]),
]  # fmt: skip
KEYWORDS = {kernels.encode: {"euclidean": True}}


def wrong_arrays(array):
    """Arrays of other types, which are always refused, and of other sizes, which may fit by chance."""
    for dtype in {*"bBhHiIqQefd?O"} - {array.dtype.char, *("q" if array.dtype.char == "l" else "")}:
        yield at_the_end(array.astype(dtype)) if dtype != "O" else array.astype(object), True
    yield array.astype(array.dtype.newbyteorder(">")), array.dtype.itemsize > 1
    yield at_the_end(array[None]), True
    yield array[0], array.ndim > 0
    for axis in range(array.ndim):
        yield at_the_end(np.delete(array, 0, axis)), False
        yield at_the_end(np.concatenate([array, array], axis)), False
        yield (
            np.repeat(array, 2, axis)[tuple(np.s_[::2] if at == axis else np.s_[:] for at in range(array.ndim))],
            False,
        )
        yield (
            at_the_end(np.empty([0 if at == axis else size for at, size in enumerate(array.shape)], array.dtype)),
            False,
        )
    if array.dtype.kind in "iu":
        for number in (-2, 3, 2**31, 2**62, 2**63 - 1, -(2**63)):
            of_type = np.array(number).astype(array.dtype)  # unsigned ones wrap around
            yield at_the_end(np.full(array.shape, of_type)), False


def wrong_of(right):
    """Arguments in the place of a right one, and whether all are refused."""
    if isinstance(right, np.ndarray):
        yield from wrong_arrays(right)
        yield from ((right.tolist(), True), ("abc", True), (7, True), (b"", False))
    elif isinstance(right, int):
        yield from ((-1, True), (-(2**63), True), (2**70, False), (1.5, True), ("1", True), (None, True), (0, False))
    elif isinstance(right, type):
        yield from ((dtype, True) for dtype in (np.int8, np.int64, np.float64, np.complex64, object, ">f4", "S3"))
    elif isinstance(right, Coded):
        yield from ((floats(7, 9), False), (of_two_tiers(values=floats(6, 5, 4)), False), (None, True), (PACKED, True))
        yield Coded.of(PACKED[:0], VALUES, LAYOUT), False
        yield Coded.of(PACKED, floats(3, 4, 4), LAYOUT), False
    elif isinstance(right, bytes):
        yield from ((right[:-1], right.endswith(b"\0")), (None, True), ("x" * 8, True), (b"", False))
    elif right == "codes":
        yield from (("float64", True), (None, True), ("", True))
    elif isinstance(right, list):
        yield from (([1], True), ([None], True), (["\ud800"], True), ([b"x"], True), ([], False))
        yield from (("abc", True), (5, True), ({"a"}, True), (None, True))
    elif isinstance(right, tuple):
        yield from ((("a",), False), ((1, 2), False), (None, True))


def try_one(function, arguments, *, must_be_refused, what):
    try:
        function(*arguments, **KEYWORDS.get(function, {}))
    except (*REFUSED, MemoryError):
        return 1
    assert not must_be_refused, f"{what} was not refused"
    return 0


def main():
    public = {
        name
        for module in (kernels, ids, lookup)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__.startswith("dpq_rec.kernels") and not name.startswith("_")
    }
    tried = {function.__name__.replace("_stored", "").replace("_dense", "") for function, _ in CALLS}
    assert public - HELPERS <= tried, public - HELPERS - tried
    refused = 0
    for name, function, right in [
        *((function.__name__, function, right) for function, right in CALLS),
        *((f"native {name}", native(name), right) for name, right in NATIVE_CALLS),
    ]:
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        assert try_one(function, right, must_be_refused=False, what=name) == 0
        for at, argument in enumerate(right):
            for number, (wrong, always) in enumerate(wrong_of(argument)):
                what = f"{name}: argument {at}, wrong one {number}: {getattr(wrong, 'dtype', wrong)!r}"
                arguments = [*right[:at], wrong, *right[at + 1 :]]
                always &= not (name.startswith("native") and getattr(wrong, "dtype", None) == np.float16)  # an output
                refused += try_one(function, arguments, must_be_refused=always, what=what)
    sys.stdout.write(f"refused {refused}\n")


if __name__ == "__main__":
    main()
