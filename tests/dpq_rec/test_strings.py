import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import DamagedArtifactError
from dpq_rec import strings as strings_module
from dpq_rec.strings import LazyStrings, PackedStrings

ABC = np.frombuffer(b"abc", np.uint8)


@given(st.lists(st.text(max_size=9), max_size=20))
def test_unpack_gives_back_what_was_packed(texts):
    packed = PackedStrings.pack([text.encode() for text in texts])
    packed.check_arrays()
    assert packed.unpack(np.arange(len(texts))) == texts
    assert packed.unpack(np.arange(len(texts))[::-2]) == texts[::-2]


def test_lazy_strings_make_what_is_asked_for():
    packed = PackedStrings.pack([b"a", b"\xff", b"c", b"\xc3\xbc"])  # the second is not UTF-8: it is not read here
    lazy = LazyStrings(packed, np.array([3, 0, 2]))
    assert (len(lazy), lazy[1:], lazy[:1], lazy.tolist()) == (3, ["a", "c"], ["ü"], ["ü", "a", "c"])


@pytest.mark.parametrize("offsets", [[0, -1, 3], [0, 4, 3], [0, 2**62, 3], [-(2**63), 1, 3], [0, 2, 1]], ids=str)
def test_unpack_reads_nothing_outside_the_bytes(offsets):
    with pytest.raises(DamagedArtifactError, match="do not lie one behind the other in its 3 bytes"):
        PackedStrings(ABC, np.array(offsets)).unpack(np.arange(2))


def test_unpack_refuses_strings_that_share_their_bytes():
    """Else 24 bytes a string would bring forth copies of a megabyte, as many as the file likes."""
    with pytest.raises(DamagedArtifactError, match="one behind the other"):
        PackedStrings(ABC, np.array([0, 3, 0, 3])).unpack(np.array([0, 2]))


@pytest.mark.parametrize("texts", [[b"\xff"], [b"a\xc3", b"\xbc"], [b"\xed\xa0\x80"]], ids=str)
def test_check_utf8_finds_what_is_not_utf_8(monkeypatch, texts):
    monkeypatch.setattr(strings_module, "_CHECK_STRINGS", 1)
    with pytest.raises(DamagedArtifactError, match="not UTF-8"):
        PackedStrings.pack([b"a", *texts]).check_utf8()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (PackedStrings(ABC.astype(np.int8), np.array([0, 3])), "bytes: got int8"),
        (PackedStrings(ABC[:, None], np.array([0, 3])), r"bytes: got uint8 \(3, 1\)"),
        (PackedStrings(ABC, np.array([0, 3], np.uint32)), "offsets: got uint32"),
        (PackedStrings(ABC, np.array([[0, 3]])), r"offsets: got int64 \(1, 2\)"),
        (PackedStrings(ABC, np.empty(0, np.int64)), r"offsets: got int64 \(0,\)"),
        (PackedStrings(ABC, np.array([1, 3])), "got 1 to 3, want 0 to 3"),
        (PackedStrings(ABC, np.array([0, 2])), "got 0 to 2, want 0 to 3"),
    ],
)
def test_check_arrays_says_what_does_not_fit(packed, message):
    with pytest.raises(DamagedArtifactError, match=message):
        packed.check_arrays()
