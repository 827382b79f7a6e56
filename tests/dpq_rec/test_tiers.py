"""Tables whose later rows have fewer levels: cut, written, opened, decoded, shown. A loop is the measure."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    DPQConfig,
    EmbeddingStore,
    IdentityVocabulary,
    TableContents,
    open_artifact,
    pack_codes,
    verify,
    write_artifact,
)
from dpq_rec.cli import main
from dpq_rec.code_use import chance_of_agreement, count_codes
from dpq_rec.codes import cut_into_tiers
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.report.facts import measure
from dpq_rec.wire import Values
from tests.dpq_rec.builders import dpq_contents, edit_manifest, overwrite, random_codes, random_values

LAYOUT = CodeLayout(num_subspaces=3, num_codes=5, num_levels=4)  # 3 bits a code: impossible codes, and padding bits
SHARES = ((0.1, 3), (0.4, 1))  # rows 0-4, 5-19, 20-49: rows of 5, 4 and 2 bytes
V = 50


@dataclasses.dataclass(frozen=True)
class Case:
    """A table's parts: what the loop needs."""

    layout: CodeLayout
    shares: tuple[tuple[float, int], ...]
    codes_VM: np.ndarray  # also of levels that a row does not have
    values: np.ndarray

    def levels(self, row):
        """By the definition of a share: rows from round(share * V) on have only so many levels."""
        num_levels = self.layout.num_levels
        for share, fewer in self.shares:
            if row >= round(share * len(self.codes_VM)):
                num_levels = fewer
        return num_levels

    def vector(self, row):
        """In fp32, a number at a time, level after level."""
        out = []
        for d in range(self.layout.num_subspaces):
            for s in range(self.values.shape[2]):
                total = None
                for level in range(self.levels(row)):
                    m = level * self.layout.num_subspaces + d
                    place = level if len(self.values) == self.layout.num_levels else m
                    value = np.float32(self.values[place, self.codes_VM[row, m], s])
                    total = value if total is None else np.float32(total + value)
                out.append(total)
        return np.array(out, np.float32)

    def contents(self, cuts=()):
        """To be written in chunks that end at tiers, and at some more rows."""
        tiers = cut_into_tiers(self.layout, len(self.codes_VM), self.shares)
        chunks = []
        for tier in tiers:
            ends = [tier.first_row, *sorted(c for c in cuts if 0 < c - tier.first_row < tier.num_rows)]
            for begin, end in zip(ends, [*ends[1:], tier.first_row + tier.num_rows], strict=True):
                chunks.append(pack_codes(self.codes_VM[begin:end, : tier.layout.codes_per_row], tier.layout))
        return TableContents(
            num_embeddings=len(self.codes_VM),
            embedding_dim=self.layout.num_subspaces * self.values.shape[2],
            vocabulary=IdentityVocabulary(len(self.codes_VM)),
            layout=self.layout,
            values=self.values,
            chunks=chunks,
            tiers=tiers,
        )


def case(layout=LAYOUT, shares=SHARES, num_rows=V, *, shared=False, dtype=np.float32):
    values = random_values(layout, 2, shared=shared).astype(dtype)
    return Case(layout, shares, random_codes(num_rows, layout), values)


@st.composite
def cases(draw):
    levels = sorted(draw(st.sets(st.integers(1, 9), min_size=2, max_size=4)), reverse=True)
    shares = draw(st.sets(st.integers(1, 99), min_size=len(levels) - 1, max_size=len(levels) - 1))
    layout = CodeLayout(
        num_subspaces=draw(st.integers(1, 3)), num_codes=draw(st.sampled_from([2, 5, 16, 300])), num_levels=levels[0]
    )
    pairs = tuple((share / 100, fewer) for share, fewer in zip(sorted(shares), levels[1:], strict=True))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    return case(layout, pairs, draw(st.integers(1, 60)), shared=draw(st.booleans()), dtype=dtype)


@pytest.fixture
def written(tmp_path):
    return write_artifact(tmp_path / "a", {"item": case().contents()}, version="v1")


# Cut


def test_tiers_begin_at_shares_of_the_rows():
    tiers = DPQConfig(num_levels=44, tiers=((0.05, 32), (0.2, 16))).tiers_of(1_010)
    assert [(tier.first_row, tier.num_rows, tier.layout.num_levels) for tier in tiers] == [
        (0, 50, 44),  # 50.5 is rounded to even
        (50, 152, 32),
        (202, 808, 16),
    ]


def test_without_shares_all_rows_are_one_tier():
    config = DPQConfig(num_levels=2)
    assert config.tiers_of(7) == ((0, 7, config.layout),)


