from importlib import metadata

import pytest

from service.proto import generate
from service.proto.dpq.v1 import embedding_pb2 as pb


@pytest.fixture
def regenerated(tmp_path):
    return generate.generate(tmp_path)


def test_stubs_are_what_the_contract_generates(regenerated, tmp_path):
    made_by = (generate.HERE / "dpq/v1/embedding_pb2_grpc.py").read_text()
    version = metadata.version("grpcio-tools")
    if f"GRPC_GENERATED_VERSION = '{version}'" not in made_by:
        pytest.skip(f"the stubs were made by another grpcio-tools than the installed {version}")
    for path in regenerated:
        assert path.read_text() == (generate.HERE / path.relative_to(tmp_path)).read_text(), path.name


def test_stubs_hold_the_contract_whatever_generated_them(regenerated):
    """The descriptor in the fresh stubs equals the one in use; it is the contract without its comments."""
    fresh = next(path for path in regenerated if path.name == "embedding_pb2.py").read_text()
    committed = (generate.HERE / "dpq/v1/embedding_pb2.py").read_text()

    def descriptor(source):
        return next(line for line in source.splitlines() if line.startswith("DESCRIPTOR = "))

    assert descriptor(fresh) == descriptor(committed)


def test_contract_has_the_fields_and_numbers_that_were_agreed():
    def fields(message):
        return {field.name: field.number for field in message.DESCRIPTOR.fields}

    assert fields(pb.LookupRequest) == {
        "table": 1, "ids": 2, "string_ids": 3, "dtype": 4, "missing": 5, "bag_lengths": 6, "pooling": 7
    }  # fmt: skip
    assert fields(pb.LookupReply) == {"vectors": 1, "dim": 2, "dtype": 3, "missing": 4, "version": 5}
    assert fields(pb.BatchLookupRequest) == {"requests": 1}
    assert fields(pb.BatchLookupReply) == {"replies": 1}
    assert fields(pb.SearchRequest) == {
        "table": 1, "queries": 2, "ids": 3, "string_ids": 4, "k": 5, "similarity": 6, "missing": 7
    }  # fmt: skip
    assert fields(pb.SearchReply) == {"neighbours": 1, "missing": 2, "version": 3}
    assert fields(pb.Neighbours) == {"ids": 1, "string_ids": 2, "scores": 3}
    assert dict(pb.Similarity.items()) == {"DOT": 0, "COSINE": 1}
    assert (dict(pb.DType.items()), dict(pb.MissingPolicy.items()), dict(pb.Pooling.items())) == (
        {"FLOAT32": 0, "FLOAT16": 1},
        {"ZEROS": 0, "ERROR": 1},
        {"NONE": 0, "SUM": 1, "MEAN": 2},
    )
    assert set(pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods_by_name) == {
        "Lookup", "BatchLookup", "StreamLookup", "Search", "ListTables"
    }  # fmt: skip


def test_generate_says_when_the_contract_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "STEM", "dpq/v1/none")
    with pytest.raises(RuntimeError, match="protoc refused"):
        generate.generate(tmp_path)
