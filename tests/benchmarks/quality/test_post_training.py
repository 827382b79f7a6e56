"""Compressors of trained tables: what they decode held to faiss, FBGEMM and numpy, their bytes to files."""

import dataclasses

import faiss
import numpy as np
import pytest
from safetensors.numpy import save
from sklearn.decomposition import TruncatedSVD

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore, verify
from dpq_rec.codes import CodeLayout, unpack_codes
from dpq_rec.vocabulary import IdentityVocabulary
from tests.benchmarks.quality.faiss_codes import FaissCodes
from tests.benchmarks.quality.post_training import METHODS
from tests.benchmarks.quality.reconstruction import Reconstruction
from tests.benchmarks.quality.scalars import LowRank, Scalar
from tests.benchmarks.quality.sizes import bytes_of, fit_to_budget
from tests.benchmarks.quality.stored import plain, write_stored

VECTORS = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32) @ np.diag(0.8 ** np.arange(16))
VECTORS = VECTORS.astype(np.float32)
LAYOUTS = {
    "pq": CodeLayout(num_subspaces=4, num_codes=16),
    "opq": CodeLayout(num_subspaces=4, num_codes=16),
    "rq": CodeLayout(num_subspaces=2, num_codes=8, num_levels=3),
    "aq": CodeLayout(num_subspaces=2, num_codes=8, num_levels=3),
}
SMALL = DPQConfig(method="vq", num_subspaces=4, num_codes=16, batch_norm=False, values_dtype="float16")
COMPRESSORS = {
    "low-rank": LowRank(5),
    "int8": Scalar(8),
    "int4": Scalar(4),
    **{kind: FaissCodes(kind, layout) for kind, layout in LAYOUTS.items()},
    "dpq-reconstruction": Reconstruction(SMALL, num_epochs=2),
}


@pytest.fixture(scope="module")
def fitted():
    faiss.omp_set_num_threads(1)  # threads that wait for a busy core make seconds of milliseconds
    return {name: compressor.fit(VECTORS) for name, compressor in COMPRESSORS.items()}


def error(vectors):
    return float(np.square(vectors - VECTORS).mean())


def test_every_method_of_the_grid_is_tested_here():
    assert set(COMPRESSORS) == set(METHODS)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bytes_are_those_of_the_serialized_tensors(fitted, name):
    stored = fitted[name]
    serialized = save({key: np.ascontiguousarray(tensor) for key, tensor in stored.tensors.items()})
    header = 8 + int.from_bytes(serialized[:8], "little")
    assert stored.num_bytes == len(serialized) - header
    assert COMPRESSORS[name].num_bytes(*VECTORS.shape) == stored.num_bytes


@pytest.mark.parametrize("name", COMPRESSORS)
def test_vectors_are_near_the_table(fitted, name):
    """Nothing may come out that is no better than the mean row: a wrong order of codes or columns would."""
    assert fitted[name].vectors_VE.shape == VECTORS.shape
    assert error(fitted[name].vectors_VE) < 0.6 * error(VECTORS.mean(0))


def test_low_rank_is_the_truncated_svd_of_sklearn(fitted):
    svd = TruncatedSVD(5, algorithm="arpack", random_state=0)
    expected = svd.fit_transform(VECTORS.astype(np.float64)) @ svd.components_
    np.testing.assert_allclose(fitted["low-rank"].vectors_VE, expected, atol=4e-3)  # fp16 factors


@pytest.mark.parametrize("bits", [8, 4])
def test_scalars_are_within_half_a_step_of_each_rows_own_range(fitted, bits):
    decoded, steps = fitted[f"int{bits}"].vectors_VE, np.ptp(VECTORS, axis=1, keepdims=True) / (2**bits - 1)
    assert (np.abs(decoded - VECTORS) <= 0.56 * steps + 2e-3).all()  # 4 bits: fp16 scale and offset
    assert all(len(np.unique(row)) <= 2**bits for row in decoded)


def test_int8_decodes_as_scale_and_offset_written_out(fitted):
    fused = fitted["int8"].tensors["fused_rows"]
    scale, offset = np.ascontiguousarray(fused[:, -8:]).view(np.float32).T
    expected = fused[:, :16].astype(np.float32) * scale[:, None] + offset[:, None]
    np.testing.assert_allclose(fitted["int8"].vectors_VE, expected, rtol=1e-6, atol=1e-6)


def test_pq_decodes_as_faiss_does(fitted):
    stored = fitted["pq"]
    values = stored.tensors["values"].astype(np.float32)
    quantizer = faiss.ProductQuantizer(16, 4, 4)
    faiss.copy_array_to_vector(values.reshape(-1), quantizer.centroids)
    # contract 3 and faiss pack 4-bit codes alike
    np.testing.assert_array_equal(quantizer.decode(stored.tensors["packed_codes"]), stored.vectors_VE)


def test_pq_is_as_good_as_faiss_on_the_whole(fitted):
    quantizer = faiss.ProductQuantizer(16, 4, 4)
    quantizer.train(VECTORS)
    of_faiss = error(quantizer.decode(quantizer.compute_codes(VECTORS)))
    assert error(fitted["pq"].vectors_VE) == pytest.approx(of_faiss, rel=0.05)