def test_a_small_table_has_tiers_without_rows():
    assert [tier.num_rows for tier in DPQConfig(num_levels=3, tiers=((0.1, 2), (0.9, 1))).tiers_of(1)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (((0.0, 2),), r"tiers: got \(\(0.0, 2\),\), want shares of the rows between 0 and 1"),
        (((1.0, 2),), "want shares of the rows between 0 and 1"),
        (((float("nan"), 2),), "want shares of the rows between 0 and 1"),
        (((0.5, 3), (0.5, 2)), "each larger than the one before"),
        (((0.5, 4),), "whole numbers of levels, from below num_levels 4 down to 1"),
        (((0.5, 2), (0.6, 2)), "each smaller"),
        (((0.5, 0),), "down to 1"),
        (((0.5, 2.0),), "whole numbers"),
    ],
)
def test_config_rejects_tiers_that_make_no_sense(tiers, message):
    with pytest.raises(ConfigError, match=message):
        DPQConfig(num_levels=4, tiers=tiers)


def shares_of(num_tiers):
    """Tiers of as many rows, that lose a level each."""
    return tuple((at / num_tiers, num_tiers - at) for at in range(1, num_tiers))


def test_config_takes_as_many_tiers_as_a_byte_can_number():
    assert len(DPQConfig(num_levels=256, tiers=shares_of(256)).tiers_of(1_000)) == 256


def test_config_rejects_more_tiers_than_a_byte_can_number():
    with pytest.raises(ConfigError, match="tiers: got 256, want at most 255"):
        DPQConfig(num_levels=257, tiers=shares_of(257))


# Written and read


def test_codes_of_every_row_of_256_tiers_give_the_vectors_of_lookup(tmp_path):
    layout = CodeLayout(num_subspaces=1, num_codes=2, num_levels=256)
    contents = case(layout, shares_of(256), 300).contents()
    store = EmbeddingStore.open(write_artifact(tmp_path / "a", {"item": contents}))
    values = Values.from_bytes(store.table("item").values(store.version).to_bytes())
    by_codes = values.decode(store.codes("item", np.arange(300)))
    np.testing.assert_array_equal(by_codes, store.lookup("item", np.arange(300)).vectors)


def test_write_artifact_refuses_more_tiers_than_a_byte_can_number(tmp_path):
    layout = CodeLayout(num_subspaces=1, num_codes=2, num_levels=257)
    contents = case(layout, shares_of(257), 300).contents()
    with pytest.raises(ConfigError, match="tiers: got 257, want at most 256"):
        write_artifact(tmp_path / "a", {"item": contents})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"num_rows": 6}, {"layout": dataclasses.replace(LAYOUT, num_levels=3)}])
def test_write_artifact_refuses_tiers_that_open_would_refuse(tmp_path, change):
    contents = case().contents()
    tiers = (contents.tiers[0]._replace(**change), *contents.tiers[1:])
    with pytest.raises(ConfigError, match=r"table 'item': .*tiers: got"):
        write_artifact(tmp_path / "a", {"item": dataclasses.replace(contents, tiers=tiers)})


def test_a_table_with_tiers_is_written_as_the_format_says(written):
    entry = json.loads((written / "manifest.json").read_text())["tables"]["item"]
    assert entry["kind"] == "dpq-tiers"
    assert entry["tiers"] == [
        {"rows": 5, "num_levels": 4},
        {"rows": 15, "num_levels": 3},
        {"rows": 30, "num_levels": 1},
    ]
    assert (entry["num_levels"], entry["row_bytes"], entry["code_bits"]) == (4, 5, 3)
    tensors, wanted = safetensors.numpy.load_file(written / entry["file"]), case()
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("packed")}
    assert shapes == {"packed_codes": (5, 5), "packed_codes.1": (15, 4), "packed_codes.2": (30, 2)}
    assert np.array_equal(tensors["values"], wanted.values)
    for name, first, num_codes in (("packed_codes", 0, 12), ("packed_codes.1", 5, 9), ("packed_codes.2", 20, 3)):
        for row, packed_W in enumerate(tensors[name], first):
            bits = "".join(f"{byte:08b}"[::-1] for byte in packed_W)
            codes = [int(bits[3 * m : 3 * m + 3][::-1], 2) for m in range(num_codes)]
            assert codes == wanted.codes_VM[row, :num_codes].tolist()
            assert set(bits[3 * num_codes :]) <= {"0"}


def test_a_table_without_tiers_has_none_in_its_manifest(tmp_path):
    path = write_artifact(tmp_path / "a", {"item": dpq_contents(4, LAYOUT)})
    entry = json.loads((path / "manifest.json").read_text())["tables"]["item"]
    assert entry["kind"] == "dpq"
    assert "tiers" not in entry


