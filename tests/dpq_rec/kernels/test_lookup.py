import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, Int64Vocabulary, kernels, pack_codes
from dpq_rec.codes import cut_into_tiers
from dpq_rec.kernels import MISSING_ROW, Coded
from dpq_rec.kernels.ids import build_tree
from dpq_rec.kernels.lookup import lookup_bytes, lookup_integers
from tests import references
from tests.dpq_rec.builders import random_codes, random_values

DTYPES = {"float32": np.float32, "float16": np.float16}
SHARES = {"one": (), "two": ((0.4, 1),), "three": ((0.2, 2), (0.6, 1))}


def stored_of(tiers, num_rows=300, num_codes=256):
    """Vectors of rows: as they are, or as codes in tiers of 3, 2 and 1 levels."""
    if tiers == "dense":
        return np.random.default_rng(0).standard_normal((num_rows, 5)).astype(np.float32)
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes, num_levels=3)
    tiers = cut_into_tiers(layout, num_rows, SHARES[tiers])
    packed = [pack_codes(random_codes(tier.num_rows, tier.layout), tier.layout) for tier in tiers]
    return Coded([tier.layout for tier in tiers], packed, random_values(layout, 4))


def known_of(num_rows):
    """Ids 0, 3, 6, ..., in rows that do not follow them."""
    ids_U = 3 * np.arange(num_rows)
    return Int64Vocabulary(ids_U, np.random.default_rng(1).permutation(num_rows).astype(np.uint32), build_tree(ids_U))


def rows_of(known, ids_N):
    return references.find_integer_rows(ids_N, known.ids_U, known.rows_U)


def wanted_of(stored, rows_N, form):
    """A reply, from the plain twins of the kernels."""
    positions = (rows_N == MISSING_ROW).nonzero()[0].astype("<u4").tobytes()
    if form != "codes":
        return references.decode(stored, rows_N).astype(DTYPES[form]).tobytes() + positions
    packed_NW, tiers_N = references.copy_codes(stored, rows_N)
    return packed_NW.tobytes() + positions + (tiers_N.tobytes() if len(stored.packed) > 1 else b"")


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("tiers", ["dense", *SHARES])
@pytest.mark.parametrize("num_ids", [0, 1, 127, 128, 129, 256, 300, 3000])
def test_lookup_integers_equals_finding_and_decoding(num_ids, tiers, num_threads):
    stored, known = stored_of(tiers), known_of(300)
    ids_N = np.random.default_rng(2).integers(-5, 905, num_ids)
    wanted_N = rows_of(known, ids_N)
    for dtype in DTYPES.values():
        vectors_NE, missing = lookup_integers(ids_N, known.native, stored, dtype=dtype, num_threads=num_threads)
        assert vectors_NE.tobytes() == references.decode(stored, wanted_N).astype(dtype).tobytes()
        assert missing.dtype == np.uint32
        assert missing.tolist() == (wanted_N == MISSING_ROW).nonzero()[0].tolist()


@given(
    st.sampled_from(["dense", *SHARES]),
    st.sampled_from(["float32", "float16", "codes"]),
    st.lists(st.integers(-3, 65), max_size=300),
    st.sampled_from([20, 256]),
)
@example("three", "codes", [0, -3, 57, 30, 1, 12], 256)
@example("three", "float16", [0, -3, 57, 30, 1, 12], 20)
def test_lookup_bytes_equals_the_plain_twins(tiers, form, ids, num_codes):
    assume(tiers != "dense" or form != "codes")
    stored, known = stored_of(tiers, 20, num_codes), known_of(20)
    rows_N = rows_of(known, np.array(ids, np.int64))
    found = lookup_bytes(np.array(ids, np.int64).tobytes(), known.native, stored, form=form)
    assert found == (wanted_of(stored, rows_N, form), (rows_N == MISSING_ROW).sum())


@given(st.sampled_from(list(SHARES)), st.lists(st.integers(-1, 19), max_size=40))
def test_copy_codes_equals_the_reference(tiers, rows):
    stored, rows_N = stored_of(tiers, 20), np.array(rows, np.int64)
    packed_NW, tiers_N = kernels.copy_codes(stored, rows_N)
    wanted_NW, wanted_N = references.copy_codes(stored, rows_N)
    assert packed_NW.tolist() == wanted_NW.tolist()
    assert (tiers_N is None) == (tiers == "one")
    assert tiers_N is None or tiers_N.tolist() == wanted_N.tolist()


LOOKUPS = {
    "vectors": lambda ids_N, known, stored: lookup_integers(ids_N, known.native, stored),
    "in two threads": lambda ids_N, known, stored: lookup_integers(ids_N, known.native, stored, num_threads=2),
    "bytes": lambda ids_N, known, stored: lookup_bytes(ids_N.tobytes(), known.native, stored, form="float32"),
    "codes": lambda ids_N, known, stored: lookup_bytes(ids_N.tobytes(), known.native, stored, form="codes"),
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
@pytest.mark.parametrize("at", [0, 127, 128, 1500, 2999])
def test_a_row_outside_the_table_is_damage(lookup, at):
    ids_U = np.arange(301)
    known = Int64Vocabulary(ids_U, ids_U.astype(np.uint32), build_tree(ids_U))
    ids_N = np.random.default_rng(3).integers(0, 300, 3000)
    ids_N[at] = 300
    with pytest.raises(DamagedArtifactError, match="row 300 is outside the table's 300 rows"):
        lookup(ids_N, known, stored_of("two"))


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
@pytest.mark.parametrize("at", [0, 127, 128, 1500, 2999])
def test_an_id_that_is_led_astray_is_damage_and_not_missing(lookup, at):
    known = known_of(300)
    tree_T = known.tree_T.copy()
    tree_T[16:] = 2**63 - 1
    ids_N = np.full(3000, 3)
    ids_N[[at, 2999]] = 870, 880
    with pytest.raises(DamagedArtifactError, match=f"id_tree leads id {880 if at == 2999 else 870} to where"):
        lookup(ids_N, Int64Vocabulary(known.ids_U, known.rows_U, tree_T), stored_of("two"))


@pytest.mark.parametrize("name", ["vectors", "in two threads", "bytes"])
@pytest.mark.parametrize("at", [0, 127, 128, 1500, 2999])
def test_a_code_that_cannot_be_is_damage(name, at):
    layout = CodeLayout(num_subspaces=2, num_codes=5)
    packed_VW = pack_codes(random_codes(300, layout), layout)
    packed_VW[299] = 0b111111
    ids_U = np.arange(300)
    known = Int64Vocabulary(ids_U, ids_U.astype(np.uint32), build_tree(ids_U))
    ids_N = np.random.default_rng(4).integers(0, 299, 3000)
    ids_N[at] = 299
    with pytest.raises(DamagedArtifactError, match="row 299 holds a code of 5 or more"):
        LOOKUPS[name](ids_N, known, Coded.of(packed_VW, random_values(layout, 4), layout))
