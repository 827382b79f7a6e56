import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, ConfigError, pack_codes, unpack_codes
from dpq_rec.codes import find_damaged_row
from tests.dpq_rec.builders import random_codes

EDGES = sorted({k for bits in range(1, 17) for k in (2**bits - 1, 2**bits, 2**bits + 1) if 2 <= k <= 65_536})
layouts = st.builds(
    CodeLayout,
    num_subspaces=st.integers(1, 9),
    num_codes=st.one_of(st.sampled_from(EDGES), st.integers(2, 65_536)),
    num_levels=st.integers(1, 4),
)


def bit_string(codes_M, code_bits):
    """Contract 3, letter by letter: code m is bits m*b to m*b+b-1, its least significant bit first."""
    return "".join(str(code >> bit & 1) for code in map(int, codes_M) for bit in range(code_bits))


def bytes_of(bits):
    """Bit 0 is the least significant bit of byte 0; what is missing of the last byte is 0."""
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


@given(layouts, st.integers(0, 5), st.integers(0, 99))
def test_unpack_codes_gives_back_what_pack_codes_took(layout, num_rows, seed):
    codes_NM = random_codes(num_rows, layout, seed)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes_NM, layout), layout), codes_NM)


@given(layouts, st.integers(0, 99))
def test_pack_codes_has_the_bit_order_of_the_contract(layout, seed):
    codes_NM = random_codes(3, layout, seed)
    packed_NW = pack_codes(codes_NM, layout)
    assert [row.tobytes() for row in packed_NW] == [bytes_of(bit_string(row, layout.code_bits)) for row in codes_NM]


def test_pack_codes_of_a_row_worked_out_by_hand():
    # 3 bits each, least significant first: 1 -> 100, 6 -> 011, 3 -> 110; together 10001111 and 0.
    packed_NW = pack_codes(np.array([[1, 6, 3]]), CodeLayout(num_subspaces=3, num_codes=7))
    assert packed_NW.tolist() == [[0b11110001, 0b0]]


@pytest.mark.parametrize("num_codes", EDGES)
def test_code_bits_hold_every_code_and_no_fewer_would(num_codes):
    bits = CodeLayout(num_subspaces=1, num_codes=num_codes).code_bits
    assert 2 ** (bits - 1) < num_codes <= 2**bits


@pytest.mark.parametrize("num_codes", EDGES)
def test_pack_codes_takes_the_largest_code(num_codes):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes)
    codes_NM = np.array([[num_codes - 1, 0, num_codes - 1]])
    assert unpack_codes(pack_codes(codes_NM, layout), layout).tolist() == codes_NM.tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint32])
def test_pack_codes_takes_any_integer_type(dtype):
    layout = CodeLayout(num_subspaces=2, num_codes=200)
    assert pack_codes(np.array([[199, 3]], dtype), layout).tolist() == [[199, 3]]


@pytest.mark.parametrize("num_codes", [5, 256, 300])
@pytest.mark.parametrize("code", ["num_codes", -1])
def test_pack_codes_rejects_a_code_outside_zero_to_num_codes(num_codes, code):
    layout = CodeLayout(num_subspaces=2, num_codes=num_codes)
    outside = num_codes if code == "num_codes" else code
    with pytest.raises(ValueError, match=f"want 0 to {num_codes - 1}"):
        pack_codes(np.array([[0, outside]]), layout)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 1)])
def test_pack_codes_rejects_another_shape(shape):
    with pytest.raises(ValueError, match=r"want \[N, 2\]"):
        pack_codes(np.zeros(shape, np.int64), CodeLayout(num_subspaces=2, num_codes=4))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_codes", 1), ("num_codes", 65_537), ("num_subspaces", 0), ("num_levels", 0)],
)
def test_code_layout_rejects(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}: got {value}"):
        CodeLayout(**{"num_subspaces": 2, "num_codes": 4, setting: value})


@given(layouts)
def test_find_damaged_row_accepts_packed_codes(layout):
    assert find_damaged_row(pack_codes(random_codes(4, layout), layout), layout) is None


@given(layouts.filter(lambda layout: layout.num_codes < 1 << layout.code_bits), st.data())
def test_find_damaged_row_finds_a_code_equal_to_num_codes(layout, data):
    codes_NM = random_codes(4, layout)
    row = data.draw(st.integers(0, 3))
    codes_NM[row, data.draw(st.integers(0, layout.codes_per_row - 1))] = layout.num_codes
    wider = CodeLayout(
        num_subspaces=layout.num_subspaces, num_codes=1 << layout.code_bits, num_levels=layout.num_levels
    )
    assert find_damaged_row(pack_codes(codes_NM, wider), layout) == row


@given(layouts.filter(lambda layout: layout.codes_per_row * layout.code_bits % 8), st.data())
def test_find_damaged_row_finds_a_padding_bit(layout, data):
    packed_NW = pack_codes(random_codes(4, layout), layout)
    row = data.draw(st.integers(0, 3))
    packed_NW[row, -1] |= 1 << data.draw(st.integers(layout.codes_per_row * layout.code_bits % 8, 7))
    assert find_damaged_row(packed_NW, layout) == row


def test_find_damaged_row_names_the_first_of_several():
    layout = CodeLayout(num_subspaces=2, num_codes=3)
    packed_NW = np.array([[0b0000], [0b1100], [0b0011]], np.uint8)
    assert find_damaged_row(packed_NW, layout) == 1