def test_opq_rotates_back(fitted):
    stored = fitted["opq"]
    rotation = stored.tensors["rotation"].astype(np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=5e-3)
    codes = unpack_codes(stored.tensors["packed_codes"], LAYOUTS["opq"])
    row = np.concatenate([stored.tensors["values"][d, codes[7, d]] for d in range(4)]).astype(np.float64)
    np.testing.assert_allclose(stored.vectors_VE[7], row @ rotation, atol=1e-4)


@pytest.mark.parametrize("kind", ["rq", "aq"])
def test_residual_codes_are_as_good_as_faiss_subspace_by_subspace(fitted, kind):
    quantizer = {"rq": faiss.ProductResidualQuantizer, "aq": faiss.ProductLocalSearchQuantizer}[kind](16, 2, 3, 3)
    quantizer.train(VECTORS)
    of_faiss = error(quantizer.decode(quantizer.compute_codes(VECTORS)))
    assert error(fitted[kind].vectors_VE) == pytest.approx(of_faiss, rel=0.1)


def test_residual_codes_are_found_for_fewer_rows_than_numbers_in_one():
    """A feature's table has a few rows; faiss alone wants as many as numbers, for principal components."""
    vectors_VE = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    layout = CodeLayout(num_subspaces=1, num_codes=16, num_levels=4)
    back_VE = FaissCodes("rq", layout).fit(vectors_VE).vectors_VE
    assert np.square(back_VE - vectors_VE).sum() < 0.2 * np.square(vectors_VE).sum()


def test_reconstruction_is_no_worse_than_the_k_means_it_starts_from(fitted):
    start = Reconstruction(SMALL, num_epochs=0).fit(VECTORS)
    assert error(fitted["dpq-reconstruction"].vectors_VE) <= error(start.vectors_VE)
    assert error(start.vectors_VE) == pytest.approx(error(fitted["pq"].vectors_VE), rel=0.15)


def test_shared_k_means_is_as_good_as_faiss_on_all_subspaces_together():
    config = dataclasses.replace(SMALL, share_subspaces=True)
    stored = Reconstruction(config, num_epochs=0).fit(VECTORS)
    pieces, quantizer = np.ascontiguousarray(VECTORS.reshape(-1, 4)), faiss.ProductQuantizer(4, 1, 4)
    quantizer.train(pieces)
    of_faiss = error(quantizer.decode(quantizer.compute_codes(pieces)).reshape(VECTORS.shape))
    assert stored.tensors["values"].shape == (1, 16, 4)
    assert error(stored.vectors_VE) == pytest.approx(of_faiss, rel=0.05)


@pytest.mark.parametrize("method", ["sx", "vq"])
def test_reconstruction_learns_from_a_uniform_start(method):
    config = DPQConfig(method=method, metric="euclidean", num_subspaces=4, num_codes=8, batch_norm=False)
    start, trained = (Reconstruction(config, n, 0.01, "uniform").fit(VECTORS) for n in (0, 60))
    assert error(trained.vectors_VE) < 0.8 * error(start.vectors_VE)


def test_written_artifact_serves_what_was_decoded(tmp_path, fitted):
    tables = {**{name.replace("-", "_"): stored for name, stored in fitted.items()}, "same": plain(VECTORS)}
    vocabularies, features = dict.fromkeys(tables, IdentityVocabulary(300)), dict.fromkeys(tables, ("seen",))
    write_stored(tmp_path / "small", tables, vocabularies, features)
    verify(tmp_path / "small")
    store = EmbeddingStore.open(tmp_path / "small")
    for name, stored in tables.items():
        np.testing.assert_array_equal(store.table(name).decode(np.arange(300)), stored.vectors_VE)
        assert store.table(name).manifest.features == ("seen",)
        if stored.layout is not None:
            assert store.table(name).artifact_bytes == stored.num_bytes
    kinds = {name: table.manifest.kind for name, table in store.tables.items()}
    assert {name for name, kind in kinds.items() if kind == "dpq"} == {"pq", "rq", "aq", "dpq_reconstruction"}


SHAPES = {"user_id": (1000, 64), "item_id": (3000, 64), "gender": (2, 64)}


@pytest.mark.parametrize("ratio", [10, 20])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("low-rank", {}), ("pq", {"num_codes": 16}), ("opq", {"num_codes": 16}), ("rq", {"num_codes": 16})],
)
def test_sizes_fill_the_budget_and_stay_within_it(method, settings, ratio):
    sizes = fit_to_budget(SHAPES, ratio, METHODS[method](**settings))
    taken = sum(bytes_of(SHAPES[name], size) for name, size in sizes.items())
    budget = sum(4 * v * e for v, e in SHAPES.values()) / ratio
    assert taken <= budget
    assert taken > 0.4 * budget  # PQ has a power of two of subspaces
    if method != "low-rank":
        assert sizes["gender"] is None  # two rows are no use to a clustering: plain, and counted as such


def test_sizes_refuse_a_budget_that_nothing_fits():
    with pytest.raises(ConfigError, match="fits into none so small"):
        fit_to_budget(SHAPES, 5000, METHODS["low-rank"]())