@settings(max_examples=40)
@given(table=cases(), cuts=st.lists(st.integers(1, 60), max_size=4), seed=st.integers(0, 99))
def test_rows_of_any_tiers_are_decoded_as_the_loop_does(tmp_path_factory, table, cuts, seed):
    path = write_artifact(tmp_path_factory.mktemp("tiers") / "a", {"t": table.contents(cuts)})
    opened = verify(path).tables["t"]
    num_rows = len(table.codes_VM)
    rows_N = np.random.default_rng(seed).integers(MISSING_ROW, num_rows, 2 * num_rows)
    wanted = [np.zeros(opened.manifest.embedding_dim, np.float32) if r < 0 else table.vector(r) for r in rows_N]
    assert opened.decode(rows_N).tobytes() == np.stack(wanted).tobytes()
    packed = sum(
        -(-table.levels(row) * opened.manifest.num_subspaces * opened.manifest.code_bits // 8)
        for row in range(num_rows)
    )
    assert opened.artifact_bytes == packed + table.values.nbytes


@settings(max_examples=40)
@given(table=cases())
def test_a_tier_is_a_table_of_the_first_levels_values(tmp_path_factory, table):
    tiers = cut_into_tiers(table.layout, len(table.codes_VM), table.shares)
    per_level = len(table.values) // table.layout.num_levels
    contents = {"whole": table.contents()}
    for at, (first, num_rows, layout) in enumerate(tiers):
        contents[f"tier{at}"] = TableContents(
            num_embeddings=num_rows,
            embedding_dim=contents["whole"].embedding_dim,
            vocabulary=IdentityVocabulary(num_rows),
            layout=layout,
            values=table.values[: layout.num_levels * per_level],
            chunks=[pack_codes(table.codes_VM[first : first + num_rows, : layout.codes_per_row], layout)],
        )
    store = EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("tiers") / "a", contents))
    for at, (first, num_rows, _) in enumerate(tiers):
        wanted = store.lookup(f"tier{at}", np.arange(num_rows)).vectors
        assert store.lookup("whole", np.arange(first, first + num_rows)).vectors.tobytes() == wanted.tobytes()


def test_no_rows_are_decoded_to_no_vectors(written):
    assert open_artifact(written).tables["item"].decode(np.empty(0, np.int64)).shape == (0, 6)


@pytest.mark.parametrize("rows", [[0, V], [-2]])
def test_a_row_outside_the_table_is_damage(written, rows):
    with pytest.raises(DamagedArtifactError, match=f"row {rows[-1]} is outside the table's 50 rows"):
        open_artifact(written).tables["item"].decode(np.array(rows))


@pytest.mark.parametrize(("change", "got"), [(1, "31 rows"), (-1, "29 rows")])
def test_write_refuses_chunks_that_are_not_the_tiers_rows(tmp_path, change, got):
    contents = case().contents()
    *whole, last = contents.chunks
    last = np.concatenate([last, last[:1]]) if change > 0 else last[:-1]
    with pytest.raises(ValueError, match=f"tensor 'packed_codes.2': got {got}, want 30"):
        write_artifact(tmp_path / "a", {"t": dataclasses.replace(contents, chunks=[*whole, last])})
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_too_few_rows_of_a_tier_before_the_last(tmp_path):
    first, *others = case().contents().chunks
    with pytest.raises(ValueError, match="packed_codes"):
        write_artifact(tmp_path / "a", {"t": dataclasses.replace(case().contents(), chunks=[first[:-1], *others])})


# Damage


@pytest.mark.parametrize(
    ("tensor", "at", "byte", "row"),
    [
        ("packed_codes", 4 * 5, 0b111, 4),
        ("packed_codes.1", 7 * 4, 0b111, 12),  # 7 of 0-4: an impossible code
        ("packed_codes.2", 29 * 2 + 1, 0b10, 49),  # 3 codes of 3 bits: padding
    ],
)
def test_verify_finds_damage_in_every_tier(written, tensor, at, byte, row):
    overwrite(written, "item", tensor, at, bytes([byte]))
    with pytest.raises(DamagedArtifactError, match=f"row {row} holds an impossible code or padding bit"):
        verify(written)


def test_lookup_reports_an_impossible_code_of_a_later_tier(written):
    overwrite(written, "item", "packed_codes.1", 7 * 4, bytes([0b111]))
    table = open_artifact(written).tables["item"]
    assert table.decode(np.array([11])).shape == (1, 6)
    with pytest.raises(DamagedArtifactError, match="row 12 holds a code of 5 or more"):
        table.decode(np.array([0, 12]))


def tiers_of(manifest):
    return manifest["tables"]["item"]["tiers"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: tiers_of(m)[0].update(rows=6), "want 50 rows in all"),
        (lambda m: (tiers_of(m)[0].update(rows=6), tiers_of(m)[1].update(rows=14)), "packed_codes: got"),
        (lambda m: tiers_of(m)[0].update(rows=-5), "want counts"),
        (lambda m: tiers_of(m)[1].update(rows=15.0), "want counts"),
        (lambda m: tiers_of(m)[1].update(num_levels=2), r"packed_codes.1: got uint8 \(15, 4\), want"),
        (lambda m: tiers_of(m)[0].update(num_levels=5), "levels that fall from 4"),
        (lambda m: tiers_of(m)[2].update(num_levels=3), "levels that fall from 4"),
        (lambda m: tiers_of(m)[2].update(num_levels=0), "levels that fall from 4"),
        (lambda m: tiers_of(m)[1].pop("rows"), "KeyError"),
        (lambda m: m["tables"]["item"].pop("tiers"), "KeyError"),
        (lambda m: tiers_of(m).append({"rows": 0, "num_levels": 0}), "levels that fall"),
        (lambda m: m["tables"]["item"].update(kind="dpq"), "packed_codes: got"),
    ],
)
def test_open_finds_tiers_that_contradict_the_table(written, edit, message):
    edit_manifest(written, edit)
    with pytest.raises(DamagedArtifactError, match=message):
        open_artifact(written)


# Shown


def test_inspect_and_verify_show_each_tier(written, capsys):
    assert main(["inspect", str(written)]) == 0
    assert "4, 3, 1" in (shown := capsys.readouterr().out)
    assert "5, 4, 2" in shown
    assert main(["inspect", str(written), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tables"]["item"]
    assert [tier["rows"] for tier in found["tiers"]] == [5, 15, 30]
    assert found["artifact_bytes"] == 5 * 5 + 15 * 4 + 30 * 2 + 4 * 12 * 5 * 2
    assert main(["verify", str(written)]) == 0
    assert "codes and padding bits of 50 rows" in capsys.readouterr().out


def test_export_writes_the_codes_that_a_row_has(written, tmp_path):
    assert main(["export", str(written), "--table", "item", "--codes", "--out", str(tmp_path / "codes")]) == 0
    found, wanted = pq.read_table(tmp_path / "codes").to_pydict(), case()
    assert found["id"] == list(range(V))
    assert found["codes"] == [wanted.codes_VM[row, : 3 * wanted.levels(row)].tolist() for row in range(V)]


def test_export_writes_the_vectors_of_every_tier(written, tmp_path):
    assert main(["export", str(written), "--table", "item", "--out", str(tmp_path / "vectors")]) == 0
    found = pq.read_table(tmp_path / "vectors").to_pydict()["vector"]
    assert np.array(found, np.float32).tobytes() == np.stack([case().vector(row) for row in range(V)]).tobytes()


def test_codes_are_counted_over_the_rows_that_have_them(written):
    table, wanted = open_artifact(written).tables["item"], case()
    counts_MK, agree_M = np.zeros((12, 5), int), np.zeros(12)
    for m in range(12):
        rows = [row for row in range(V) if m < 3 * wanted.levels(row)]
        for row in rows:
            counts_MK[m, wanted.codes_VM[row, m]] += 1
        agree_M[m] = np.mean(
            [
                [r in rows and s in rows and wanted.codes_VM[r, m] == wanted.codes_VM[s, m] for r in range(V)]
                for s in range(V)
            ]
        )
    assert np.array_equal(count_codes(table), counts_MK)
    np.testing.assert_allclose(chance_of_agreement(counts_MK), agree_M)


def test_a_report_measures_a_table_with_tiers(written, tmp_path):
    table = open_artifact(written).tables["item"]
    facts = measure(table, [0, 10, 49])
    assert facts.byte_parts["packed codes"] == 5 * 5 + 15 * 4 + 30 * 2
    assert "other tensors" not in facts.byte_parts
    assert sum(facts.byte_parts.values()) == table.manifest.bytes
    for member in (member for members in facts.neighbourhoods for member in members):
        assert member.codes_M.tolist() == case().codes_VM[member.row, : 3 * case().levels(member.row)].tolist()
    assert main(["inspect", str(written), "--report", str(tmp_path / "r.html"), "--ids", "0", "10", "49"]) == 0
    assert "4, 3, 1" in (tmp_path / "r.html").read_text()
    assert facts.code_use.most_rank(1_000) >= np.linalg.matrix_rank(one_hot(case()))


def one_hot(table):
    """A row's codes as ones among zeros, and zeros for the levels that it lacks."""
    out = np.zeros((V, 12 * 5))
    for row in range(V):
        for m in range(3 * table.levels(row)):
            out[row, 5 * m + table.codes_VM[row, m]] = 1
    return out
